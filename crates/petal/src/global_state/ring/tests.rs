//! Tests of the ring: one member's durability, and random walks of three with crashes at every point.

use super::*;
use crate::global_state::state::tests::genesis;
use crate::global_state::{Command, State};
use crate::ids::{DiskId, Incarnation};
use crate::limits::RING_VALUE_MAX;
use crate::message::CommandId;
use expect_test::expect;
use std::cell::Cell;
use stdx::Prng;

thread_local! {
    static BROKEN: Cell<Option<Broken>> = const { Cell::new(None) };
}

/// Whether this test's thread has switched the rule off.
pub(super) fn broken(rule: Broken) -> bool {
    BROKEN.get() == Some(rule)
}

fn noop(number: u64) -> Entry {
    Entry { id: CommandId { proposer: 1, number, finished_below: number }, command: Command::Noop }
}

/// A disk: what is durable, and writes on their way to it.
#[derive(Default)]
struct Disk {
    durable: BTreeMap<Bytes, Bytes>,
    pending: VecDeque<(u64, Vec<Write>)>,
}

impl Disk {
    fn write(&mut self, writes: impl IntoIterator<Item = Write>) {
        for (key, value) in writes {
            match value {
                Some(value) => self.durable.insert(key, value),
                None => self.durable.remove(&key),
            };
        }
    }
    fn content(&self) -> Vec<(Bytes, Bytes)> {
        self.durable.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
    /// A crash: of the writes on their way, a prefix survives.
    fn crash(&mut self, prng: &mut Prng) {
        let all: Vec<Write> = self.pending.drain(..).flat_map(|(_, writes)| writes).collect();
        let kept = prng.below(all.len() as u64 + 1) as usize;
        self.write(all.into_iter().take(kept));
    }
}

/// A member with its disk and what it has applied.
struct Member {
    node: u64,
    members: u16,
    ring: Option<Ring>,
    disk: Disk,
    applied: State,
    led: bool,
    /// Entries kept behind the snapshot, records kept before all is written anew.
    bounds: (usize, usize),
}

impl Member {
    fn new(node: u64, members: u16, bounds: (usize, usize)) -> Member {
        let applied = State::genesis(&genesis(members));
        let mut member = Member { node, members, ring: None, disk: Disk::default(), applied, led: false, bounds };
        member.start();
        member
    }
    fn start(&mut self) {
        let genesis = State::genesis(&genesis(self.members));
        self.applied = genesis.clone();
        let votes = Ring::open(ServerId(self.node as u16), genesis, &self.disk.content(), 0);
        let Votes::Member(mut ring) = votes.expect("a crash damages nothing") else { panic!("it is a member") };
        (ring.keep, ring.records_max) = self.bounds;
        self.ring = Some(ring);
    }
    /// Takes what the ring wants written, and applies what it decided. Tells the entries.
    fn settle(&mut self) -> Vec<(u64, Entry)> {
        let Some(ring) = &mut self.ring else { return Vec::new() };
        ring.settle();
        while let Some(write) = ring.poll_write() {
            self.disk.pending.push_back(write);
        }
        let mut news = Vec::new();
        let entries = match ring.decided_after(self.applied.index) {
            None => return news,
            Some(Decided::Entries(entries)) => entries,
            Some(Decided::Jump(state, entries)) => {
                self.applied = (*state).clone();
                entries
            }
        };
        for entry in entries {
            let _ = self.applied.apply(&entry);
            news.push((self.applied.index, entry));
        }
        news
    }
    /// The oldest write reaches the disk.
    fn persist(&mut self) {
        if let Some((number, writes)) = self.disk.pending.pop_front() {
            self.disk.write(writes);
            if let Some(ring) = &mut self.ring {
                ring.on_persisted(number);
            }
        }
    }
    fn persist_all(&mut self) {
        while !self.disk.pending.is_empty() {
            self.persist();
        }
    }
}

#[test]
fn a_ring_of_one_decides_what_is_stable_and_nothing_else() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    assert!(m.ring.as_mut().unwrap().propose(noop(1)));
    assert!(m.settle().is_empty(), "not stable yet");
    m.persist_all();
    assert_eq!(m.settle(), [(1, noop(1))]);
}

#[test]
fn a_ring_of_one_loses_what_was_not_stable_and_keeps_the_rest() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    for number in 1..=3 {
        m.ring.as_mut().unwrap().propose(noop(number));
    }
    m.settle();
    m.persist_all();
    m.ring.as_mut().unwrap().propose(noop(4));
    m.settle();
    m.disk.pending.clear();
    m.start();
    assert_eq!(m.settle(), [(1, noop(1)), (2, noop(2)), (3, noop(3))]);
}

#[test]
fn a_long_log_is_compacted_and_the_old_records_are_deleted() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    let total = 5 * LOG_KEEP as u64;
    for number in 1..=total {
        m.ring.as_mut().unwrap().propose(noop(number));
        m.settle();
        m.persist_all();
    }
    m.settle();
    m.persist_all();
    m.settle();
    m.persist_all();
    assert!(m.disk.durable.len() < 3 * LOG_KEEP, "{} values are left", m.disk.durable.len());
    m.start();
    m.settle();
    assert_eq!(m.applied.index, total);
}

#[test]
fn a_record_too_long_for_one_value_is_cut_and_put_together() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    let command = Command::AddServer { addresses: vec!["x".repeat(RING_VALUE_MAX * 2)], token: 1 };
    let entry = Entry { command, ..noop(1) };
    m.ring.as_mut().unwrap().propose(entry.clone());
    m.settle();
    m.persist_all();
    assert_eq!(m.disk.durable.len(), 4);
    assert!(m.disk.durable.values().all(|v| v.len() <= RING_VALUE_MAX + 64));
    m.start();
    assert_eq!(m.settle(), [(1, entry)]);
}

#[test]
fn the_bytes_of_a_durable_record_never_change() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    m.ring.as_mut().unwrap().propose(noop(1));
    m.settle();
    m.persist_all();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    let records: Vec<_> = m.disk.content().iter().map(|(k, v)| format!("{k:?} {}", hex(v))).collect();
    expect![[r#"b"ring/log/0000000000000001" 03 01 00 00 b0 81 8c b5 09 01 00 00 01 01 01 01 00"#]]
        .assert_eq(&records.join("\n"));
    m.ring.as_ref().unwrap().log.get().need_reset();
    m.settle();
    m.persist_all();
    m.settle();
    m.persist_all();
    let records: Vec<_> = m.disk.content().iter().map(|(k, v)| format!("{k:?} {}", hex(v))).collect();
    expect![[r#"b"ring/log/0000000000000002" 03 01 01 00 9c df 8e ed 0c 00 00 00 00 00 00 00 00 00 01 00 37 0a 00 c1 01 04 74 65 73 74 01 00 01 01 01 01 01 01 0c 75 6e 69 78 3a 73 31 2e 73 6f 63 6b 00 00 00 00 00 00 00 00 00 00 00 00 00 00 01 d8 04 00 00 00 00 00 00 00 00 01 01 01 01 00"#]].assert_eq(&records.join("\n"));
}

#[test]
fn damaged_records_are_refused_and_never_a_panic() {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    for number in 1..=20 {
        m.ring.as_mut().unwrap().propose(noop(number));
        m.settle();
        m.persist_all();
    }
    m.ring.as_ref().unwrap().log.get().need_reset();
    for number in 21..=30 {
        m.ring.as_mut().unwrap().propose(noop(number));
        m.settle();
        if number < 22 {
            m.disk.pending.pop_front().map(|(_, w)| m.disk.write(w)).unwrap();
        } else {
            m.persist();
        }
    }
    let good = m.disk.content();
    let state = || State::genesis(&genesis(1));
    let mut prng = Prng::new(3);
    let mut refused = 0;
    for _ in 0..5000 {
        let mut bad = good.clone();
        let at = prng.below(bad.len() as u64) as usize;
        match prng.below(4) {
            0 => drop(bad.remove(at)),
            1 => bad[at].1 = bad[at].1.slice(..prng.below(bad[at].1.len() as u64) as usize),
            2 => bad[at].0 = [&bad[at].0[..], b"x"].concat().into(),
            _ => {
                let mut value = bad[at].1.to_vec();
                let byte = prng.below(value.len() as u64) as usize;
                value[byte] ^= 1 << prng.below(8);
                bad[at].1 = value.into();
            }
        }
        refused += u64::from(Ring::open(ServerId(1), state(), &bad, 0).is_err());
    }
    assert!(refused > 4000, "{refused} of 5000");
}

/// A server lost what it had voted: the state in which the ring begins its second configuration with it.
fn second_configuration() -> State {
    let mut state = State::genesis(&genesis(1));
    let (server, incarnation) = (ServerId(1), Incarnation(1));
    let disks = vec![(DiskId(1), Incarnation(0).into(), 1 << 30)];
    let commands = [
        Command::ServerUp { server, incarnation, addresses: vec![], disks },
        Command::Goodbye { server, incarnation },
        Command::ReplaceDisks { server, incarnation, disks: vec![DiskId(2)], votes_lost: true, accept_data_loss: true },
    ];
    for (number, command) in (1..).zip(commands) {
        state.apply(&Entry { command, ..noop(number) }).0.unwrap();
    }
    assert_eq!(state.ring.id, 2);
    state
}

/// What a member has voted in the first configuration, durably.
fn first_votes() -> Disk {
    let mut m = Member::new(1, 1, (LOG_KEEP, RECORDS_MAX));
    for number in 1..=9 {
        m.ring.as_mut().unwrap().propose(noop(number));
        m.settle();
        m.persist_all();
    }
    m.disk
}

fn open(disk: &Disk, votes_from: u32) -> Result<Votes, RingDamaged> {
    Ring::open(ServerId(1), State::genesis(&genesis(1)), &disk.content(), votes_from)
}

/// Begins in the second configuration with what `forgotten` left, votes there, and is found again as a member of it.
fn begins_behind(mut disk: Disk, forgotten: Forgotten) {
    let mut ring = Ring::begin(ServerId(1), second_configuration(), None, Some(forgotten)).expect("it is a member");
    assert!(ring.propose(noop(10)));
    ring.settle();
    while let Some((number, writes)) = ring.poll_write() {
        disk.write(writes);
        ring.on_persisted(number);
        ring.settle();
    }
    for votes_from in [0, 2] {
        let Ok(Votes::Member(again)) = open(&disk, votes_from) else { panic!("it has voted in this one") };
        assert_eq!(again.configuration(), 2);
        let base = second_configuration().index;
        let Some(Decided::Jump(state, entries)) = again.decided_after(0) else { panic!("it is behind its snapshot") };
        assert_eq!((state.index, entries), (base, vec![noop(10)]));
    }
    assert!(matches!(open(&disk, 3), Ok(Votes::None(_))), "and again it was made anew");
}

#[test]
fn whole_records_of_configurations_before_the_one_to_vote_from_count_for_nothing() {
    let disk = first_votes();
    for votes_from in [0, 1] {
        assert!(matches!(open(&disk, votes_from), Ok(Votes::Member(_))), "its votes are whole, and count");
    }
    let Ok(Votes::None(forgotten)) = open(&disk, 2) else { panic!("its votes are of an older configuration") };
    begins_behind(disk, forgotten);
    assert!(matches!(open(&Disk::default(), 2), Ok(Votes::None(_))), "a new disk has voted nothing");
}

#[test]
fn damaged_records_of_configurations_before_the_one_to_vote_from_do_no_harm() {
    let damages: [fn(&mut Disk); 3] = [
        // The newest is not what was written; the oldest is gone; one in between ends early.
        |disk| {
            let (key, value) = disk.durable.last_key_value().map(|(k, v)| (k.clone(), v.to_vec())).unwrap();
            let mut value = value;
            *value.last_mut().unwrap() ^= 1;
            disk.durable.insert(key, value.into());
        },
        |disk| drop(disk.durable.pop_first()),
        |disk| {
            let (_, value) = disk.durable.iter_mut().nth(4).unwrap();
            *value = value.slice(..value.len() - 1);
        },
    ];
    for damage in damages {
        let mut disk = first_votes();
        damage(&mut disk);
        for votes_from in [0, 1] {
            assert!(open(&disk, votes_from).is_err(), "what it voted is needed, and not known");
        }
        let Ok(Votes::None(forgotten)) = open(&disk, 2) else { panic!("what it voted is not needed") };
        begins_behind(disk, forgotten);
    }
}

#[test]
fn damage_of_a_configuration_that_is_to_be_voted_in_is_never_forgotten() {
    let mut disk = first_votes();
    let Ok(Votes::None(forgotten)) = open(&disk, 2) else { panic!("its votes are of an older configuration") };
    let mut ring = Ring::begin(ServerId(1), second_configuration(), None, Some(forgotten)).unwrap();
    ring.propose(noop(10));
    ring.settle();
    while let Some((number, writes)) = ring.poll_write() {
        disk.write(writes);
        ring.on_persisted(number);
        ring.settle();
    }
    let (key, value) = disk.durable.last_key_value().map(|(k, v)| (k.clone(), v.clone())).unwrap();
    disk.durable.insert(key.clone(), value.slice(..value.len() - 1));
    assert!(open(&disk, 2).is_err());
    // Of which configuration it was cannot be read any more: it might be the present one.
    disk.durable.insert(key, value.slice(..1));
    assert!(open(&disk, 2).is_err());
}

#[test]
fn hostile_messages_are_dropped_and_never_a_panic() {
    let mut m = Member::new(1, 3, (LOG_KEEP, RECORDS_MAX));
    let ring = m.ring.as_mut().unwrap();
    let mut prng = Prng::new(5);
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..prng.below(24)).map(|_| prng.below(8) as u8).collect();
        ring.on_message(prng.below(5), 1, &bytes);
    }
    ring.settle();
}

// ------------------------------------------------------------------------------------------------
// Random walks.

/// Three members, connections that break, disks that lag.
struct Walk {
    prng: Prng,
    now: Instant,
    members: Vec<Member>,
    /// Messages on the way, per connection and direction; `None` while the connection is broken.
    links: BTreeMap<(u64, u64), Option<VecDeque<Bytes>>>,
    /// What was decided, by index. It never changes.
    decided: BTreeMap<u64, Entry>,
    proposed: u64,
    elections: u64,
    /// The member with a slow disk; zero: none.
    slow: u64,
}

impl Walk {
    fn new(seed: u64) -> Walk {
        let pairs = (1..=3).flat_map(|a| (1..=3).filter(move |b| a != *b).map(move |b| (a, b)));
        let mut prng = Prng::new(seed);
        let bounds = (prng.between(1, 12) as usize, prng.between(3, 60) as usize);
        let slow = prng.below(4);
        Walk {
            slow,
            prng,
            now: Instant::ZERO,
            members: (1..=3).map(|node| Member::new(node, 3, bounds)).collect(),
            links: pairs.map(|pair| (pair, None)).collect(),
            decided: BTreeMap::new(),
            proposed: 0,
            elections: 0,
        }
    }

    fn member(&mut self, node: u64) -> &mut Member {
        &mut self.members[node as usize - 1]
    }

    fn up(&self, node: u64) -> bool {
        self.members[node as usize - 1].ring.is_some()
    }

    fn connect(&mut self, a: u64, b: u64) {
        if self.up(a) && self.up(b) && self.links[&(a, b)].is_none() {
            for (from, to) in [(a, b), (b, a)] {
                self.links.insert((from, to), Some(VecDeque::new()));
                self.member(from).ring.as_mut().unwrap().on_connected(to);
            }
        }
    }

    fn disconnect(&mut self, a: u64, b: u64) {
        self.links.insert((a, b), None);
        self.links.insert((b, a), None);
    }

    fn crash(&mut self, node: u64) {
        for other in (1..=3).filter(|o| *o != node) {
            self.disconnect(node, other);
        }
        let mut prng = self.prng.fork();
        let member = self.member(node);
        member.ring = None;
        member.disk.crash(&mut prng);
    }

    /// Takes every member's outputs and compares what it applied with what others did.
    fn settle(&mut self) {
        for node in 1..=3 {
            let leads = self.member(node).ring.as_ref().is_some_and(Ring::leads);
            self.elections += u64::from(leads && !std::mem::replace(&mut self.member(node).led, leads));
            self.member(node).led = leads;
            for (index, entry) in self.member(node).settle() {
                let known = self.decided.entry(index).or_insert_with(|| entry.clone());
                assert_eq!(*known, entry, "member {node} has another entry {index}");
            }
            while let Some((to, bytes)) = self.members[node as usize - 1].ring.as_mut().and_then(Ring::poll_message) {
                if let Some(Some(link)) = self.links.get_mut(&(node, to)) {
                    link.push_back(bytes);
                }
            }
        }
    }

    fn deliver(&mut self, from: u64, to: u64) {
        if let Some(Some(link)) = self.links.get_mut(&(from, to))
            && let Some(bytes) = link.pop_front()
        {
            self.member(to).ring.as_mut().expect("connected").on_message(from, 1, &bytes);
        }
    }

    fn step(&mut self) {
        let node = self.prng.between(1, 3);
        let other = (node + self.prng.below(2)) % 3 + 1;
        match self.prng.below(1000) {
            0..=3 if self.up(node) => self.crash(node),
            0..=20 if !self.up(node) => self.member(node).start(),
            21..=24 => self.disconnect(node, other),
            25..=99 => self.connect(node, other),
            100..=299 if node != self.slow || self.prng.chance(1, 10) => self.member(node).persist(),
            300..=349 => self.advance(),
            350..=399 => self.propose(node),
            _ => self.deliver(other, node),
        }
        self.settle();
    }

    fn advance(&mut self) {
        self.now += Duration::from_millis(40);
        let now = self.now;
        for node in 1..=3 {
            let Some(ring) = &mut self.member(node).ring else { continue };
            ring.tick(now);
        }
    }

    fn propose(&mut self, node: u64) {
        let entry = noop(self.proposed + 1);
        if self.member(node).ring.as_mut().is_some_and(|ring| ring.propose(entry)) {
            self.proposed += 1;
        }
    }

    /// Everything works again for a while.
    fn heal(&mut self) {
        for node in 1..=3 {
            if !self.up(node) {
                self.member(node).start();
            }
        }
        self.run_soundly(400);
    }

    /// So many steps of time in which nothing fails.
    fn run_soundly(&mut self, steps: usize) {
        for _ in 0..steps {
            for (a, b) in [(1, 2), (2, 3), (3, 1)] {
                self.connect(a, b);
            }
            self.advance();
            for _ in 0..6 {
                self.settle();
                self.members.iter_mut().for_each(Member::persist_all);
                self.settle();
                let links: Vec<(u64, u64)> = self.links.keys().copied().collect();
                for (from, to) in links {
                    while matches!(&self.links[&(from, to)], Some(l) if !l.is_empty()) {
                        self.deliver(from, to);
                    }
                }
            }
        }
    }
}

/// One walk to its end: `(entries decided, elections)`. Panics if something decided was lost or reordered,
/// or if the members do not agree once all is quiet.
fn walk(seed: u64) -> (u64, u64) {
    let mut walk = Walk::new(seed);
    (0..6000).for_each(|_| walk.step());
    walk.heal();
    for node in 1..=3 {
        walk.propose(node);
    }
    walk.heal();
    let last = walk.decided.last_key_value().map_or(0, |(index, _)| *index);
    assert!(last > 0, "seed {seed}: nothing was decided");
    for member in &walk.members {
        assert_eq!(member.applied.index, last, "seed {seed}: member {} lags", member.node);
        assert_eq!(member.applied, walk.members[0].applied, "seed {seed}: member {} differs", member.node);
    }
    (last, walk.elections)
}

fn must_fail(rule: Broken, seeds: u64) {
    let caught = (0..seeds).find(|seed| {
        std::panic::catch_unwind(|| {
            BROKEN.set(Some(rule));
            walk(*seed)
        })
        .is_err()
    });
    assert!(caught.is_some(), "{rule:?} is not noticed in {seeds} walks");
}

#[test]
fn must_fail_a_leader_that_counts_itself_before_its_write_is_stable() {
    must_fail(Broken::DecidedBeforeStable, 1000);
}

#[test]
fn must_fail_messages_that_leave_before_the_write_is_stable() {
    must_fail(Broken::MessagesBeforeStable, 400);
}

#[test]
fn must_fail_snapshots_as_the_library_makes_them() {
    must_fail(Broken::UndecidedInSnapshot, 200);
}

#[test]
fn must_fail_a_delta_that_is_merged_twice() {
    must_fail(Broken::DeltaMergedTwice, 400);
}

#[test]
fn must_fail_a_member_that_never_stands_by_itself() {
    must_fail(Broken::NeverStands, 1000);
}

/// A member that promised itself and stopped before it asked anybody comes back: its ballot is higher than the leader's, and
/// nobody follows it.
#[test]
fn who_follows_only_itself_does_not_keep_the_leader_from_deciding() {
    for seed in 0..12 {
        let mut walk = Walk::new(seed);
        walk.heal();
        let leads = |walk: &Walk, node: u64| walk.members[node as usize - 1].ring.as_ref().is_some_and(Ring::leads);
        let leader = (1..=3).find(|node| leads(&walk, *node)).expect("somebody leads");
        let lonely = (leader + seed % 2) % 3 + 1;
        for other in (1..=3).filter(|other| *other != lonely) {
            walk.disconnect(lonely, other);
        }
        let member = walk.member(lonely);
        let Some(Ring { core: Core::Many(paxos), .. }) = &mut member.ring else { panic!("it runs") };
        paxos.try_become_leader();
        member.settle();
        member.persist_all();
        walk.crash(lonely);
        walk.member(lonely).start();
        for _ in 0..20 {
            walk.run_soundly(1);
            let before = walk.proposed;
            walk.propose(leader);
            assert_eq!(walk.proposed, before + 1, "seed {seed}: {leader} does not lead");
        }
        walk.run_soundly(2);
        assert_eq!(walk.decided.len() as u64, walk.proposed, "seed {seed}: not all is decided");
    }
}

#[test]
fn nothing_decided_is_lost_or_reordered_whatever_crashes_when() {
    let seeds = std::env::var("RING_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let (mut decided, mut elections) = (0, 0);
    for seed in 0..seeds {
        let (last, led) = walk(seed);
        decided += last;
        elections += led;
    }
    assert!(decided > 20 * seeds && elections > seeds, "{decided} decided, {elections} elections in {seeds} walks");
}

#[test]
fn the_same_seed_gives_the_same_walk() {
    let run = || {
        let mut walk = Walk::new(7);
        (0..4000).for_each(|_| walk.step());
        (walk.decided, walk.members.into_iter().map(|m| m.disk.durable).collect::<Vec<_>>())
    };
    assert_eq!(run(), run());
}
