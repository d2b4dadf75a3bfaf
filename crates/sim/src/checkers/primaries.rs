//! At most one server acts as primary of a slot at a time (I1), and in one term never two.

use petal::ids::{SlotId, Term};
use std::collections::BTreeMap;

/// Who acts where.
#[derive(Default)]
pub struct Primaries {
    /// Now: by slot, host and term.
    acting: BTreeMap<SlotId, (usize, Term)>,
    /// Ever: by slot and term.
    ever: BTreeMap<(SlotId, Term), usize>,
}

impl Primaries {
    /// Looks at the slots in which a host acts now.
    pub fn see(&mut self, host: usize, slots: impl Iterator<Item = (SlotId, Term)>) -> Option<String> {
        self.forget(host);
        let mut complaint = None;
        for (slot, term) in slots {
            if let Some((other, its_term)) = self.acting.insert(slot, (host, term)) {
                complaint =
                    Some(format!("hosts {other} (term {its_term}) and {host} (term {term}) both act in {slot:?}"));
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
        self.acting.retain(|_, (who, _)| *who != host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::ids::GmapId;

    const SLOT: SlotId = SlotId { gmap: GmapId(1), slot: 3 };

    #[test]
    fn two_primaries_at_once_or_in_one_term_are_seen() {
        let mut p = Primaries::default();
        assert_eq!(p.see(0, [(SLOT, 5)].into_iter()), None);
        assert_eq!(p.see(0, [(SLOT, 6)].into_iter()), None);
        assert!(p.see(1, [(SLOT, 7)].into_iter()).is_some());
        p.forget(0);
        assert_eq!(p.see(1, [(SLOT, 7)].into_iter()), None);
        p.forget(1);
        assert!(p.see(0, [(SLOT, 7)].into_iter()).is_some());
    }
}
