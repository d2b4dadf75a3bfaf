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
