//! GMap: which servers hold an offset (paper 2.1). Global, immutable, shared by many families.

use crate::ids::{ELEMENT_SIZE, GmapId, ServerId};
use serde::{Deserialize, Serialize};

/// How many copies, and how they are laid out (paper 2.4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Scheme {
    /// One copy, striped.
    Striped,
    /// Two copies, chained declustering.
    Chained,
    /// Three copies, chained.
    Chained3,
}

impl Scheme {
    /// Copies of each byte.
    pub fn copies(self) -> usize {
        match self {
            Scheme::Striped => 1,
            Scheme::Chained => 2,
            Scheme::Chained3 => 3,
        }
    }
}

/// An immutable map from slots to ordered tuples of servers. Who of them is in sync is kept apart
/// (`global_state::SlotState`), because that changes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gmap {
    /// Its id.
    pub id: GmapId,
    /// The scheme.
    pub scheme: Scheme,
    /// A power of two of tuples, first member first.
    pub slots: Vec<Vec<ServerId>>,
}

/// Slot of an element: `(offset / stripe_unit + shift) mod slots`.
pub fn slot_of_element(element: u64, stripe_unit: u64, shift: u32, slots: u32) -> u32 {
    debug_assert!(slots.is_power_of_two());
    let unit = element / (stripe_unit / ELEMENT_SIZE);
    (unit.wrapping_add(u64::from(shift)) & u64::from(slots - 1)) as u32
}

impl Gmap {
    /// Every server that appears in a tuple, ascending.
    pub fn servers(&self) -> std::collections::BTreeSet<ServerId> {
        self.slots.iter().flatten().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_stripe_units_go_to_consecutive_slots_and_wrap() {
        let unit = 1 << 20;
        let per_unit = unit / ELEMENT_SIZE;
        assert_eq!(slot_of_element(0, unit, 0, 256), 0);
        assert_eq!(slot_of_element(per_unit - 1, unit, 0, 256), 0);
        assert_eq!(slot_of_element(per_unit, unit, 0, 256), 1);
        assert_eq!(slot_of_element(per_unit * 256, unit, 0, 256), 0);
        assert_eq!(slot_of_element(per_unit * 2, unit, 255, 256), 1);
    }

    #[test]
    fn the_largest_element_with_the_largest_shift_has_a_slot() {
        assert!(slot_of_element(u64::MAX, ELEMENT_SIZE, u32::MAX, 1 << 16) < 1 << 16);
    }

    #[test]
    fn after_a_doubling_an_element_is_in_its_old_slot_or_in_that_plus_the_old_count() {
        for element in (0..100_000).step_by(37) {
            let old = slot_of_element(element, ELEMENT_SIZE, 12345, 256);
            let new = slot_of_element(element, ELEMENT_SIZE, 12345, 512);
            assert!(new == old || new == old + 256);
        }
    }
}
