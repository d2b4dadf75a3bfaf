//! What must hold, one file each. Some look at every step, some at the end, some at the history.
//!
//! Bounded queues have no file: `check_invariants` of every core is called after every step, and
//! asserts the bounds of `petal::limits`.

pub mod addresses;
pub mod copies;
pub mod durability;
pub mod global_state;
pub mod leases;
pub mod linearizability;
pub mod primaries;
pub mod progress;
pub mod snapshots;

use crate::families::Families;
use petal::server::Server;
use stdx::Instant;

/// The checkers that look at every step of a server.
#[derive(Default)]
pub struct Checkers {
    /// Equal states at equal indexes.
    pub states: global_state::States,
    /// No lease of who is down.
    pub leases: leases::Leases,
    /// One primary per slot.
    pub primaries: primaries::Primaries,
    /// What the log says of families.
    pub families: Families,
}

impl Checkers {
    /// Looks at a server that has just been stepped.
    /// `now` and `lease` (the end of the server's lease) are times of the world.
    pub fn see_server(&mut self, host: usize, server: &Server, now: Instant, lease: Instant) -> Option<String> {
        if let Some(state) = server.state() {
            self.families.see(state);
        }
        let differs = server.state().and_then(|state| self.states.see(host, state));
        differs.or_else(|| self.primaries.see(host, now, lease, server.data().serving()))
    }
}
