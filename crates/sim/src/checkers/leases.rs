//! Nobody holds a lease who is declared down, as soon as that is applied anywhere (2.5): its successors may act.

use crate::counters::{Counters, Kind};
use crate::host::ServerHost;
use petal::global_state::State;
use petal::ids::{Incarnation, ServerId, StateIndex};
use std::collections::BTreeSet;
use stdx::Instant;

/// What was seen, to count it once.
#[derive(Default)]
pub struct Leases {
    suspicions: BTreeSet<(ServerId, StateIndex)>,
    downs: BTreeSet<(ServerId, Incarnation)>,
}

impl Leases {
    /// Looks at what a server that was just stepped has applied, and at those that it knows to be down.
    pub fn see(
        &mut self,
        now: Instant,
        state: &State,
        servers: &[ServerHost],
        counters: &mut Counters,
    ) -> Option<String> {
        for (id, known) in &state.servers {
            if known.suspect.is_some_and(|suspect| self.suspicions.insert((*id, suspect))) {
                counters.count(Kind::Suspected);
            }
            if known.down && self.downs.insert((*id, known.incarnation)) {
                counters.count(Kind::DeclaredDown);
            }
        }
        for (id, incarnation) in &self.downs {
            let Some(host) = servers.iter().find(|host| host.id == Some(*id)) else { continue };
            let Some(life) = host.life.as_ref().filter(|l| l.server.incarnation() == *incarnation) else { continue };
            if life.server.lease_until().is_some_and(|until| until > host.clock.local(now)) {
                return Some(format!("{id} ({incarnation}) was declared down and holds a lease"));
            }
        }
        None
    }
}
