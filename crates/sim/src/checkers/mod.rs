//! What must hold, one file each.
pub mod linearizability;
