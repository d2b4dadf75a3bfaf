//! The desk: management calls that clients of this server wait for.
//!
//! A call is answered when its command is applied here (then a majority of the ring has it on stable
//! storage), and, where it narrows what data messages may do, when every server has *settled* it (2.1):
//! has applied it, and has finished or refused what it had begun before. A server that is declared down
//! meanwhile is not waited for; then every server that is left must have settled *that* command. At the deadline the answer says
//! what is known: not decided, or accepted but not settled, and for whom it waits.

use crate::global_state::{CommandError, Outcome};
use crate::ids::*;
use crate::message::*;
use crate::server::{ClientId, Output, Peer};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::Instant;

/// Commands that clients of one server may wait for.
const CALLS_MAX: usize = 4096;
/// Clients that may wait for the same one: it is asked for again when a connection broke.
const ASKERS_MAX: usize = 16;

/// What an applied command came to.
pub type CommandResult = Result<Outcome, CommandError>;

/// The desk.
#[derive(Debug, Default)]
pub struct Desk {
    calls: BTreeMap<(u64, u64), Call>,
}

#[derive(Debug)]
struct Call {
    askers: Vec<(ClientId, Tag)>,
    deadline: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Deciding,
    /// `index`: of the command; `settles`: what these servers must have settled.
    Settling {
        index: StateIndex,
        outcome: Outcome,
        settles: StateIndex,
        waits: BTreeSet<ServerId>,
    },
}

impl Desk {
    /// A client waits for a command; false if so many are waited for that this one is not taken.
    pub fn expect(&mut self, client: ClientId, tag: Tag, id: CommandId, deadline: Instant) -> bool {
        let is_known = self.calls.get(&(id.proposer, id.number)).map(|call| call.askers.len() < ASKERS_MAX);
        if !is_known.unwrap_or(self.calls.len() < CALLS_MAX) {
            return false;
        }
        let call = self.calls.entry((id.proposer, id.number)).or_insert(Call {
            askers: Vec::new(),
            deadline,
            stage: Stage::Deciding,
        });
        call.deadline = call.deadline.max(deadline);
        call.askers.push((client, tag));
        true
    }

    /// A command was applied. With `settle_at` its callers wait until these servers have settled that index;
    /// returned if somebody does (then the caller asks the servers).
    pub fn on_executed(
        &mut self,
        id: CommandId,
        index: StateIndex,
        result: CommandResult,
        settle_at: Option<(StateIndex, Vec<ServerId>)>,
        out: &mut VecDeque<Output>,
    ) -> Option<StateIndex> {
        let key = (id.proposer, id.number);
        let call = self.calls.get_mut(&key)?;
        if let Stage::Settling { settles, .. } = call.stage {
            return Some(settles); // Asked for again: the servers are asked again too.
        }
        match (result, settle_at) {
            (Ok(outcome), Some((settles, servers))) if !servers.is_empty() => {
                call.stage = Stage::Settling { index, outcome, settles, waits: servers.into_iter().collect() };
                Some(settles)
            }
            (result, _) => {
                let call = self.calls.remove(&key).expect("just found");
                let answer = result
                    .map(|outcome| AdminResponse::Executed { index, outcome, unsettled: Vec::new() })
                    .map_err(AdminError::Refused);
                reply(call.askers, answer, index, out);
                None
            }
        }
    }

    /// A server has settled an index.
    pub fn on_settled(&mut self, server: ServerId, settled: StateIndex, out: &mut VecDeque<Output>) {
        for call in self.calls.values_mut() {
            if let Stage::Settling { settles, waits, .. } = &mut call.stage
                && *settles == settled
            {
                waits.remove(&server);
            }
        }
        self.answer(|call| matches!(&call.stage, Stage::Settling { waits, .. } if waits.is_empty()), &[], out);
    }

    /// These servers are down by the command `index`, and these are left. Returns whom to ask to settle that
    /// command.
    pub fn on_downs(&mut self, index: StateIndex, downs: &[ServerId], left: &[ServerId]) -> Vec<ServerId> {
        let mut asks = false;
        for call in self.calls.values_mut() {
            if let Stage::Settling { settles, waits, .. } = &mut call.stage
                && downs.iter().any(|down| waits.contains(down))
            {
                *settles = index;
                *waits = left.iter().copied().collect();
                asks = true;
            }
        }
        if asks { left.to_vec() } else { Vec::new() }
    }

    /// Indices that a server has still to settle: asked for again when its connection is new.
    pub fn unsettled_at(&self, server: ServerId) -> Vec<StateIndex> {
        let waits = |call: &Call| match &call.stage {
            Stage::Settling { settles, waits, .. } if waits.contains(&server) => Some(*settles),
            _ => None,
        };
        self.calls.values().filter_map(waits).collect()
    }

    /// Calls whose deadline has passed are answered with what is known. Returns the commands that nobody waits for any
    /// more and that are not decided.
    pub fn tick(&mut self, now: Instant, ring: &[ServerId], out: &mut VecDeque<Output>) -> Vec<CommandId> {
        let is_over = |call: &Call| call.deadline <= now;
        let undecided = |call: &Call| is_over(call) && matches!(call.stage, Stage::Deciding);
        let given_up = self.calls.iter().filter(|(_, call)| undecided(call)).map(|(key, _)| id_of(*key)).collect();
        self.answer(is_over, ring, out);
        given_up
    }

    fn answer(&mut self, which: impl Fn(&Call) -> bool, ring: &[ServerId], out: &mut VecDeque<Output>) {
        let keys: Vec<(u64, u64)> = self.calls.iter().filter(|(_, c)| which(c)).map(|(key, _)| *key).collect();
        for key in keys {
            let call = self.calls.remove(&key).expect("just listed");
            let (answer, at) = match call.stage {
                Stage::Deciding => (Err(AdminError::NotDecided { ring: ring.to_vec() }), 0),
                Stage::Settling { index, outcome, waits, .. } => {
                    let unsettled = waits.into_iter().collect();
                    (Ok(AdminResponse::Executed { index, outcome, unsettled }), index)
                }
            };
            reply(call.askers, answer, at, out);
        }
    }

    /// Commands that somebody waits for.
    pub fn waiting(&self) -> Vec<CommandId> {
        self.calls.keys().copied().map(id_of).collect()
    }

    /// A client has gone; nobody waits for its calls any more, the commands go on.
    pub fn on_client_gone(&mut self, client: ClientId) {
        for call in self.calls.values_mut() {
            call.askers.retain(|(asker, _)| *asker != client);
        }
        self.calls.retain(|_, call| !call.askers.is_empty());
    }

    /// The next deadline.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.calls.values().map(|c| c.deadline).min()
    }
}

fn id_of((proposer, number): (u64, u64)) -> CommandId {
    CommandId { proposer, number, finished_below: 0 }
}

fn reply(
    askers: Vec<(ClientId, Tag)>,
    result: Result<AdminResponse, AdminError>,
    state_index: StateIndex,
    out: &mut VecDeque<Output>,
) {
    for (client, tag) in askers {
        let body = Body::AdminReply(AdminReply { tag, result: result.clone() });
        out.push_back(Output::Send { to: Peer::Client(client), message: Message { state_index, body } });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stdx::Duration;

    const ID: CommandId = CommandId { proposer: 1, number: 1, finished_below: 1 };

    fn settling() -> (Desk, VecDeque<Output>) {
        let (mut desk, mut out) = (Desk::default(), VecDeque::new());
        let _ = desk.expect(7, 1, ID, Instant::ZERO + Duration::from_secs(10));
        let servers = vec![ServerId(1), ServerId(2), ServerId(3)];
        assert_eq!(desk.on_executed(ID, 20, Ok(Outcome::Done), Some((20, servers)), &mut out), Some(20));
        (desk, out)
    }

    #[test]
    fn a_call_is_answered_when_every_server_has_settled_its_command() {
        let (mut desk, mut out) = settling();
        for server in [1, 2, 3] {
            assert!(out.is_empty());
            desk.on_settled(ServerId(server), 20, &mut out);
        }
        assert_eq!(out.len(), 1);
    }

    #[test]
    fn who_is_down_is_not_waited_for_but_all_others_must_have_settled_that() {
        let (mut desk, mut out) = settling();
        desk.on_settled(ServerId(1), 20, &mut out);
        let left = [ServerId(1), ServerId(2)];
        assert_eq!(desk.on_downs(25, &[ServerId(3)], &left), left);
        assert_eq!(desk.unsettled_at(ServerId(1)), [25], "it has settled the command, not the end of s3");
        desk.on_settled(ServerId(2), 20, &mut out);
        desk.on_settled(ServerId(1), 25, &mut out);
        assert!(out.is_empty());
        desk.on_settled(ServerId(2), 25, &mut out);
        assert_eq!(out.len(), 1);
    }

    #[test]
    fn more_calls_than_can_be_kept_are_refused_until_others_have_ended() {
        let (mut desk, mut out) = (Desk::default(), VecDeque::new());
        let id = |number| CommandId { number, ..ID };
        let deadline = Instant::ZERO + Duration::from_secs(10);
        assert!((0..CALLS_MAX as u64).all(|number| desk.expect(7, number, id(number), deadline)));
        assert!(!desk.expect(7, 1 << 20, id(1 << 20), deadline));
        assert!((1..ASKERS_MAX as u64).all(|tag| desk.expect(8, tag, id(5), deadline)), "more may ask for the same");
        assert!(!desk.expect(9, 1, id(5), deadline));
        desk.on_executed(id(5), 20, Ok(Outcome::Done), None, &mut out);
        assert_eq!(out.len(), ASKERS_MAX);
        assert!(desk.expect(7, 1 << 20, id(1 << 20), deadline));
    }

    #[test]
    fn the_end_of_a_server_that_nobody_waits_for_changes_nothing() {
        let (mut desk, _) = settling();
        assert_eq!(desk.on_downs(25, &[ServerId(9)], &[ServerId(1)]), []);
        assert_eq!(desk.unsettled_at(ServerId(3)), [20]);
    }
}
