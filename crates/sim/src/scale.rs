//! A large cluster's global state, made by commands alone: what it costs to have 1,000 servers and 100,000 disks (design
//! 2.13).
//!
//! No server runs here. The state is what every server holds, and what is asked of it is what servers ask: to apply the
//! loss of one server, to plan without it, to encode it for one that comes late. `petal-scale` measures times with it; the
//! test at the foot only counts.

use bytes::BytesMut;
use petal::global_state::{
    Attachment, Command, CommandError, Effects, Entry, Genesis, GenesisServer, Outcome, State, StateError,
};
use petal::ids::{ClusterId, DiskId, GmapId, Incarnation, ServerId, VdiskId};
use petal::limits::HEARTBEAT;
use petal::message::{Body, CommandId, Grant, Heartbeat, Message};
use petal::mover::next_step;
use petal::translator::gmap::Scheme;

/// Members of the ring.
pub const RING: u16 = 3;
/// Bytes of each server's disk.
const CAPACITY: u64 = 8 << 40;

/// A state that grows by commands.
pub struct Scale {
    /// The state.
    pub state: State,
}

impl Scale {
    /// Servers that are up, and no disk.
    pub fn with_servers(servers: u16) -> Scale {
        let address = |s: u16| format!("10.{}.{}.{}:7000", s >> 12, (s >> 6) & 63, s & 63);
        let ring = (1..=RING.min(servers)).map(|s| GenesisServer { server: ServerId(s), addresses: vec![address(s)] });
        let genesis = Genesis { cluster: ClusterId(1), name: "scale".into(), ring: ring.collect() };
        let mut scale = Scale { state: State::genesis(&genesis) };
        for s in RING + 1..=servers {
            let added = scale.run(Command::AddServer { addresses: vec![address(s)], token: u128::from(s) });
            assert_eq!(added.0, Ok(Outcome::Server(ServerId(s))));
        }
        for s in 1..=servers {
            let disks = vec![(DiskId(u128::from(s)), Incarnation(0).into(), CAPACITY)];
            let (server, incarnation, addresses) = (ServerId(s), Incarnation(1), vec![address(s)]);
            scale.run(Command::ServerUp { server, incarnation, addresses, disks }).0.expect("it is a server");
        }
        scale
    }

    /// So many disks more, of two copies.
    pub fn add_disks(&mut self, disks: u32) {
        for _ in 0..disks {
            let name = format!("disk-{:06}", self.state.vdisks.len());
            let create = Command::CreateDisk { name, size: 64 << 30, scheme: Scheme::Chained, stripe_unit: 1 << 20 };
            self.run(create).0.expect("there is room for a disk");
        }
    }

    /// Applies a command.
    pub fn run(&mut self, command: Command) -> (Result<Outcome, CommandError>, Effects) {
        let number = self.state.index + 1;
        self.state.apply(&Entry { id: CommandId { proposer: 1, number, finished_below: number }, command })
    }

    /// The GMap of the disks.
    pub fn gmap(&self) -> GmapId {
        *self.state.gmaps.keys().next().expect("there are disks")
    }

    /// Attaches a disk for one client.
    pub fn attach(&mut self, vdisk: VdiskId) -> Effects {
        let holder = "nbd@client:1".into();
        let (result, effects) =
            self.run(Command::Attach { vdisk, mode: Attachment::Exclusive, holder, take_over: false });
        result.expect("nobody has it");
        effects
    }

    /// The ring suspects a server and declares it down; what the second command changed.
    pub fn lose(&mut self, server: ServerId) -> Effects {
        let incarnation = self.state.servers[&server].incarnation;
        self.run(Command::Suspect { server, incarnation }).0.expect("it was up");
        let suspect = self.state.index;
        let (result, effects) = self.run(Command::ServerDown { server, incarnation, suspect });
        result.expect("it is suspected");
        effects
    }

    /// Its data is to be made anew by the others: the plan.
    pub fn plan_without(&mut self, server: ServerId) -> Command {
        self.run(Command::Drain { server, drained: true }).0.expect("others are left");
        next_step(&self.state, self.gmap()).expect("all others are up")
    }

    /// Bytes of a heartbeat and of its answer, frames and all, at this state.
    pub fn heartbeat_bytes(&self) -> (usize, usize) {
        let length = |body| {
            let mut out = BytesMut::new();
            let message = Message { state_index: self.state.index, body };
            petal_wire::encode(&message, petal_wire::VERSION, &mut out).expect("it is short");
            out.len()
        };
        // Of a server that has been up for a year, and hears everybody.
        let sequence = 365 * 86_400_000 / HEARTBEAT.as_millis() as u64;
        let (incarnation, applied) = (Incarnation(1), self.state.index);
        let asks = Heartbeat { incarnation, sequence, applied, answered: sequence - 1, silent: Vec::new() };
        let grant = Grant { sequence, configuration: self.state.ring.id, granted: true };
        (length(Body::Heartbeat(asks)), length(Body::Grant(grant)))
    }

    /// The state as it travels, and read again.
    pub fn encode(&self) -> Vec<u8> {
        self.state.encode()
    }

    /// A state that came.
    pub fn decode(bytes: &[u8]) -> Result<State, StateError> {
        State::decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_loss_of_a_server_concerns_its_slots_only_and_moves_its_copies() {
        let mut scale = Scale::with_servers(20);
        scale.add_disks(200);
        let gmap = scale.gmap();
        assert_eq!((scale.state.vdisks.len(), scale.state.gmaps.len()), (200, 1));
        let slots = scale.state.gmaps[&gmap].slots.len();
        assert_eq!(slots, 2048, "64 for each of 20 servers, rounded up to a power of two");
        assert_eq!(Scale::decode(&scale.encode()).unwrap(), scale.state);

        let lost = ServerId(7);
        let had: Vec<u32> = scale.state.slots_of_server(lost).map(|(id, _)| id.slot).collect();
        assert!(had.len().abs_diff(2 * slots / 20) <= 2, "{}", had.len());
        let effects = scale.lose(lost);
        assert_eq!(effects.slots.iter().map(|id| id.slot).collect::<Vec<_>>(), had);
        assert_eq!(scale.state.complaint(), None);

        let plan = scale.plan_without(lost);
        let Command::Reconfigure { moves, more, .. } = &plan else { panic!("{plan:?}") };
        let moving: Vec<u32> = moves.iter().map(|(slot, _)| *slot).collect();
        assert!(had.iter().all(|slot| moving.contains(slot)));
        let count = moving.len();
        assert!(count <= had.len() + had.len() / 10 + 4, "what else moves makes it even: {count}, {}", had.len());
        assert!(!more && moves.iter().all(|(_, tuple)| !tuple.contains(&lost)));
        let mut held = BTreeMap::<ServerId, usize>::new();
        let after: BTreeMap<u32, _> = moves.iter().cloned().collect();
        for (number, tuple) in (0..).zip(&scale.state.gmaps[&gmap].slots) {
            let tuple = after.get(&number).unwrap_or(tuple);
            tuple.iter().for_each(|s| *held.entry(*s).or_default() += 1);
        }
        assert_eq!(held.len(), 19);
        assert!(held.values().all(|n| n.abs_diff(2 * slots / 19) <= 2), "{held:?}");
        scale.run(plan).0.unwrap();
        let Some(Command::Fence { slots: fenced, .. }) = next_step(&scale.state, gmap) else {
            panic!("nothing is fenced")
        };
        assert_eq!(fenced.len(), count / 20, "one in twenty of those that move");
    }

    #[test]
    fn what_a_server_says_to_be_heard_does_not_grow_with_the_cluster() {
        let bytes = |servers, disks| {
            let mut scale = Scale::with_servers(servers);
            scale.add_disks(disks);
            scale.heartbeat_bytes()
        };
        let (small, large) = (bytes(4, 1), bytes(40, 400));
        // Of numbers that are longer: the state index, twice in a heartbeat, once in its answer.
        assert!(large.0 - small.0 <= 2 && large.1 - small.1 <= 1, "{small:?} {large:?}");
    }

    #[test]
    fn attaching_a_disk_waits_for_the_servers_of_its_map_once_each() {
        let mut scale = Scale::with_servers(20);
        scale.add_disks(2);
        let vdisk = *scale.state.vdisks.keys().next().unwrap();
        let effects = scale.attach(vdisk);
        assert_eq!(effects.concerned, (1..=20).map(ServerId).collect::<Vec<_>>());
        assert!(effects.slots.is_empty() && effects.names.is_empty());
    }
}
