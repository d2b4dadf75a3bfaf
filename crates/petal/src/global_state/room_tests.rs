//! Tests of the room: whole clusters of rooms in virtual time, with loss, broken connections and crashes.

use super::*;
use crate::global_state::state::tests::genesis;
use crate::global_state::{Attachment, Outcome};
use crate::translator::gmap::Scheme;
use stdx::Prng;

type Write = (Bytes, Option<Bytes>);

/// What is going to happen.
#[allow(clippy::large_enum_variant, reason = "a test's queue is short")]
enum Event {
    Deliver { from: ServerId, to: ServerId, connection: u64, index: StateIndex, body: Body },
    Persisted { server: ServerId, life: u64, number: u64 },
    Connect { a: ServerId, b: ServerId },
    Start { server: ServerId },
}

/// One server: its room, its durable metadata, and writes on their way there.
struct Host {
    room: Option<GlobalState>,
    life: u64,
    durable: BTreeMap<Bytes, Bytes>,
    pending: VecDeque<(u64, Vec<Write>)>,
    /// Index told last by `Applied`, in this life.
    applied: StateIndex,
    jumps: u64,
    /// Its disks are gone: it does not start.
    lost: bool,
    /// The configuration from which on it may vote, and its disks: it was made anew.
    votes_from: u32,
    disks: BTreeSet<DiskId>,
}

/// How unkind the world is.
#[derive(Clone, Copy)]
struct World {
    delay: (u64, u64),
    disk: (u64, u64),
    /// Of a thousand messages, so many are lost without a trace.
    loss: u64,
}

const KIND: World = World { delay: (1000, 1000), disk: (1000, 1000), loss: 0 };

struct Cluster {
    prng: Prng,
    now: Instant,
    world: World,
    ring: u16,
    hosts: BTreeMap<ServerId, Host>,
    events: BTreeMap<(Instant, u64), Event>,
    event_count: u64,
    /// Number of the present connection of a pair, smaller id first.
    connections: BTreeMap<(ServerId, ServerId), u64>,
    /// No message of a connection overtakes another.
    last_arrival: BTreeMap<(ServerId, ServerId), Instant>,
    connection_count: u64,
    /// Commands insisted on.
    insisted: u64,
    log: BTreeMap<StateIndex, CommandId>,
    /// Whose disk takes seconds for every write.
    hangs: Option<ServerId>,
}

fn pair(a: ServerId, b: ServerId) -> (ServerId, ServerId) {
    (a.min(b), a.max(b))
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

impl Cluster {
    /// `ring` members and as many learners that the ring does not know yet.
    fn new(seed: u64, ring: u16, learners: u16, world: World) -> Cluster {
        let mut cluster = Cluster {
            prng: Prng::new(seed),
            now: Instant::ZERO,
            world,
            ring,
            hosts: BTreeMap::new(),
            events: BTreeMap::new(),
            event_count: 0,
            connections: BTreeMap::new(),
            last_arrival: BTreeMap::new(),
            connection_count: 0,
            insisted: 0,
            log: BTreeMap::new(),
            hangs: None,
        };
        for id in 1..=ring + learners {
            let host = Host {
                room: None,
                life: 0,
                durable: BTreeMap::new(),
                pending: VecDeque::new(),
                applied: 0,
                jumps: 0,
                lost: false,
                votes_from: 0,
                disks: BTreeSet::from([DiskId(u128::from(id))]),
            };
            cluster.hosts.insert(ServerId(id), host);
            cluster.start(ServerId(id));
        }
        cluster
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.event_count += 1;
        self.events.insert((self.now + after, self.event_count), event);
    }

    fn micros(&mut self, (low, high): (u64, u64)) -> Duration {
        Duration::from_micros(self.prng.between(low, high))
    }

    fn host(&mut self, server: ServerId) -> &mut Host {
        self.hosts.get_mut(&server).expect("a server of the cluster")
    }

    fn room(&mut self, server: u16) -> &mut GlobalState {
        self.host(ServerId(server)).room.as_mut().expect("it is up")
    }

    fn start(&mut self, server: ServerId) {
        let genesis = genesis(self.ring);
        let host = self.host(server);
        if host.room.is_some() || host.lost {
            return;
        }
        host.life += 1;
        let durable: Vec<(Bytes, Bytes)> = host.durable.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let proposer = u64::from(server.0) << 32 | host.life;
        let own = Own { server, disks: host.disks.clone(), votes_from: host.votes_from };
        let room = GlobalState::open(own, &genesis, proposer, durable).expect("a crash damages nothing");
        host.applied = room.state().index;
        host.room = Some(room);
        for other in self.hosts.keys().copied().filter(|o| *o != server).collect::<Vec<_>>() {
            let after = self.micros((0, 5000));
            self.schedule(after, Event::Connect { a: server, b: other });
        }
        self.outputs(server);
    }

    fn crash(&mut self, server: ServerId) {
        for other in self.hosts.keys().copied().filter(|o| *o != server).collect::<Vec<_>>() {
            self.disconnect(server, other);
        }
        let keep = self.prng.next_u64();
        let host = self.host(server);
        host.room = None;
        let writes: Vec<Write> = host.pending.drain(..).flat_map(|(_, writes)| writes).collect();
        let kept = (keep % (writes.len() as u64 + 1)) as usize;
        write(&mut host.durable, writes.into_iter().take(kept));
        let after = millis(self.prng.between(1, 1500));
        self.schedule(after, Event::Start { server });
    }

    fn connect(&mut self, a: ServerId, b: ServerId) {
        if self.connections.contains_key(&pair(a, b)) || self.hosts[&a].room.is_none() || self.hosts[&b].room.is_none()
        {
            return;
        }
        self.connection_count += 1;
        self.connections.insert(pair(a, b), self.connection_count);
        let now = self.now;
        for (me, other) in [(a, b), (b, a)] {
            self.room(me.0).on_connected(now, other);
            self.outputs(me);
        }
    }

    fn disconnect(&mut self, a: ServerId, b: ServerId) {
        if self.connections.remove(&pair(a, b)).is_none() {
            return;
        }
        let now = self.now;
        for (me, other) in [(a, b), (b, a)] {
            if let Some(room) = &mut self.host(me).room {
                room.on_disconnected(now, other);
                self.outputs(me);
            }
        }
        let after = millis(self.prng.between(1, 300));
        self.schedule(after, Event::Connect { a, b });
    }

    /// Carries out what a room wants.
    fn outputs(&mut self, server: ServerId) {
        if let Some(room) = &self.host(server).room {
            room.check_invariants();
        }
        loop {
            let host = self.host(server);
            let Some(room) = &mut host.room else { return };
            let Some(output) = room.poll_output() else { return };
            let (index, life) = (room.state().index, host.life);
            match output {
                GlobalOutput::Send { to, body } => self.on_send(server, to, index, body),
                GlobalOutput::Persist { number, writes } => {
                    host.pending.push_back((number, writes));
                    let after = if self.hangs == Some(server) { millis(4000) } else { self.micros(self.world.disk) };
                    self.schedule(after, Event::Persisted { server, life, number });
                }
                GlobalOutput::Applied { index, id, .. } => {
                    assert_eq!(index, host.applied + 1, "{server} skips");
                    host.applied = index;
                    assert_eq!(*self.log.entry(index).or_insert(id), id, "{server} has another entry {index}");
                }
                GlobalOutput::Jumped => {
                    // Outputs are put together before they are taken: the entries behind are told next.
                    host.applied = index
                        - room.outputs.iter().filter(|o| matches!(o, GlobalOutput::Applied { .. })).count() as u64;
                    host.jumps += 1;
                }
                GlobalOutput::Dial { .. } => {}
            }
        }
    }

    fn on_send(&mut self, from: ServerId, to: ServerId, index: StateIndex, body: Body) {
        let Some(connection) = self.connections.get(&pair(from, to)).copied() else { return };
        if self.prng.below(1000) < self.world.loss {
            return;
        }
        let delay = self.micros(self.world.delay);
        let earliest = self.last_arrival.get(&(from, to)).copied().unwrap_or_default();
        let arrival = (self.now + delay).max(earliest);
        self.last_arrival.insert((from, to), arrival);
        self.schedule(arrival.since(self.now), Event::Deliver { from, to, connection, index, body });
    }

    fn on_event(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Deliver { from, to, connection, index, body } => {
                if self.connections.get(&pair(from, to)) == Some(&connection) {
                    let room = self.room(to.0);
                    room.on_index(now, from, index);
                    room.on_message(now, from, body);
                    self.outputs(to);
                }
            }
            Event::Persisted { server, life, number } => {
                let host = self.host(server);
                if host.life != life || host.room.is_none() {
                    return;
                }
                // In order: whatever was before it is stable with it.
                while host.pending.front().is_some_and(|(n, _)| *n <= number) {
                    let (n, writes) = host.pending.pop_front().expect("looked at");
                    write(&mut host.durable, writes);
                    host.room.as_mut().expect("checked").on_persisted(n);
                }
                self.outputs(server);
            }
            Event::Connect { a, b } => self.connect(a, b),
            Event::Start { server } => self.start(server),
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let timer = |host: &Host| host.room.as_ref().and_then(GlobalState::next_timeout);
            let timeout = self.hosts.iter().filter_map(|(s, h)| timer(h).map(|at| (at, *s))).min();
            match (event, timeout) {
                (Some(at), t) if at <= end && t.is_none_or(|(t, _)| at <= t) => {
                    self.now = self.now.max(at);
                    let (_, event) = self.events.pop_first().expect("looked at");
                    self.on_event(event);
                }
                (_, Some((at, server))) if at <= end => {
                    self.now = self.now.max(at);
                    let now = self.now;
                    self.room(server.0).tick(now);
                    self.outputs(server);
                }
                _ => break,
            }
        }
        self.now = end;
    }

    /// Proposes at a server and waits until that server knows the result.
    fn execute(&mut self, server: u16, command: Command) -> Outcome {
        let now = self.now;
        let id = self.room(server).propose_own(now, command);
        self.outputs(ServerId(server));
        for _ in 0..20_000 {
            if let Some((_, result)) = self.room(server).state().result(&id) {
                return result.clone().expect("a good command");
            }
            self.run(Duration::from_micros(500));
        }
        panic!("{id:?} was not decided in 10 s");
    }

    /// Two servers up and a disk, made through `server`.
    fn with_disk(&mut self, server: u16) -> VdiskId {
        for s in 1..=self.ring.min(2) {
            let up = Command::ServerUp {
                server: ServerId(s),
                incarnation: Incarnation(1),
                addresses: vec![],
                disks: vec![(DiskId(u128::from(s)), Incarnation(0).into(), 1 << 30)],
            };
            self.execute(server, up);
        }
        let scheme = if self.ring == 1 { Scheme::Striped } else { Scheme::Chained };
        let create = Command::CreateDisk { name: "a".into(), size: 1 << 30, scheme, stripe_unit: 1 << 20 };
        match self.execute(server, create) {
            Outcome::Disk(disk) => disk,
            other => panic!("{other:?}"),
        }
    }

    /// Some server that runs, after a while perhaps.
    fn wait_for_other(&mut self, than: ServerId) -> u16 {
        for _ in 0..10_000 {
            let up = self.hosts.iter().find(|(s, h)| **s != than && h.room.is_some());
            if let Some((server, _)) = up {
                return server.0;
            }
            self.run(millis(1));
        }
        panic!("nobody comes back");
    }

    /// Asks until it is done, whoever crashes meanwhile.
    fn insist(&mut self, not: ServerId, command: &Command) {
        self.insisted += 1;
        let id = CommandId { proposer: 77, number: self.insisted, finished_below: self.insisted };
        for _ in 0..400 {
            let at = self.wait_for_other(not);
            if let Some((_, result)) = self.room(at).state().result(&id) {
                result.clone().expect("a good command");
                return;
            }
            let now = self.now;
            self.room(at).propose(now, id, command.clone());
            self.outputs(ServerId(at));
            self.run(millis(50));
            self.heartbeats();
        }
        panic!("{command:?} was not decided in 20 s: {}", self.describe());
    }

    /// Every server tells all others its index, as heartbeats do.
    fn heartbeats(&mut self) {
        let now = self.now;
        for (a, b) in self.connections.keys().copied().collect::<Vec<_>>() {
            for (from, to) in [(a, b), (b, a)] {
                let index = self.room(from.0).state().index;
                self.room(to.0).on_index(now, from, index);
                self.outputs(to);
            }
        }
    }

    fn describe(&self) -> String {
        let of = |(server, host): (&ServerId, &Host)| match &host.room {
            Some(room) => format!(
                "{server}: index {} of {}, configuration {}, member: {}, leader {:?}, peers {:?}. ",
                room.state.index,
                room.accepted_end(),
                room.configuration,
                room.is_member(),
                room.leader(),
                room.peers
            ),
            None => format!("{server} is down. "),
        };
        self.hosts.iter().map(of).collect()
    }

    /// A server loses everything, is made anew and comes back; a second one crashes while the ring changes.
    fn replace(&mut self, server: ServerId) {
        self.crash(server);
        let host = self.host(server);
        host.lost = true;
        host.durable.clear();
        // Who lags knows of older lives.
        while self.hosts.iter().any(|(s, h)| *s != server && h.room.is_none()) {
            self.run(millis(10));
        }
        let states = self.hosts.values().filter_map(|h| h.room.as_ref()).map(GlobalState::state);
        let known = states.max_by_key(|s| s.index).expect("others are up").servers[&server].clone();
        let incarnation = Incarnation(known.incarnation.0 + 1);
        let mut found: Vec<_> = known.disks.keys().map(|d| (*d, known.incarnation.into(), 1)).collect();
        if found.is_empty() {
            found.push((DiskId(u128::from(server.0)), Incarnation(0).into(), 1));
        }
        self.insist(server, &Command::ServerUp { server, incarnation, addresses: vec![], disks: found });
        let disks = vec![DiskId(u128::from(self.prng.next_u64()))];
        let new: BTreeSet<DiskId> = disks.iter().copied().collect();
        self.insist(server, &Command::Goodbye { server, incarnation });
        let other = ServerId(self.wait_for_other(server));
        let replace = Command::ReplaceDisks { server, incarnation, disks, votes_lost: true, accept_data_loss: true };
        if self.prng.chance(1, 2) {
            let now = self.now;
            let number = self.insisted + 1;
            let id = CommandId { proposer: 77, number, finished_below: number };
            self.room(other.0).propose(now, id, replace.clone());
            self.outputs(other);
            let moment = self.micros((0, 100_000));
            self.run(moment);
            let victim = ServerId(self.wait_for_other(server));
            self.crash(victim);
        }
        self.insist(server, &replace);
        let states = self.hosts.values().filter_map(|h| h.room.as_ref()).map(|r| r.state().ring.id);
        let votes_from = states.max().expect("others are up");
        let host = self.host(server);
        (host.votes_from, host.disks) = (votes_from, new);
        self.host(server).lost = false;
        self.start(server);
    }

    fn assert_equal(&mut self) {
        let first = self.room(1).state().clone();
        for (server, host) in &self.hosts {
            let state = host.room.as_ref().expect("up").state();
            assert_eq!(state.index, first.index, "{server} lags");
            assert_eq!(*state, first, "{server} differs");
        }
    }
}

fn write(durable: &mut BTreeMap<Bytes, Bytes>, writes: impl IntoIterator<Item = Write>) {
    for (key, value) in writes {
        match value {
            Some(value) => durable.insert(key, value),
            None => durable.remove(&key),
        };
    }
}

fn own(server: u16) -> Own {
    Own { server: ServerId(server), disks: BTreeSet::from([DiskId(u128::from(server))]), votes_from: 0 }
}

fn attach(vdisk: VdiskId) -> Command {
    Command::Attach { vdisk, mode: Attachment::ReadOnly, holder: "h".into(), take_over: false }
}

/// Until every server knows who leads.
fn time_to_leader(cluster: &mut Cluster) -> Duration {
    let start = cluster.now;
    while !(1..=4).all(|s| cluster.hosts[&ServerId(s)].room.as_ref().is_some_and(|room| room.leader().is_some())) {
        cluster.run(millis(1));
    }
    cluster.now.since(start)
}

#[test]
fn a_ring_of_three_finds_a_leader_soon() {
    for seed in 0..20 {
        let mut cluster = Cluster::new(seed, 3, 1, KIND);
        let fresh = time_to_leader(&mut cluster);
        assert!(fresh <= millis(400), "seed {seed}: {fresh:?} when new");
        cluster.with_disk(1);
        for server in 1..=4 {
            cluster.crash(ServerId(server));
        }
        cluster.run(millis(1));
        while cluster.hosts.values().any(|host| host.room.is_none()) {
            cluster.run(millis(1));
        }
        let again = time_to_leader(&mut cluster);
        assert!(again <= millis(1200), "seed {seed}: {again:?} after a restart of all");
    }
}

#[test]
fn when_the_leader_stops_another_one_leads_within_a_second_and_a_half() {
    for seed in 0..20 {
        let mut cluster = Cluster::new(seed, 3, 1, KIND);
        let disk = cluster.with_disk(1);
        cluster.run(millis(2000));
        let leader = cluster.room(1).leader().expect("there is one");
        let start = cluster.now;
        cluster.crash(leader);
        // It comes back at once, or stays away for a while; the others do not wait.
        let other = if leader == ServerId(1) { 2 } else { 1 };
        cluster.execute(other, attach(disk));
        let took = cluster.now.since(start);
        assert!(took <= millis(1500), "seed {seed}: {took:?}");
    }
}

#[test]
fn a_leader_whose_disk_hangs_does_not_keep_what_a_majority_has_from_being_applied() {
    for seed in 0..20 {
        let mut cluster = Cluster::new(seed, 3, 1, KIND);
        let disk = cluster.with_disk(1);
        cluster.run(millis(2000));
        let leader = cluster.room(1).leader().expect("there is one");
        cluster.hangs = Some(leader);
        let start = cluster.now;
        let other = if leader == ServerId(1) { 2 } else { 1 };
        cluster.execute(other, attach(disk));
        let took = cluster.now.since(start);
        // Soon enough that leases are granted again before they end: after half of one they are refused.
        assert!(took <= millis(1000), "seed {seed}: {took:?}");
    }
}

#[test]
fn a_room_can_be_moved_to_another_thread() {
    fn moves<T: Send>() {}
    moves::<GlobalState>();
}

#[test]
fn a_command_of_any_server_is_applied_everywhere_within_milliseconds() {
    let mut cluster = Cluster::new(1, 3, 1, KIND);
    let disk = cluster.with_disk(4);
    for server in 1..=4 {
        cluster.run(millis(170));
        let start = cluster.now;
        cluster.execute(server, attach(disk));
        let took = cluster.now.since(start);
        // Propose, append beside accept, accepted, decide or push: at most 5 ms of the network and 2 of disks.
        assert!(took <= millis(8), "s{server}: {took:?}");
        cluster.run(millis(3));
        cluster.assert_equal();
    }
}

#[test]
fn a_ring_of_one_decides_alone_and_its_learners_follow() {
    let mut cluster = Cluster::new(2, 1, 2, KIND);
    let disk = cluster.with_disk(3);
    let start = cluster.now;
    cluster.execute(2, attach(disk));
    assert!(cluster.now.since(start) <= millis(4));
    cluster.run(millis(3));
    cluster.assert_equal();
    cluster.crash(ServerId(1));
    cluster.run(millis(3000));
    cluster.execute(3, attach(disk));
    cluster.run(millis(3));
    cluster.assert_equal();
}

#[test]
fn a_ring_of_one_without_learners_is_idle() {
    let mut cluster = Cluster::new(2, 1, 0, KIND);
    cluster.with_disk(1);
    cluster.run(millis(100));
    assert_eq!(cluster.room(1).next_timeout(), None);
}

#[test]
fn an_idle_ring_sends_few_messages_and_writes_nothing() {
    let mut cluster = Cluster::new(2, 3, 1, KIND);
    cluster.with_disk(1);
    cluster.run(millis(3000));
    let (events, records) = (cluster.event_count, cluster.hosts[&ServerId(1)].durable.len());
    cluster.run(millis(10_000));
    let per_second = (cluster.event_count - events) / 10;
    assert!(per_second <= 45, "{per_second} messages per second");
    assert_eq!(cluster.hosts[&ServerId(1)].durable.len(), records);
}

#[test]
fn a_learner_that_was_away_for_long_gets_the_state_itself() {
    let mut cluster = Cluster::new(3, 3, 1, KIND);
    let disk = cluster.with_disk(1);
    cluster.run(millis(100));
    cluster.hosts.get_mut(&ServerId(4)).unwrap().room = None;
    for other in 1..=3 {
        cluster.connections.remove(&(ServerId(other), ServerId(4)));
    }
    for _ in 0..3 * LOG_KEEP {
        let now = cluster.now;
        cluster.room(1).propose_own(now, Command::Noop);
    }
    cluster.outputs(ServerId(1));
    cluster.run(millis(3000));
    cluster.execute(1, attach(disk));
    cluster.start(ServerId(4));
    cluster.run(millis(100));
    cluster.assert_equal();
    assert_eq!(cluster.hosts[&ServerId(4)].jumps, 1);
}

#[test]
fn everything_restarts_at_once_and_nothing_decided_is_gone() {
    let mut cluster = Cluster::new(4, 3, 1, KIND);
    let disk = cluster.with_disk(1);
    cluster.execute(4, attach(disk));
    let index = cluster.room(4).state().index;
    for server in 1..=4 {
        cluster.crash(ServerId(server));
    }
    cluster.run(millis(6000));
    cluster.execute(2, attach(disk));
    cluster.run(millis(100));
    cluster.assert_equal();
    assert!(cluster.room(1).state().index > index);
}

#[test]
fn a_server_that_comes_up_elsewhere_is_dialled_there() {
    let mut room = GlobalState::open(own(1), &genesis(1), 1, Vec::new()).unwrap();
    let command = Command::AddServer { addresses: vec!["h:1".into()], token: 1 };
    room.propose_own(Instant::ZERO, command);
    let mut dials = Vec::new();
    while let Some(output) = room.poll_output() {
        match output {
            GlobalOutput::Persist { number, .. } => room.on_persisted(number),
            GlobalOutput::Dial { server, addresses } => dials.push((server, addresses)),
            _ => {}
        }
    }
    assert_eq!(dials, [(ServerId(2), vec!["h:1".to_string()])]);
}

#[test]
fn a_monster_of_a_command_is_not_proposed() {
    let mut room = GlobalState::open(own(1), &genesis(1), 1, Vec::new()).unwrap();
    room.propose_own(Instant::ZERO, Command::AddServer { addresses: vec!["x".repeat(COMMAND_MAX)], token: 1 });
    assert_eq!(room.proposals.len(), 0);
}

#[test]
fn a_command_is_as_long_as_an_entry_may_be_and_no_longer() {
    let deletion = |count| Command::DeleteDisks { vdisks: vec![VdiskId::made_by(1 << 40, 0); count] };
    let empty = postcard::to_stdvec(&deletion(0)).unwrap().len();
    let each = postcard::to_stdvec(&deletion(1)).unwrap().len() - empty;
    let most = (COMMAND_MAX - empty - 2) / each; // The count takes two bytes more then.
    assert_eq!(check_length(&deletion(most)), Ok(()));
    let bytes = postcard::to_stdvec(&deletion(most + 1)).unwrap().len();
    assert_eq!(check_length(&deletion(most + 1)), Err(CommandError::TooLong { bytes, limit: COMMAND_MAX }));
}

#[test]
fn messages_that_make_no_sense_change_nothing() {
    let mut cluster = Cluster::new(5, 3, 1, KIND);
    cluster.with_disk(1);
    cluster.run(millis(100));
    let before = cluster.room(2).state().clone();
    let now = cluster.now;
    let noop = Entry { id: CommandId { proposer: 1, number: 1, finished_below: 1 }, command: Command::Noop };
    let hostile = [
        Body::Entries(message::Entries { from: u64::MAX, entries: vec![noop.clone()] }),
        Body::Entries(message::Entries { from: 0, entries: vec![noop] }),
        Body::Snapshot(message::Snapshot { state: vec![1, 2, 3] }),
        Body::Snapshot(message::Snapshot { state: State::genesis(&genesis(3)).encode() }),
        Body::Learn(message::Learn { from: u64::MAX }),
        Body::Ring(message::Ring { configuration: 9, bytes: vec![0; 9] }),
        Body::Index,
    ];
    for body in hostile {
        cluster.room(2).on_index(now, ServerId(4), u64::MAX);
        cluster.room(2).on_message(now, ServerId(4), body);
        cluster.outputs(ServerId(2));
    }
    assert_eq!(*cluster.room(2).state(), before);
    cluster.run(millis(2000));
    cluster.assert_equal();
}

/// Commands from everywhere while servers crash, connections break and messages are lost; then quiet.
fn storm(seed: u64, replaced: bool) -> (Cluster, u64) {
    let mut prng = Prng::new(seed ^ 0x5eed);
    let world = World {
        delay: (100, prng.between(200, 60_000)),
        disk: (100, prng.between(200, 40_000)),
        loss: prng.below(3) * prng.below(20),
    };
    let ring = *prng.pick(&[3, 3, 3, 1]);
    let mut cluster = Cluster::new(seed, ring, 1 + u16::from(ring == 1), world);
    let disk = cluster.with_disk(1);
    let servers = cluster.hosts.len() as u64;
    let mut number = 0;
    for _ in 0..60 {
        let at = prng.between(1, servers) as u16;
        match prng.below(10) {
            0 if replaced && ring == 3 && at <= ring && prng.chance(1, 2) => cluster.replace(ServerId(at)),
            0 => cluster.crash(ServerId(at)),
            1 => {
                let other = at as u64 % servers + 1;
                cluster.disconnect(ServerId(at), ServerId(other as u16));
            }
            _ => {
                // Like a client that asks two servers.
                number += 1;
                let id = CommandId { proposer: 99, number, finished_below: 1 };
                for at in [at, prng.between(1, servers) as u16] {
                    let now = cluster.now;
                    if let Some(room) = &mut cluster.host(ServerId(at)).room {
                        room.propose(now, id, attach(disk));
                        cluster.outputs(ServerId(at));
                    }
                }
            }
        }
        cluster.run(millis(prng.below(400)));
    }
    cluster.world.loss = 0;
    cluster.run(millis(20_000));
    // What a server forgot by crashing is proposed again by whoever wants it.
    for number in 1..=number {
        let id = CommandId { proposer: 99, number, finished_below: 1 };
        let now = cluster.now;
        cluster.room(ring).propose(now, id, attach(disk));
    }
    cluster.outputs(ServerId(ring));
    cluster.run(millis(10_000));
    let state = cluster.room(1).state();
    assert_eq!(state.vdisk(disk).unwrap().sessions.len() as u64, number, "seed {seed}: each exactly once");
    cluster.assert_equal();
    (cluster, number)
}

#[test]
fn in_any_storm_every_command_is_executed_once_and_all_servers_agree() {
    let seeds = std::env::var("ROOM_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let mut commands = 0;
    for seed in 0..seeds {
        commands += storm(seed, false).1;
    }
    assert!(commands > 20 * seeds);
}

/// 2.4: what it voted is gone, so it takes part again only in a configuration in which it has not voted.
#[test]
fn a_ring_member_that_lost_its_votes_is_a_member_of_the_next_configuration() {
    let mut cluster = Cluster::new(7, 3, 1, KIND);
    let disk = cluster.with_disk(1);
    for server in [1, 2, 3, 1] {
        cluster.replace(ServerId(server));
        cluster.run(millis(3000));
        cluster.execute(server, attach(disk));
        assert!(cluster.room(server).is_member());
        // The others lean on its vote.
        let other = server % 3 + 1;
        cluster.crash(ServerId(other));
        cluster.execute(server, attach(disk));
        cluster.run(millis(5000));
        cluster.assert_equal();
    }
    assert_eq!(cluster.room(4).state().ring.id, 5);
}

/// The state after server 1 of a ring of three lost its votes and was given these disks, one after the other.
fn made_anew_with(given: &[u128]) -> State {
    let mut state = State::genesis(&genesis(3));
    let server = ServerId(1);
    let mut run = |command: Command| {
        let number = state.index + 1;
        state.apply(&Entry { id: CommandId { proposer: 5, number, finished_below: number }, command }).0.unwrap();
    };
    let mut present = 1;
    for (life, disk) in (1..).zip(given) {
        let incarnation = Incarnation(life);
        let disks = vec![(DiskId(present), Incarnation(life - 1).into(), 1 << 30)];
        run(Command::ServerUp { server, incarnation, addresses: vec![], disks });
        run(Command::Goodbye { server, incarnation });
        let disks = vec![DiskId(*disk)];
        run(Command::ReplaceDisks { server, incarnation, disks, votes_lost: true, accept_data_loss: true });
        present = *disk;
    }
    state
}

#[test]
fn who_runs_on_other_disks_than_the_state_names_votes_in_no_configuration_that_begins() {
    // Whoever starts the old disk of server 1 has the votes that it gave in the first configuration, and only those.
    let open = |disk: u128, votes_from| {
        let own = Own { disks: BTreeSet::from([DiskId(disk)]), votes_from, ..own(1) };
        GlobalState::open(own, &genesis(3), 9, Vec::new()).expect("nothing is damaged")
    };
    let mut old = open(1, 0);
    assert!(old.is_member());
    old.jump(made_anew_with(&[2]));
    assert!(!old.is_member(), "the new disk has perhaps voted in the second");
    old.jump(made_anew_with(&[2, 3]));
    assert!(!old.is_member(), "nor in the third");
    // The state comes to name its disk again: what others voted in its place is lost by command.
    old.jump(made_anew_with(&[2, 3, 1]));
    assert!(old.is_member());

    let mut new = open(2, 2);
    assert!(!new.is_member(), "the first configuration was voted in by the old one");
    new.jump(made_anew_with(&[2]));
    assert!(new.is_member());
    new.jump(made_anew_with(&[2, 3]));
    assert!(!new.is_member(), "now another one has its place");

    // Its disk is named already, but it may vote from a later configuration on only.
    let mut later = open(2, 3);
    later.jump(made_anew_with(&[2]));
    assert!(!later.is_member());
}

#[test]
fn in_any_storm_with_members_made_anew_all_servers_agree() {
    let seeds = std::env::var("ROOM_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let mut changes = 0;
    for seed in 1000..1000 + seeds {
        eprintln!("seed {seed}");
        let (mut cluster, _) = storm(seed, true);
        changes += cluster.room(1).state().ring.id - 1;
    }
    assert!(u64::from(changes) >= seeds, "{changes} configurations began");
}

#[test]
fn the_same_storm_ends_the_same() {
    let run = || {
        let (cluster, _) = storm(11, true);
        let durable: Vec<_> = cluster.hosts.into_values().map(|h| h.durable).collect();
        (cluster.log, cluster.event_count, durable)
    };
    assert_eq!(run(), run());
}
