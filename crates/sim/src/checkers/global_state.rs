//! The global state is the same on every server at the same index, and at rest the index is the same too.

use crate::host::{ServerHost, ServerLife};
use petal::global_state::State;
use petal::ids::StateIndex;
use std::collections::BTreeMap;

/// What the state was at each index, by hash, and who showed it first.
#[derive(Default)]
pub struct States {
    seen: BTreeMap<StateIndex, (u32, usize)>,
    /// Index at which each host was last looked at.
    at: BTreeMap<usize, StateIndex>,
}

impl States {
    /// Looks at a host's state if its index is another than last time.
    pub fn see(&mut self, host: usize, state: &State) -> Option<String> {
        if self.at.insert(host, state.index) == Some(state.index) {
            return None;
        }
        let sum = sum(state);
        let (first_sum, first_host) = *self.seen.entry(state.index).or_insert((sum, host));
        (first_sum != sum)
            .then(|| format!("the state at index {} differs between host {first_host} and host {host}", state.index))
    }
}

fn sum(state: &State) -> u32 {
    let bytes = postcard::to_stdvec(state).expect("a state can always be written");
    stdx::checksum::crc32c(&bytes)
}

/// At rest every running server has applied the same entries.
pub fn all_equal(servers: &[ServerHost]) -> Vec<String> {
    let index = |life: &ServerLife| (life.server.id(), life.server.state().map_or(0, |s| s.index));
    let all: Vec<_> = servers.iter().filter_map(|s| s.life.as_ref()).map(index).collect();
    let newest = all.iter().map(|(_, index)| *index).max().unwrap_or(0);
    let behind = all.iter().filter(|(_, index)| *index < newest);
    behind.map(|(server, index)| format!("{server} rests at index {index}, others at {newest}")).collect()
}
