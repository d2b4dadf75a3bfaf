//! At most one server acts as primary of a slot at a time (I1), and in one term never two.

use petal::ids::{SlotId, Term};
use std::collections::BTreeMap;
use stdx::Instant;

/// Who acts where.
#[derive(Default)]
pub struct Primaries {
    /// By slot: host, term, and until when its lease lets it act.
    acting: BTreeMap<SlotId, Vec<(usize, Term, Instant)>>,
    /// Ever: by slot and term.
    ever: BTreeMap<(SlotId, Term), usize>,
}

impl Primaries {
    /// Looks at the slots in which a host acts now, if it has a lease: without one it does nothing (2.5).
    pub fn see(
        &mut self,
        host: usize,
        now: Instant,
        lease: Instant,
        slots: impl Iterator<Item = (SlotId, Term)>,
    ) -> Option<String> {
        self.forget(host);
        let mut complaint = None;
        for (slot, term) in slots {
            let acting = self.acting.entry(slot).or_default();
            acting.retain(|(_, _, until)| *until > now);
            if lease > now {
                if let Some((other, its_term, _)) = acting.first() {
                    complaint =
                        Some(format!("hosts {other} (term {its_term}) and {host} (term {term}) both act in {slot:?}"));
                }
                acting.push((host, term, lease));
            }
            let first = *self.ever.entry((slot, term)).or_insert(host);
            if first != host {
                complaint = Some(format!("hosts {first} and {host} have both acted in {slot:?} in term {term}"));
            }
        }
        complaint
    }

    /// A host is dead.
    pub fn forget(&mut self, host: usize) {
        for acting in self.acting.values_mut() {
            acting.retain(|(who, ..)| *who != host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::ids::GmapId;

    const SLOT: SlotId = SlotId { gmap: GmapId(1), slot: 3 };

    #[test]
    fn two_primaries_at_once_or_in_one_term_are_seen() {
        let at = Instant::from_nanos;
        let mut p = Primaries::default();
        assert_eq!(p.see(0, at(1), at(10), [(SLOT, 5)].into_iter()), None);
        assert_eq!(p.see(0, at(1), at(10), [(SLOT, 6)].into_iter()), None);
        assert!(p.see(1, at(2), at(20), [(SLOT, 7)].into_iter()).is_some());
        p.forget(0);
        assert_eq!(p.see(1, at(3), at(20), [(SLOT, 7)].into_iter()), None);
        assert_eq!(p.see(2, at(20), at(30), [(SLOT, 8)].into_iter()), None, "the lease is over");
        p.forget(1);
        assert!(p.see(0, at(40), at(50), [(SLOT, 7)].into_iter()).is_some());
    }
}
