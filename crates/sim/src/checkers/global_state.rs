//! The global state is the same on every server at the same index, and at rest the index is the same too.

use crate::host::ServerHost;
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
    let states: Vec<_> = servers.iter().filter_map(|s| s.life.as_ref()).map(|l| &l.server).collect();
    let Some(newest) = states.iter().map(|s| s.state().index).max() else { return Vec::new() };
    let behind = states.iter().filter(|s| s.state().index < newest);
    behind.map(|s| format!("{} rests at index {}, others at {newest}", s.id(), s.state().index)).collect()
}
