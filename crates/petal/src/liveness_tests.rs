//! Tests of liveness: clusters of the global-state and the liveness room in virtual time, with clocks that
//! drift, servers that stop for a while, links that lose everything, crashes. What must hold: nobody holds a
//! lease when it is declared down, wherever that is applied first, nor ever again in that life.

use super::*;
use crate::global_state::Own;
use crate::global_state::{Genesis, GenesisServer, GlobalOutput};
use bytes::Bytes;
use stdx::{Duration, Prng};

type Write = (Bytes, Option<Bytes>);

#[allow(clippy::large_enum_variant)]
enum Event {
    Deliver { from: ServerId, to: ServerId, index: StateIndex, body: Body },
    Persisted { server: ServerId, life: u64, number: u64 },
    Refused { at: ServerId, server: ServerId },
    Start { server: ServerId },
    Resume { server: ServerId },
}

struct Life {
    room: GlobalState,
    liveness: Liveness,
}

struct Host {
    life: Option<Life>,
    lives: u64,
    durable: BTreeMap<Bytes, Bytes>,
    pending: VecDeque<(u64, Vec<Write>)>,
    /// Parts per million that its clock runs fast.
    drift: i64,
    origin: u64,
    /// It does not run until then; what arrives waits.
    stopped: bool,
    inbox: Vec<Event>,
    gained: u64,
}

struct Cluster {
    ring: u16,
    prng: Prng,
    now: Instant,
    hosts: BTreeMap<ServerId, Host>,
    events: BTreeMap<(Instant, u64), Event>,
    count: u64,
    messages: u64,
    /// Directions in which everything is lost.
    cut: BTreeSet<(ServerId, ServerId)>,
    last_arrival: BTreeMap<(ServerId, ServerId), Instant>,
    sabotage: Sabotage,
    /// Lives that were declared down, and when that was applied first.
    downs: BTreeMap<(ServerId, Incarnation), Instant>,
    suspicions: BTreeSet<(ServerId, StateIndex)>,
    violation: Option<String>,
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn s(n: u16) -> ServerId {
    ServerId(n)
}

impl Cluster {
    fn new(seed: u64, ring: u16, learners: u16, drift: i64, sabotage: Sabotage) -> Cluster {
        let mut cluster = Cluster {
            ring,
            prng: Prng::new(seed),
            now: Instant::from_nanos(1_000_000_000),
            hosts: BTreeMap::new(),
            events: BTreeMap::new(),
            count: 0,
            messages: 0,
            cut: BTreeSet::new(),
            last_arrival: BTreeMap::new(),
            sabotage,
            downs: BTreeMap::new(),
            suspicions: BTreeSet::new(),
            violation: None,
        };
        for id in 1..=ring + learners {
            let drift = cluster.prng.below(2 * drift as u64 + 1) as i64 - drift;
            let origin = cluster.prng.below(1 << 40);
            let host = Host {
                life: None,
                lives: 0,
                durable: BTreeMap::new(),
                pending: VecDeque::new(),
                drift,
                origin,
                stopped: false,
                inbox: Vec::new(),
                gained: 0,
            };
            cluster.hosts.insert(s(id), host);
        }
        for id in 1..=ring {
            cluster.start(s(id), ring);
        }
        cluster.run(millis(1500));
        for learner in ring + 1..=ring + learners {
            let command = Command::AddServer { addresses: vec!["h:1".into()], token: u128::from(learner) };
            let local = cluster.local(s(1));
            cluster.life(s(1)).room.propose_own(local, command);
            cluster.outputs(s(1));
            cluster.run(millis(100));
            cluster.start(s(learner), ring);
        }
        cluster.run(millis(1000));
        cluster
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.count += 1;
        self.events.insert((self.now + after, self.count), event);
    }

    fn host(&mut self, server: ServerId) -> &mut Host {
        self.hosts.get_mut(&server).expect("a server of the cluster")
    }

    fn life(&mut self, server: ServerId) -> &mut Life {
        self.host(server).life.as_mut().expect("it runs")
    }

    fn local(&self, server: ServerId) -> Instant {
        let host = &self.hosts[&server];
        let scaled = i128::from(self.now.as_nanos()) * i128::from(1_000_000 + host.drift) / 1_000_000;
        Instant::from_nanos(host.origin + scaled as u64)
    }

    /// When a host's clock shows `local`, or a little later.
    fn world(&self, server: ServerId, local: Instant) -> Instant {
        let host = &self.hosts[&server];
        let past = i128::from(local.as_nanos().saturating_sub(host.origin));
        Instant::from_nanos((past * 1_000_000 / i128::from(1_000_000 + host.drift) + 2) as u64)
    }

    fn start(&mut self, server: ServerId, ring: u16) {
        let (now, sabotage) = (self.local(server), self.sabotage);
        let member = |i| GenesisServer { server: s(i), addresses: vec![format!("h:{i}")] };
        let genesis = Genesis { cluster: ClusterId(1), name: "t".into(), ring: (1..=ring).map(member).collect() };
        let host = self.host(server);
        if host.life.is_some() {
            return;
        }
        host.lives += 1;
        (host.stopped, host.inbox) = (false, Vec::new());
        let incarnation = Incarnation(host.lives);
        let durable: Vec<(Bytes, Bytes)> = host.durable.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let proposer = u64::from(server.0) << 32 | host.lives;
        let own = Own { server, disks: BTreeSet::new(), votes_from: 0 };
        let mut room = GlobalState::open(own, &genesis, proposer, durable).expect("a crash damages nothing");
        let mut liveness = Liveness::new(now, server, incarnation, sabotage);
        let disks = vec![(DiskId(u128::from(server.0)), Incarnation(incarnation.0 - 1).into(), 1 << 30)];
        room.propose_own(now, Command::ServerUp { server, incarnation, addresses: vec![], disks });
        liveness.on_state(now, &mut room, false);
        host.life = Some(Life { room, liveness });
        for other in self.others(server) {
            for (a, b) in [(server, other), (other, server)] {
                let local = self.local(a);
                if self.hosts[&a].life.is_some() && self.hosts[&b].life.is_some() {
                    let life = self.life(a);
                    life.room.on_connected(local, b);
                    life.liveness.on_connected(local, &mut life.room, b);
                    self.outputs(a);
                }
            }
        }
        self.outputs(server);
    }

    fn others(&self, server: ServerId) -> Vec<ServerId> {
        self.hosts.keys().copied().filter(|other| *other != server).collect()
    }

    fn crash(&mut self, server: ServerId) {
        let keep = self.prng.next_u64();
        let host = self.host(server);
        if host.life.take().is_none() {
            return;
        }
        let writes: Vec<Write> = host.pending.drain(..).flat_map(|(_, writes)| writes).collect();
        let kept = (keep % (writes.len() as u64 + 1)) as usize;
        write(&mut host.durable, writes.into_iter().take(kept));
        for other in self.others(server) {
            if !self.cut.contains(&(server, other)) && !self.cut.contains(&(other, server)) {
                self.schedule(millis(1), Event::Refused { at: other, server });
            }
        }
    }

    fn stop(&mut self, server: ServerId, time: Duration) {
        if !std::mem::replace(&mut self.host(server).stopped, true) {
            self.schedule(time, Event::Resume { server });
        }
    }

    fn outputs(&mut self, server: ServerId) {
        let now = self.local(server);
        let mut led = None;
        loop {
            let host = self.host(server);
            let lives = host.lives;
            let Some(life) = &mut host.life else { return };
            let mut moved = false;
            let index = life.room.state().index;
            if let Some(output) = life.room.poll_output() {
                match output {
                    GlobalOutput::Send { to, body } => self.send(server, to, index, body),
                    GlobalOutput::Persist { number, writes } => {
                        host.pending.push_back((number, writes));
                        let after = Duration::from_micros(self.prng.between(50, 5000));
                        self.schedule(after, Event::Persisted { server, life: lives, number });
                    }
                    GlobalOutput::Applied { effects, .. } => {
                        if !effects.names.is_empty() {
                            life.liveness.on_state(now, &mut life.room, effects.names.contains(&server));
                        }
                        self.applied(server);
                    }
                    GlobalOutput::Jumped => {
                        life.liveness.on_state(now, &mut life.room, true);
                        self.applied(server);
                    }
                    GlobalOutput::Dial { .. } => {}
                }
                continue;
            }
            if led.replace(life.room.leads()) != Some(life.room.leads()) {
                life.liveness.on_state(now, &mut life.room, false);
                moved = true;
            }
            let index = life.room.state().index;
            if let Some(output) = life.liveness.poll_output() {
                moved = true;
                match output {
                    LivenessOutput::Send { to, body } => self.send(server, to, index, body),
                    LivenessOutput::LeaseGained => host.gained += 1,
                }
            }
            if !moved {
                break;
            }
        }
        self.life(server).liveness.check_invariants();
    }

    /// What must hold whenever somebody has applied something.
    fn applied(&mut self, at: ServerId) {
        let now = self.now;
        let state = self.life(at).room.state().clone();
        for (server, known) in &state.servers {
            if let Some(suspect) = known.suspect {
                self.suspicions.insert((*server, suspect));
            }
            if known.down {
                self.downs.entry((*server, known.incarnation)).or_insert(now);
            }
        }
        self.check();
    }

    fn check(&mut self) {
        for (server, incarnation) in self.downs.keys() {
            let host = &self.hosts[server];
            let Some(life) = host.life.as_ref().filter(|_| Incarnation(host.lives) == *incarnation) else { continue };
            if life.liveness.lease(self.local(*server)).is_some() {
                self.violation = Some(format!("{server} is down at {:?} and holds a lease", self.now));
            }
        }
    }

    fn send(&mut self, from: ServerId, to: ServerId, index: StateIndex, body: Body) {
        self.messages += 1;
        if self.cut.contains(&(from, to)) || self.hosts[&to].life.is_none() {
            return;
        }
        let delay = Duration::from_micros(self.prng.between(100, 3000));
        let earliest = self.last_arrival.get(&(from, to)).copied().unwrap_or_default();
        let arrival = (self.now + delay).max(earliest);
        self.last_arrival.insert((from, to), arrival);
        self.schedule(arrival.since(self.now), Event::Deliver { from, to, index, body });
    }

    fn on_event(&mut self, event: Event) {
        let ring = self.ring;
        let at = match &event {
            Event::Deliver { to, .. } => *to,
            Event::Persisted { server, .. } => *server,
            Event::Refused { at, .. } => *at,
            Event::Start { server } => return self.start(*server, ring),
            Event::Resume { server } => {
                let (server, inbox) = (*server, std::mem::take(&mut self.host(*server).inbox));
                self.host(server).stopped = false;
                inbox.into_iter().for_each(|event| self.on_event(event));
                return;
            }
        };
        if self.hosts[&at].stopped {
            return self.host(at).inbox.push(event);
        }
        let now = self.local(at);
        let host = self.host(at);
        let Some(life) = &mut host.life else { return };
        match event {
            Event::Deliver { from, index, body, .. } => {
                life.room.on_index(now, from, index);
                match body {
                    Body::Heartbeat(m) => life.liveness.on_heartbeat(now, &mut life.room, from, m),
                    Body::Grant(m) => life.liveness.on_grant(now, from, m),
                    body => life.room.on_message(now, from, body),
                }
            }
            Event::Persisted { life: lives, number, .. } => {
                while host.lives == lives && host.pending.front().is_some_and(|(n, _)| *n <= number) {
                    let (n, writes) = host.pending.pop_front().expect("looked at");
                    write(&mut host.durable, writes);
                    life.room.on_persisted(n);
                }
            }
            Event::Refused { server, .. } => {
                life.room.on_disconnected(now, server);
                life.liveness.on_disconnected(server);
                life.liveness.on_refused(now, &mut life.room, server);
            }
            Event::Start { .. } | Event::Resume { .. } => unreachable!("done above"),
        }
        self.outputs(at);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let timer = |server: &ServerId, host: &Host| {
                let life = host.life.as_ref().filter(|_| !host.stopped)?;
                let local = life.room.next_timeout().unwrap_or(life.liveness.next_timeout());
                Some((self.world(*server, local.min(life.liveness.next_timeout())), *server))
            };
            let timeout = self.hosts.iter().filter_map(|(server, host)| timer(server, host)).min();
            match (event, timeout) {
                (Some(at), t) if at <= end && t.is_none_or(|(t, _)| at <= t) => {
                    self.now = self.now.max(at);
                    let (_, event) = self.events.pop_first().expect("looked at");
                    self.on_event(event);
                }
                (_, Some((at, server))) if at <= end => {
                    self.now = self.now.max(at);
                    let now = self.local(server);
                    let life = self.life(server);
                    life.room.tick(now);
                    life.liveness.tick(now, &mut life.room);
                    self.outputs(server);
                }
                _ => break,
            }
            self.check();
        }
        self.now = end;
        self.check();
    }

    fn run_until(&mut self, most: Duration, mut what: impl FnMut(&mut Cluster) -> bool) -> Option<Duration> {
        let start = self.now;
        while self.now.since(start) <= most {
            if what(self) {
                return Some(self.now.since(start));
            }
            self.run(millis(1));
        }
        None
    }

    fn holds(&self, server: ServerId) -> bool {
        let life = self.hosts[&server].life.as_ref();
        life.is_some_and(|life| life.liveness.lease(self.local(server)).is_some())
    }

    fn leader(&mut self) -> ServerId {
        let leads = |host: &Host| host.life.as_ref().is_some_and(|life| life.room.leads() && !host.stopped);
        self.hosts.iter().find(|(_, host)| leads(host)).map(|(server, _)| *server).expect("somebody leads")
    }

    fn down(&self, server: ServerId) -> bool {
        self.downs.contains_key(&(server, Incarnation(self.hosts[&server].lives)))
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

fn kind(seed: u64) -> Cluster {
    Cluster::new(seed, 3, 1, 1000, Sabotage::None)
}

/// Any learner or follower, and one that leads.
fn roles(cluster: &mut Cluster) -> (ServerId, ServerId) {
    let leader = cluster.leader();
    (if leader == s(1) { s(2) } else { s(1) }, leader)
}

#[test]
fn everybody_holds_a_lease_and_nobody_is_suspected_while_nothing_happens() {
    for (ring, learners) in [(1, 0), (1, 2), (3, 0), (3, 1), (5, 2)] {
        let mut cluster = Cluster::new(1, ring, learners, 10_000, Sabotage::None);
        let before = cluster.messages;
        for _ in 0..5000 {
            cluster.run(millis(2));
            for server in 1..=ring + learners {
                assert!(cluster.holds(s(server)), "s{server} of {ring} + {learners}");
            }
        }
        assert_eq!(cluster.suspicions.len(), 0);
        let per_second = u64::from(ring + learners) * u64::from(ring) * 2 * 7 + u64::from(ring * ring) * 8;
        assert!(cluster.messages - before < per_second * 10, "{} messages", cluster.messages - before);
    }
}

#[test]
fn who_crashes_is_suspected_at_once_and_down_when_its_leases_are_over() {
    for seed in 0..20 {
        let mut cluster = kind(seed);
        let victim = if seed % 2 == 0 { s(4) } else { roles(&mut cluster).0 };
        cluster.crash(victim);
        let took = cluster.run_until(millis(3000), |c| c.down(victim)).expect("it is declared down");
        assert!((millis(1020)..millis(1080)).contains(&took), "seed {seed}: {took:?}");
    }
}

#[test]
fn when_the_leader_crashes_another_one_leads_at_once_and_declares_it_down() {
    for seed in 0..40 {
        let mut cluster = kind(seed);
        let (_, leader) = roles(&mut cluster);
        cluster.crash(leader);
        let leads = |c: &mut Cluster| c.hosts.values().any(|h| h.life.as_ref().is_some_and(|l| l.room.leads()));
        let took = cluster.run_until(millis(3000), leads).expect("somebody leads");
        assert!(took <= millis(100), "seed {seed}: {took:?} to another leader");
        let took = took + cluster.run_until(millis(3000), |c| c.down(leader)).expect("it is declared down");
        assert!(took <= millis(1200), "seed {seed}: {took:?} to its end");
    }
}

#[test]
fn who_stops_for_long_is_down_within_two_lease_times_and_knows_it_when_it_goes_on() {
    for seed in 0..20 {
        let mut cluster = kind(seed);
        let (follower, leader) = roles(&mut cluster);
        let victim = [s(4), follower, leader][seed as usize % 3];
        cluster.stop(victim, millis(4000));
        let took = cluster.run_until(millis(3000), |c| c.down(victim)).expect("it is declared down");
        assert!(took <= millis(1900), "seed {seed}: {took:?}");
        cluster.run(millis(5000));
        assert!(cluster.life(victim).room.state().servers[&victim].down);
        assert!(!cluster.holds(victim) && cluster.downs.len() == 1);
    }
}

#[test]
fn who_stops_for_less_than_a_lease_is_heard_again_and_goes_on() {
    for seed in 0..20 {
        let mut cluster = kind(seed);
        let (follower, _) = roles(&mut cluster);
        let victim = [s(4), follower][seed as usize % 2];
        cluster.stop(victim, millis(900));
        cluster.run(millis(899));
        assert_eq!(cluster.suspicions.len(), 1, "it was suspected");
        let took = cluster.run_until(millis(500), |c| c.holds(victim)).expect("it holds a lease again");
        assert!(took <= millis(60), "seed {seed}: {took:?}");
        cluster.run(millis(3000));
        assert!(cluster.downs.is_empty() && cluster.holds(victim));
    }
}

#[test]
fn a_leader_that_was_stopped_suspects_nobody_when_it_goes_on() {
    for seed in 0..20 {
        let mut cluster = kind(seed);
        let (_, leader) = roles(&mut cluster);
        cluster.stop(leader, millis(3000));
        cluster.run(millis(6000));
        let accused: BTreeSet<ServerId> = cluster.suspicions.iter().map(|(server, _)| *server).collect();
        assert!(accused.iter().all(|server| *server == leader), "seed {seed}: {accused:?}");
    }
}

#[test]
fn one_broken_link_suspects_nobody() {
    for seed in 0..12 {
        let mut cluster = kind(seed);
        let pairs = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)];
        let (a, b) = pairs[seed as usize % 6];
        cluster.cut.insert((s(a), s(b)));
        if seed < 6 {
            cluster.cut.insert((s(b), s(a)));
        }
        cluster.run(millis(5000));
        assert_eq!(cluster.suspicions.len(), 0, "s{a} - s{b}");
        assert!((1..=4).all(|server| cluster.holds(s(server))), "s{a} - s{b}");
    }
}

/// A firewall between the two answers every connection with a reset.
fn refuse_each_other(cluster: &mut Cluster, a: ServerId, b: ServerId) {
    cluster.cut.extend([(a, b), (b, a)]);
    for after in [20, 60, 200, 1000, 3000] {
        cluster.schedule(millis(after), Event::Refused { at: a, server: b });
        cluster.schedule(millis(after), Event::Refused { at: b, server: a });
    }
}

#[test]
fn a_firewall_that_refuses_for_one_server_suspects_nobody_whom_others_hear() {
    for seed in 0..12 {
        let mut cluster = kind(seed);
        let (follower, leader) = roles(&mut cluster);
        let other = [s(4), follower][seed as usize % 2];
        refuse_each_other(&mut cluster, leader, other);
        cluster.run(millis(5000));
        assert_eq!(cluster.suspicions.len(), 0, "seed {seed}: {leader} and {other} refuse each other");
        assert!((1..=4).all(|server| cluster.holds(s(server))), "seed {seed}");
    }
}

#[test]
fn who_refuses_a_majority_of_the_ring_is_suspected_at_once() {
    for seed in 0..12 {
        let mut cluster = kind(seed);
        let (follower, leader) = roles(&mut cluster);
        for member in [leader, follower] {
            refuse_each_other(&mut cluster, member, s(4));
        }
        let took = cluster.run_until(millis(500), |c| c.suspicions.len() == 1).expect("it is suspected");
        assert!(took <= millis(60), "seed {seed}: {took:?}");
    }
}

#[test]
fn who_speaks_and_does_not_hear_is_as_good_as_silent() {
    let mut cluster = kind(3);
    for member in 1..=3 {
        cluster.cut.insert((s(member), s(4)));
    }
    cluster.run(millis(4000));
    assert!(cluster.down(s(4)));
}

#[test]
fn without_a_majority_of_the_ring_nobody_is_declared_down_and_leases_end() {
    let mut cluster = kind(5);
    let leader = cluster.leader();
    let others: Vec<ServerId> = (1..=3).map(s).filter(|m| *m != leader).collect();
    others.iter().for_each(|member| cluster.crash(*member));
    cluster.run(millis(5000));
    assert!(cluster.downs.is_empty() && !cluster.holds(s(4)) && !cluster.holds(leader));
    others.iter().for_each(|member| cluster.start(*member, 3));
    cluster.run(millis(5000));
    assert!((1..=4).all(|server| cluster.holds(s(server))));
    assert!(cluster.downs.is_empty(), "who came back was not declared down: {:?}", cluster.downs);
}

/// Everything at once; tells what was violated, and how many were declared down.
fn walk(seed: u64, sabotage: Sabotage) -> (Option<String>, usize) {
    let mut prng = Prng::new(seed ^ 0x11fe);
    let ring = *prng.pick(&[1, 3, 3, 3, 5]);
    let mut cluster = Cluster::new(seed, ring, 1 + prng.below(2) as u16, 10_000, sabotage);
    let servers = cluster.hosts.len() as u64;
    for _ in 0..60 {
        let server = s(prng.between(1, servers) as u16);
        let other = s(prng.between(1, servers) as u16);
        match prng.below(12) {
            0 => {
                cluster.crash(server);
                cluster.schedule(millis(prng.between(1, 3000)), Event::Start { server });
            }
            1..=3 => cluster.stop(server, millis(prng.between(100, 2500))),
            4..=6 if server != other => drop(cluster.cut.insert((server, other))),
            7 => {
                for other in cluster.others(server) {
                    cluster.cut.extend([(server, other), (other, server)]);
                }
            }
            _ => cluster.cut.clear(),
        }
        cluster.run(millis(prng.below(900)));
        if cluster.violation.is_some() {
            break;
        }
        // Who knows that it is down starts again, or not so soon.
        for server in cluster.hosts.keys().copied().collect::<Vec<_>>() {
            let knows = |life: &Life| life.room.state().servers.get(&server).is_some_and(|s| s.down);
            if cluster.hosts[&server].life.as_ref().is_some_and(knows) && prng.chance(1, 2) {
                cluster.crash(server);
                cluster.schedule(millis(prng.between(1, 100)), Event::Start { server });
            }
        }
    }
    (cluster.violation, cluster.downs.len())
}

#[test]
fn in_any_walk_nobody_holds_a_lease_when_it_is_declared_down() {
    let seeds = std::env::var("LIVENESS_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let mut downs = 0;
    for seed in 0..seeds {
        let (violation, down) = walk(seed, Sabotage::None);
        assert_eq!(violation, None, "seed {seed}");
        downs += down as u64;
    }
    assert!(downs > seeds, "{downs} were declared down");
}

#[test]
fn must_fail_a_server_declared_down_by_an_older_suspicion() {
    assert!((0..400).any(|seed| walk(seed, Sabotage::DownWithoutSuspectIndex).0.is_some()));
}

/// Counterexample F2. The leader and one follower suspect s4, which the third member goes on to hear. The
/// follower does not learn for a while that what it accepted is decided. Tells what was violated.
fn accepted_and_not_known_to_be_decided(seed: u64, sabotage: Sabotage) -> Option<String> {
    let mut cluster = Cluster::new(seed, 3, 1, 10_000, sabotage);
    // The clocks' phases drift apart.
    cluster.run(millis(seed * 2000));
    let leader = cluster.leader();
    let others: Vec<ServerId> = (1..=3).map(s).filter(|m| *m != leader).collect();
    let (follower, third) = (others[0], others[1]);
    for (a, b) in [(leader, third), (follower, third), (leader, s(4))] {
        cluster.cut.extend([(a, b), (b, a)]);
    }
    let accepts = |c: &mut Cluster| c.life(follower).room.accepted().forbidden.contains(&s(4));
    for _ in 0..40_000 {
        if accepts(&mut cluster) {
            break;
        }
        cluster.run(Duration::from_micros(50));
    }
    assert!(accepts(&mut cluster), "seed {seed}: a follower accepts before it knows what is decided");
    cluster.cut.insert((leader, follower));
    // Shorter than a round of the ring's own heartbeats: else another one leads, and waits anew.
    cluster.run(millis(160));
    cluster.cut.remove(&(leader, follower));
    for (a, b) in [(leader, follower), (follower, leader)] {
        let local = cluster.local(a);
        let life = cluster.life(a);
        life.room.on_connected(local, b);
        life.liveness.on_connected(local, &mut life.room, b);
        cluster.outputs(a);
    }
    cluster.run_until(millis(3000), |c| c.down(s(4))).expect("it is declared down");
    cluster.violation
}

#[test]
fn a_member_heeds_what_it_accepted_before_it_knows_that_it_is_decided() {
    for seed in 0..30 {
        assert_eq!(accepted_and_not_known_to_be_decided(seed, Sabotage::None), None);
    }
}

#[test]
fn must_fail_a_member_that_grants_by_what_it_has_applied() {
    assert!((0..30).any(|seed| accepted_and_not_known_to_be_decided(seed, Sabotage::GrantByAppliedLog).is_some()));
}
