//! Which states in time of a family somebody can still see: what of an element's rows is kept (2.9).
//!
//! A row `(lineage, epoch)` holds from its epoch on until the next row of its lineage. It is kept while somebody
//! stands at an epoch in between: a snapshot at its epoch, the parent of another lineage at the epoch where that
//! branched off, a disk at the epoch that it writes *and all later ones*:
//!
//! ```text
//!  lineage l1   rows:   e1 ........ e4 .. e5 ............
//!               seen:      ^ e3            ^ e6 (the disk, and every later epoch)
//!               kept:   yes         no     yes
//! ```
//!
//! "All later ones", because a replica that is behind does not know yet which of them will have been snapshots:
//! what the state has not heard of is never dropped. What is not seen never will be: a snapshot is made of the
//! epoch that a disk writes, a clone of a snapshot, so closed epochs only ever lose sight.

use super::vdir::{Family, Vdisk};
use crate::ids::{Epoch, LineageId};
use std::collections::{BTreeMap, BTreeSet};

/// The epochs of a family's lineages that are seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visible {
    lineages: BTreeMap<LineageId, Seen>,
    /// Lineages from this one on are not known yet.
    next_lineage: LineageId,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// By snapshots, and by lineages that branched off.
    at: BTreeSet<Epoch>,
    /// By a disk, which writes this one now.
    from: Option<Epoch>,
}

impl Visible {
    /// What is seen of a family with these members.
    pub fn new<'a>(family: &Family, members: impl Iterator<Item = &'a Vdisk>) -> Visible {
        let mut visible = Visible { lineages: BTreeMap::new(), next_lineage: family.next_lineage };
        for member in members {
            let seen = visible.lineages.entry(member.lineage).or_default();
            if member.is_snapshot() {
                seen.at.insert(member.epoch);
            } else {
                seen.from = Some(member.epoch);
            }
        }
        for (parent, epoch) in family.lineages.values().filter_map(|l| l.parent) {
            visible.lineages.entry(parent).or_default().at.insert(epoch);
        }
        visible
    }

    /// True if somebody sees epoch `from`, or a later one before `until` (`None`: before the end of time).
    pub fn sees(&self, lineage: LineageId, from: Epoch, until: Option<Epoch>) -> bool {
        let Some(seen) = self.lineages.get(&lineage) else { return lineage >= self.next_lineage };
        let below = |epoch: Epoch| until.is_none_or(|until| epoch < until);
        seen.at.range(from..).next().is_some_and(|at| below(*at)) || seen.from.is_some_and(|f| below(f.max(from)))
    }

    /// For each of an element's rows, ascending by (lineage, epoch): whether it is kept.
    pub fn kept<'a>(
        &'a self,
        rows: impl Iterator<Item = (LineageId, Epoch)> + Clone + 'a,
    ) -> impl Iterator<Item = bool> + 'a {
        let next = rows.clone().skip(1).map(Some).chain(std::iter::once(None));
        rows.zip(next).map(|((lineage, epoch), next)| {
            let until = next.filter(|(l, _)| *l == lineage).map(|(_, epoch)| epoch);
            self.sees(lineage, epoch, until)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::*;
    use crate::translator::vdir::Lineage;

    fn visible(at: &[(u32, u32)], from: &[(u32, u32)], next: u32) -> Visible {
        let mut lineages: BTreeMap<LineageId, Seen> = BTreeMap::new();
        for (l, e) in at {
            lineages.entry(LineageId(*l)).or_default().at.insert(Epoch(*e));
        }
        for (l, e) in from {
            lineages.entry(LineageId(*l)).or_default().from = Some(Epoch(*e));
        }
        Visible { lineages, next_lineage: LineageId(next) }
    }

    fn kept(visible: &Visible, rows: &[(u32, u32)]) -> Vec<bool> {
        visible.kept(rows.iter().map(|(l, e)| (LineageId(*l), Epoch(*e)))).collect()
    }

    #[test]
    fn a_row_is_kept_while_somebody_stands_between_it_and_the_next() {
        let v = visible(&[(1, 3)], &[(1, 6)], 2);
        assert_eq!(kept(&v, &[(1, 1), (1, 4), (1, 5)]), [true, false, true]);
        assert_eq!(kept(&v, &[(1, 1), (1, 3), (1, 6)]), [false, true, true]);
    }

    #[test]
    fn rows_of_epochs_that_the_state_has_not_heard_of_are_kept() {
        // The state knows that the disk writes e2; others know snapshots of e2 and e3 already.
        let v = visible(&[], &[(1, 2)], 2);
        assert_eq!(kept(&v, &[(1, 1), (1, 2), (1, 3), (1, 4)]), [false, true, true, true]);
        // A row of before, that the first of those snapshots shows.
        assert_eq!(kept(&v, &[(1, 1), (1, 3), (1, 4)]), [true, true, true]);
    }

    #[test]
    fn of_lineages_nothing_is_kept_that_ended_and_everything_that_is_new() {
        let v = visible(&[], &[(2, 1)], 3);
        assert_eq!(kept(&v, &[(1, 1), (2, 1), (3, 1), (3, 2)]), [false, true, true, true]);
    }

    #[test]
    fn a_parent_is_kept_where_the_clone_branched_off() {
        let mut lineages = BTreeMap::new();
        lineages.insert(LineageId(1), Lineage { parent: None });
        lineages.insert(LineageId(2), Lineage { parent: Some((LineageId(1), Epoch(2))) });
        let family = Family {
            id: FamilyId(1),
            gmap: GmapId(1),
            stripe_unit: 1 << 20,
            shift: 0,
            revision: 1,
            lineages,
            next_lineage: LineageId(3),
        };
        let v = Visible::new(&family, std::iter::empty());
        assert_eq!(kept(&v, &[(1, 1), (1, 2), (1, 3)]), [false, true, false]);
        let ancestors: Vec<_> = family.ancestors(LineageId(2)).collect();
        assert_eq!(ancestors, [(LineageId(1), Epoch(2))]);
    }
}
