//! Tests of the state machine: one command, one result; then whole random histories.

use super::*;
use crate::global_state::GenesisServer;
use crate::global_state::SnapshotOf;
use crate::translator::vdir::Policy;
use expect_test::expect;
use proptest::prelude::*;
use stdx::Prng;

pub(crate) fn genesis(ring: u16) -> Genesis {
    let server = |i| GenesisServer { server: ServerId(i), addresses: vec![format!("unix:s{i}.sock")] };
    Genesis { cluster: ClusterId(0xc1), name: "test".into(), ring: (1..=ring).map(server).collect() }
}

/// A state with a proposer of its own that counts.
pub(crate) struct Fixture {
    pub state: State,
    number: u64,
    pub effects: Effects,
}

impl Fixture {
    fn new(servers: u16) -> Fixture {
        Fixture { state: State::genesis(&genesis(servers)), number: 0, effects: Effects::default() }
    }
    /// All servers up, each with one disk.
    pub(crate) fn up(servers: u16) -> Fixture {
        let mut f = Fixture::new(servers);
        for s in 1..=servers {
            f.run(server_up(s, 1, &[(u128::from(s), 0)])).unwrap();
        }
        f
    }
    pub(crate) fn run(&mut self, command: Command) -> Applied {
        self.number += 1;
        let id = CommandId { proposer: 7, number: self.number, finished_below: self.number };
        let (result, effects) = self.state.apply(&Entry { id, command });
        assert_eq!(self.state.complaint(), None);
        self.effects = effects;
        result
    }
    pub(crate) fn disk(&mut self, name: &str) -> VdiskId {
        match self.run(create(name)) {
            Ok(Outcome::Disk(id)) => id,
            other => panic!("{other:?}"),
        }
    }
    pub(crate) fn attach(
        &mut self,
        vdisk: VdiskId,
        mode: Attachment,
        take_over: bool,
    ) -> Result<SessionId, CommandError> {
        match self.run(Command::Attach { vdisk, mode, holder: "nbd@here".into(), take_over })? {
            Outcome::Session(id) => Ok(id),
            other => panic!("{other:?}"),
        }
    }
    /// What the primaries of the slots below `end` say who have flattened a clone.
    pub(crate) fn inherited(&self, vdisk: VdiskId, end: u32) -> Command {
        inherited(&self.state, vdisk, end)
    }
}

fn inherited(state: &State, vdisk: VdiskId, end: u32) -> Command {
    let gmap = state.vdisk(vdisk).and_then(|v| state.family(v.family)).map_or(GmapId(1), |f| f.gmap);
    let slots = state.slots.get(&gmap).map_or(&[][..], |slots| slots);
    let slots = (0..end).zip(slots).map(|(number, slot)| (number, slot.term)).collect();
    let session = state.flattenings.get(&vdisk).map_or(SessionId(1), |f| f.session);
    Command::Inherited { vdisk, session, gmap, slots }
}

fn some_flatten(state: &State, prng: &mut Prng, vdisk: VdiskId) -> Command {
    let being = state.flattenings.keys().next().copied();
    match (prng.below(8), being) {
        (0, _) => Command::Flatten { vdisk, wanted: false },
        (1..4, Some(being)) => inherited(state, being, prng.below(400) as u32),
        _ => Command::Flatten { vdisk, wanted: true },
    }
}

fn server_up(server: u16, incarnation: u64, disks: &[(u128, u64)]) -> Command {
    Command::ServerUp {
        server: ServerId(server),
        incarnation: Incarnation(incarnation),
        addresses: vec![format!("unix:s{server}.sock")],
        disks: disks.iter().map(|(d, last)| (DiskId(*d), Incarnation(*last).into(), 1 << 30)).collect(),
    }
}

fn create(name: &str) -> Command {
    Command::CreateDisk { name: name.into(), size: 1 << 30, scheme: Scheme::Chained, stripe_unit: 1 << 20 }
}

#[test]
fn every_entry_counts_even_a_refused_one() {
    let mut f = Fixture::new(3);
    f.run(Command::Noop).unwrap();
    f.run(Command::DeleteDisk { vdisk: VdiskId(9) }).unwrap_err();
    assert_eq!(f.state.index, 2);
}

#[test]
fn a_command_that_comes_twice_is_executed_once_and_has_one_result() {
    let mut f = Fixture::up(3);
    let id = CommandId { proposer: 8, number: 1, finished_below: 0 };
    let entry = Entry { id, command: create("a") };
    let (first, _) = f.state.apply(&entry);
    let (second, effects) = f.state.apply(&entry);
    assert_eq!(first, second);
    assert_eq!(effects, Effects::default());
    assert_eq!(f.state.vdisks.len(), 1);
    assert_eq!(f.state.result(&id), Some(&(4, first)));
}

#[test]
fn a_late_copy_of_a_finished_command_changes_nothing() {
    let mut f = Fixture::up(3);
    let entry =
        |number, finished_below, command| Entry { id: CommandId { proposer: 8, number, finished_below }, command };
    f.state.apply(&entry(1, 1, create("a"))).0.unwrap();
    f.state.apply(&entry(2, 2, Command::Noop)).0.unwrap();
    assert_eq!(f.state.apply(&entry(1, 1, create("b"))).0, Err(CommandError::Forgotten));
    assert_eq!(f.state.vdisks.len(), 1);
    assert_eq!(f.state.executed[&8].results.len(), 1);
}

#[test]
fn the_proposer_unheard_for_longest_is_forgotten_first() {
    let mut state = State::genesis(&genesis(1));
    let mut noop = |proposer, number| {
        state.apply(&Entry { id: CommandId { proposer, number, finished_below: number }, command: Command::Noop })
    };
    for proposer in 0..PROPOSERS_MAX as u64 {
        noop(proposer, 1).0.unwrap();
    }
    noop(0, 2).0.unwrap();
    noop(u64::MAX, 1).0.unwrap();
    assert_eq!(state.executed.len(), PROPOSERS_MAX);
    assert!(state.executed.contains_key(&0), "it was heard again");
    assert!(!state.executed.contains_key(&1));
}

#[test]
fn one_proposer_has_a_bounded_number_of_results() {
    let mut state = State::genesis(&genesis(1));
    for number in 1..=2 * RESULTS_PER_PROPOSER_MAX as u64 {
        let id = CommandId { proposer: 1, number, finished_below: 0 };
        state.apply(&Entry { id, command: Command::Noop }).0.unwrap();
        assert!(state.is_executed(&id));
    }
    assert_eq!(state.executed[&1].results.len(), RESULTS_PER_PROPOSER_MAX);
    assert!(state.is_executed(&CommandId { proposer: 1, number: 1, finished_below: 0 }), "forgotten, not unknown");
}

#[test]
fn a_restart_gives_a_new_term_to_the_slots_of_the_server_and_to_no_other() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let made = f.state.index;
    f.run(server_up(2, 2, &[(2, 1)])).unwrap();
    let of_server: Vec<SlotId> = f.state.slots_of_server(ServerId(2)).map(|(id, _)| id).collect();
    assert_eq!(of_server.len(), 128);
    assert_eq!(f.effects.slots, of_server);
    for (_, slot) in f.state.all_slots() {
        let expected = if slot.member(ServerId(2)).is_some() { f.state.index } else { made };
        assert_eq!(slot.term, expected);
        assert!(slot.tuple.iter().all(|m| m.in_sync && m.since == made), "nobody left");
    }
}

#[test]
fn the_first_server_up_registers_disks_and_later_ones_must_bring_them() {
    let mut f = Fixture::new(1);
    f.run(server_up(1, 1, &[(10, 0), (11, 0)])).unwrap();
    assert_eq!(f.state.servers[&ServerId(1)].weight, 2 << 30);
    let missing = f.run(server_up(1, 2, &[(10, 1)]));
    assert_eq!(missing, Err(CommandError::DiskMissing { server: ServerId(1), disk: DiskId(11) }));
    let old = f.run(server_up(1, 2, &[(10, 1), (11, 0)]));
    assert!(matches!(old, Err(CommandError::DiskFromThePast { disk: DiskId(11), .. })), "{old:?}");
    f.run(server_up(1, 2, &[(10, 1), (11, 1), (12, 0)])).unwrap();
    assert_eq!(f.state.servers[&ServerId(1)].disks.len(), 3);
}

/// A server of two disks that starts again and again, as the shell does it.
struct Starts {
    disks: [Lives; 2],
}

impl Starts {
    /// Writes the new life to the first `written` disks. What the cluster would be told, where it comes to that.
    fn begin(&mut self, prng: &mut Prng, written: usize) -> (Incarnation, Vec<(DiskId, Lives, u64)>) {
        let found = (1..).map(DiskId).zip(self.disks.clone()).map(|(disk, lives)| (disk, lives, 1 << 30)).collect();
        let newest = self.disks.iter().max().unwrap().clone();
        let life = Lives::next(self.disks.iter(), prng.next_u64() as u32);
        for lives in &mut self.disks[..written] {
            *lives = std::mem::take(lives).then(life, newest.taken);
        }
        (life, found)
    }
}

/// P9's bad input: an image of a disk, from before the last life that the cluster took, is refused at the first start and at
/// every later one, whatever was broken off; and a disk that was always there never is.
#[test]
fn an_image_of_a_disk_never_passes_however_often_it_is_started() {
    let mut refused = 0;
    for seed in 0..300 {
        let mut prng = Prng::new(seed);
        let mut f = Fixture::new(1);
        let mut server = Starts { disks: [Lives::default(), Lives::default()] };
        let mut image: Option<(Lives, Incarnation)> = None;
        // Now and then, so many are broken off that marks come again.
        let broken_off = *prng.pick(&[3, 3, 20]);
        for _ in 0..prng.between(3, 60) {
            let written = if prng.chance(1, 4) { prng.below(2) as usize } else { 2 };
            let (incarnation, disks) = server.begin(&mut prng, written);
            assert!(server.disks.iter().all(|lives| lives.open.len() <= Lives::OPEN_MAX));
            if written < 2 || !prng.chance(1, broken_off) {
                continue; // It ended before it could ask.
            }
            let up = Command::ServerUp { server: ServerId(1), incarnation, addresses: vec![], disks };
            f.run(up).unwrap_or_else(|e| panic!("seed {seed}: a sound disk is refused: {e}"));
            let noted = prng.below(4) as usize;
            server.disks.iter_mut().take(noted).for_each(|lives| lives.take(incarnation));
            if prng.chance(1, 3) {
                image = Some((server.disks[1].clone(), incarnation));
            }
        }
        let known = f.state.servers[&ServerId(1)].incarnation;
        let Some((lives, of)) = image.filter(|(_, of)| *of < known) else { continue };
        server.disks[1] = lives;
        for _ in 0..6 {
            let (incarnation, disks) = server.begin(&mut prng, 2);
            if prng.chance(1, 2) {
                continue;
            }
            let up = Command::ServerUp { server: ServerId(1), incarnation, addresses: vec![], disks };
            let result = f.run(up);
            assert!(
                matches!(result, Err(CommandError::DiskFromThePast { .. })),
                "seed {seed}, image of {of}: {result:?}"
            );
            refused += 1;
        }
    }
    assert!(refused > 200, "{refused}");
}

#[test]
fn a_life_that_the_cluster_never_heard_of_does_not_spoil_a_disk() {
    let mut f = Fixture::new(1);
    f.run(server_up(1, 1, &[(10, 0)])).unwrap();
    let mut up = server_up(1, 3, &[(10, 1)]);
    let Command::ServerUp { disks, .. } = &mut up else { unreachable!() };
    disks[0].1 = disks[0].1.clone().then(Incarnation(2), Incarnation(1));
    f.run(up).unwrap();
    let mut up = server_up(1, 4, &[(10, 3)]);
    let Command::ServerUp { disks, .. } = &mut up else { unreachable!() };
    disks[0].1 = disks[0].1.clone().then(Incarnation(7), Incarnation(3));
    let future = f.run(up);
    assert!(matches!(future, Err(CommandError::OldIncarnation { .. })), "{future:?}");
}

#[test]
fn an_old_life_of_a_server_is_refused() {
    let mut f = Fixture::up(1);
    let again = f.run(server_up(1, 1, &[(1, 0)]));
    assert!(matches!(again, Err(CommandError::OldIncarnation { .. })), "{again:?}");
    assert_eq!(f.run(server_up(9, 1, &[])), Err(CommandError::NoSuchServer(ServerId(9))));
}

#[test]
fn the_same_token_joins_once() {
    let mut f = Fixture::new(3);
    let join = |token| Command::AddServer { addresses: vec!["h:1".into()], token };
    assert_eq!(f.run(join(5)), Ok(Outcome::Server(ServerId(4))));
    assert_eq!(f.run(join(5)), Ok(Outcome::Server(ServerId(4))));
    assert_eq!(f.run(join(6)), Ok(Outcome::Server(ServerId(5))));
}

#[test]
fn a_disk_needs_as_many_servers_as_copies() {
    let mut f = Fixture::new(3);
    assert_eq!(f.run(create("a")), Err(CommandError::TooFewServers { copies: 2, servers: 0 }));
    f.run(server_up(1, 1, &[(1, 0)])).unwrap();
    assert_eq!(f.run(create("a")), Err(CommandError::TooFewServers { copies: 2, servers: 1 }));
    f.run(server_up(3, 1, &[(3, 0)])).unwrap();
    f.disk("a");
    assert_eq!(f.state.servers_of_family(f.state.vdisk_named("a").unwrap().family).len(), 2);
}

#[test]
fn disks_of_one_scheme_share_a_map() {
    let mut f = Fixture::up(4);
    f.disk("a");
    assert_eq!(f.effects.slots.len(), 256);
    f.disk("b");
    assert!(f.effects.slots.is_empty());
    assert_eq!(f.state.gmaps.len(), 1);
    let striped =
        Command::CreateDisk { name: "c".into(), size: 512, scheme: Scheme::Striped, stripe_unit: ELEMENT_SIZE };
    f.run(striped).unwrap();
    assert_eq!(f.state.gmaps.len(), 2);
}

#[test]
fn bad_names_are_refused_with_the_reason() {
    let mut f = Fixture::up(2);
    let long = "x".repeat(NAME_MAX + 1);
    for name in ["", "-a", ".a", "a@b", "a b", "ä", "a/b", long.as_str()] {
        assert!(matches!(f.run(create(name)), Err(CommandError::BadName { .. })), "{name}");
    }
    f.disk(&"x".repeat(NAME_MAX));
    f.disk("A.b_c-1");
    assert_eq!(f.run(create("A.b_c-1")), Err(CommandError::NameTaken("A.b_c-1".into())));
}

#[test]
fn bad_sizes_and_stripe_units_are_refused() {
    let mut f = Fixture::up(2);
    let create =
        |size, stripe_unit| Command::CreateDisk { name: "a".into(), size, scheme: Scheme::Chained, stripe_unit };
    for size in [0, 511, 513, DISK_SIZE_MAX + 512, u64::MAX] {
        assert!(matches!(f.run(create(size, 1 << 20)), Err(CommandError::BadSize { .. })), "{size}");
    }
    for unit in [0, 1, 4096, 3 << 16, 1 << 31, u64::MAX] {
        assert_eq!(f.run(create(512, unit)), Err(CommandError::BadStripeUnit(unit)));
    }
    f.run(create(DISK_SIZE_MAX, 1 << 30)).unwrap();
}

#[test]
fn an_attached_disk_is_not_deleted() {
    let mut f = Fixture::up(2);
    let disk = f.disk("a");
    let session = f.attach(disk, Attachment::ReadOnly, false).unwrap();
    let refused = f.run(Command::DeleteDisk { vdisk: disk });
    assert_eq!(refused, Err(CommandError::InUse { name: "a".into(), holder: "nbd@here".into(), session }));
    f.run(Command::Detach { session }).unwrap();
    assert!(f.effects.narrows);
    assert_eq!(f.effects.sessions_ended, [session]);
    f.run(Command::DeleteDisk { vdisk: disk }).unwrap();
    assert_eq!(f.effects.families_ended.len(), 1);
    assert_eq!(f.effects.concerned, [ServerId(1), ServerId(2)]);
    assert!(f.state.families.is_empty());
    f.disk("a");
}

#[test]
fn attachments_stand_in_each_others_way_as_their_modes_say() {
    use Attachment::*;
    let clash = [(Exclusive, Exclusive), (Exclusive, Shared), (Shared, Exclusive)];
    for present in [Exclusive, Shared, ReadOnly] {
        for wanted in [Exclusive, Shared, ReadOnly] {
            let mut f = Fixture::up(2);
            let disk = f.disk("a");
            f.attach(disk, present, false).unwrap();
            assert_eq!(f.attach(disk, wanted, false).is_err(), clash.contains(&(wanted, present)), "{wanted:?}");
        }
    }
}

#[test]
fn taking_over_ends_the_sessions_in_the_way_and_no_other() {
    let mut f = Fixture::up(2);
    let disk = f.disk("a");
    let reader = f.attach(disk, Attachment::ReadOnly, false).unwrap();
    let writer = f.attach(disk, Attachment::Exclusive, false).unwrap();
    let before = f.state.revision_of(disk);
    let next = f.attach(disk, Attachment::Exclusive, true).unwrap();
    assert_eq!(f.effects.sessions_ended, [writer]);
    assert!(f.effects.narrows);
    assert_eq!(f.state.vdisk(disk).unwrap().sessions, [reader, next]);
    assert!(f.state.session(writer).is_none());
    assert!(f.state.revision_of(disk) > before);
}

#[test]
fn attaching_waits_for_those_who_were_detached_a_moment_ago() {
    let mut f = Fixture::up(2);
    let disk = f.disk("a");
    let first = f.attach(disk, Attachment::Exclusive, false).unwrap();
    f.run(Command::Detach { session: first }).unwrap();
    f.attach(disk, Attachment::Exclusive, false).unwrap();
    assert!(f.effects.narrows && f.effects.sessions_ended.is_empty());
    assert_eq!(f.effects.concerned, [ServerId(1), ServerId(2)]);
}

#[test]
fn a_resize_revises_the_disk_and_only_shrinking_narrows() {
    let mut f = Fixture::up(2);
    let disk = f.disk("a");
    let nobody = SessionId(0);
    f.run(Command::ResizeDisk { vdisk: disk, size: 2 << 30, session: nobody }).unwrap();
    assert_eq!((f.state.revision_of(disk), f.effects.narrows), (Some(f.state.index), false));
    let refused = f.run(Command::ResizeDisk { vdisk: disk, size: 512, session: nobody });
    assert!(matches!(refused, Err(CommandError::NotExclusive { .. })));
    let session = f.attach(disk, Attachment::Exclusive, false).unwrap();
    f.run(Command::ResizeDisk { vdisk: disk, size: 512, session }).unwrap();
    assert_eq!((f.state.revision_of(disk), f.effects.narrows), (Some(f.state.index), true));
    f.run(Command::ResizeDisk { vdisk: disk, size: 512, session }).unwrap();
    assert_eq!(f.effects, Effects::default());
}

#[test]
fn a_new_name_revises_nothing() {
    let mut f = Fixture::up(2);
    let (a, b) = (f.disk("a"), f.disk("b"));
    let revision = f.state.revision_of(a);
    assert_eq!(f.run(Command::RenameDisk { vdisk: a, name: "b".into() }), Err(CommandError::NameTaken("b".into())));
    f.run(Command::RenameDisk { vdisk: a, name: "c".into() }).unwrap();
    assert_eq!(f.state.revision_of(a), revision);
    assert_eq!(f.state.vdisk_named("c").unwrap().id, a);
    assert!(f.state.vdisk_named("a").is_none());
    f.run(Command::RenameDisk { vdisk: b, name: "a".into() }).unwrap();
}

#[test]
fn hints_name_the_acting_primary_first() {
    let mut f = Fixture::up(4);
    let disk = f.disk("a");
    f.state.servers.get_mut(&ServerId(1)).unwrap().down = true;
    let hints = f.state.hints_by_name("a").unwrap();
    assert_eq!(hints.slots[0].in_sync, [ServerId(2), ServerId(1)]);
    assert_eq!(hints.slots[1].in_sync, [ServerId(2), ServerId(3)]);
    assert_eq!(hints.slots[3].in_sync, [ServerId(4), ServerId(1)]);
    assert_eq!(hints.servers.len(), 4);
    let slot = f.state.slot_of(hints.family.id, 0).unwrap();
    assert_eq!(f.state.acting(slot), Some(hints.slots[slot.slot as usize].in_sync[0]));
    let need = f.state.need(disk, slot);
    assert_eq!(need, Need { revision: hints.revision, term: hints.slots[0].term });
}

#[test]
fn the_bytes_of_a_small_state_never_change() {
    let mut f = Fixture::new(1);
    f.run(server_up(1, 1, &[(10, 0)])).unwrap();
    expect!["0a 01 c1 01 04 74 65 73 74 01 00 01 01 01 01 01 01 0c 75 6e 69 78 3a 73 31 2e 73 6f 63 6b 01 00 01 0a 01 80 80 80 80 04 00 01 00 80 80 80 80 04 00 00 00 00 00 00 00 01 d8 04 00 00 00 00 00 00 00 01 07 01 01 01 01 01 00 00"]
        .assert_eq(&hex(&f.state.encode()));
    let entry = Entry { id: CommandId { proposer: 300, number: 2, finished_below: 1 }, command: create("vol0") };
    expect![[r#"ac 02 02 01 03 04 76 6f 6c 30 80 80 80 80 04 01 80 80 40"#]]
        .assert_eq(&hex(&postcard::to_stdvec(&entry).unwrap()));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_state_survives_being_bytes_and_hostile_bytes_are_refused() {
    let mut f = Fixture::up(3);
    let disk = f.disk("a");
    f.attach(disk, Attachment::Shared, false).unwrap();
    let bytes = f.state.encode();
    assert_eq!(State::decode(&bytes), Ok(f.state.clone()));
    assert_eq!(State::decode(&[]), Err(StateError::Malformed));
    assert_eq!(State::decode(&[99, 1]), Err(StateError::UnknownVersion(99)));
    let mut prng = Prng::new(1);
    for _ in 0..20_000 {
        let mut damaged = bytes.clone();
        for _ in 0..prng.between(1, 4) {
            let at = prng.below(damaged.len() as u64) as usize;
            damaged[at] = prng.next_u64() as u8;
        }
        damaged.truncate(prng.between(1, damaged.len() as u64) as usize);
        if let Ok(mut state) = State::decode(&damaged) {
            // Whatever is accepted can be used.
            let _ = (state.hints(disk), state.slot_of(FamilyId(disk.0), 77), state.encode());
            let id = CommandId { proposer: 99, number: 1, finished_below: 1 };
            if state.index < u64::MAX {
                let _ = state.apply(&Entry { id, command: Command::DeleteDisk { vdisk: disk } });
            }
        }
    }
}

/// What the server had counts for nothing; where nobody else has everything that is refused, unless it is accepted.
#[test]
fn a_server_with_other_disks_leaves_every_slot_and_the_last_copy_goes_only_by_name() {
    let mut c = Fixture::up(3);
    let up = |server: u16, life: u64| server_up(server, life, &[(u128::from(server), life - 1)]);
    c.run(Command::CreateDisk { name: "d".into(), size: 1 << 30, scheme: Scheme::Chained, stripe_unit: 1 << 20 })
        .unwrap();
    let goodbye = |server: u16, life| Command::Goodbye { server: ServerId(server), incarnation: Incarnation(life) };
    let replace = |life, votes_lost, accept_data_loss| Command::ReplaceDisks {
        server: ServerId(2),
        incarnation: Incarnation(life),
        disks: vec![DiskId(77)],
        votes_lost,
        accept_data_loss,
    };
    assert_eq!(c.run(replace(1, false, false)).unwrap_err(), CommandError::NotDown(ServerId(2)));
    c.run(goodbye(2, 1)).unwrap();
    assert!(matches!(c.run(replace(2, false, false)).unwrap_err(), CommandError::OldIncarnation { .. }));
    let ring = c.state.ring.clone();
    c.run(replace(1, false, false)).unwrap();
    assert_eq!(c.state.ring, ring, "its votes are there");
    let index = c.state.index;
    for (_, slot) in c.state.all_slots() {
        if let Some(member) = slot.member(ServerId(2)) {
            assert_eq!((member.in_sync, member.since, slot.term), (false, index, index));
        }
    }
    // It comes with the disks that were named, and with no others.
    assert!(matches!(c.run(up(2, 2)).unwrap_err(), CommandError::DiskMissing { .. }));
    c.run(server_up(2, 2, &[(77, 1)])).unwrap();
    c.run(goodbye(2, 2)).unwrap();
    c.run(replace(2, true, false)).unwrap();
    assert_eq!((c.state.ring.id, c.state.ring.base), (ring.id + 1, c.state.index));
    // Now s1 and s3 are the last ones in every slot that they share with s2.
    c.run(goodbye(1, 1)).unwrap();
    c.run(server_up(2, 3, &[(77, 2)])).unwrap();
    let refusal = Command::ReplaceDisks {
        server: ServerId(1),
        incarnation: Incarnation(1),
        disks: vec![DiskId(78)],
        votes_lost: false,
        accept_data_loss: false,
    };
    let CommandError::LastCopy { slots, .. } = c.run(refusal.clone()).unwrap_err() else {
        panic!("it has the last copies")
    };
    let shared = |c: &Fixture| {
        let both =
            c.state.all_slots().filter(|(_, s)| s.member(ServerId(1)).is_some() && s.member(ServerId(2)).is_some());
        both.map(|(_, s)| s.in_sync().collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    assert_eq!(slots, shared(&c).len() as u64);
    let Command::ReplaceDisks { server, incarnation, disks, votes_lost, .. } = refusal else { unreachable!() };
    c.run(Command::ReplaceDisks { server, incarnation, disks, votes_lost, accept_data_loss: true }).unwrap();
    assert!(shared(&c).iter().all(|in_sync| *in_sync == [ServerId(2)]), "s2 goes on with what it has");
    assert_eq!(c.state.complaint(), None);
}

fn random_slots(prng: &mut Prng, state: &State) -> Vec<(SlotId, Term)> {
    let some: Vec<(SlotId, Term)> = state.all_slots().map(|(id, slot)| (id, slot.term)).collect();
    some.into_iter().filter(|_| prng.chance(1, 4)).collect()
}

/// A command that may or may not make sense.
fn random_command(prng: &mut Prng, state: &State) -> Command {
    let some = |prng: &mut Prng| match state.vdisks.len() as u64 {
        n if n > 0 && prng.chance(3, 4) => {
            *state.vdisks.keys().nth(prng.below(n) as usize).expect("below their number")
        }
        _ => VdiskId(prng.below(state.index + 2)),
    };
    let (vdisk, other) = (some(prng), some(prng));
    let epoch = |id: VdiskId| state.vdisk(id).map_or(Epoch(1), |v| v.epoch);
    let name = format!("d{}", prng.below(6));
    let server = prng.between(1, 5) as u16;
    let known = state.servers.get(&ServerId(server));
    let incarnation = known.map_or(Incarnation(0), |s| s.incarnation);
    let suspect = known.and_then(|s| s.suspect).unwrap_or(state.index);
    let server_id = ServerId(server);
    let gmap = state.gmaps.keys().nth(prng.below(state.gmaps.len() as u64 + 1) as usize).copied().unwrap_or(GmapId(1));
    match prng.below(35) {
        34 => {
            let vdisk = state.vdisks.keys().nth(prng.below(state.vdisks.len() as u64 + 1) as usize).copied();
            let scheme = *prng.pick(&[Scheme::Striped, Scheme::Chained, Scheme::Chained3]);
            Command::SetCopies { vdisk: vdisk.unwrap_or(VdiskId(1)), scheme }
        }
        26 if prng.chance(1, 8) => Command::RemoveServer { server: server_id },
        26 if prng.chance(1, 8) => Command::ReplaceAfter { seconds: prng.below(3) as u32 },
        26 if prng.chance(1, 3) => Command::StayedAway { server: server_id, incarnation },
        26 => Command::Drain { server: server_id, drained: prng.chance(1, 2) },
        27 => Command::Reconfigure {
            gmap,
            planned_from: state.planned_from(gmap) + u64::from(prng.chance(1, 8)),
            moves: (0..prng.below(20))
                .map(|_| {
                    let slot = prng.below(257) as u32;
                    (slot, (0..prng.between(1, 3)).map(|_| ServerId(prng.between(1, 5) as u16)).collect())
                })
                .collect(),
            more: prng.chance(1, 4),
        },
        28 | 29 => match crate::mover::next_step(state, gmap) {
            Some(command) => command,
            None => Command::AbortReconfiguration { gmap },
        },
        30 => {
            let slots = random_slots(prng, state).into_iter().map(|(id, term)| (id.slot, term)).collect();
            Command::Fence { gmap, slots }
        }
        31 => {
            let slots = random_slots(prng, state).into_iter().map(|(id, term)| (id.slot, term)).collect();
            Command::Moved { gmap, slots }
        }
        32 => Command::PauseReconfiguration { gmap, paused: prng.chance(1, 2) },
        33 => Command::AbortReconfiguration { gmap },
        19 => Command::Snapshot {
            of: [vdisk, other]
                .into_iter()
                .take(1 + prng.below(2) as usize)
                .map(|vdisk| SnapshotOf { vdisk, epoch: epoch(vdisk), name: name.clone() })
                .collect(),
            made: 0,
            protected: prng.chance(1, 4),
        },
        20 => Command::Clone { source: vdisk, epoch: epoch(vdisk), name, made: 0 },
        21 => Command::Rollback {
            vdisk,
            epoch: epoch(vdisk),
            to: other,
            keep: prng.chance(1, 2).then_some(name),
            made: 0,
        },
        22 => Command::DeleteDisks { vdisks: vec![vdisk, other] },
        23 => Command::Protect { vdisk, protected: prng.chance(1, 4) },
        24 => Command::SetPolicy { vdisk, policy: Policy { hourly: 1, daily: 0, weekly: prng.below(2000) as u16 } },
        25 => some_flatten(state, prng, vdisk),
        17 => Command::ReplaceDisks {
            server: server_id,
            incarnation,
            disks: vec![DiskId(u128::from(server)), DiskId(prng.next_u64().into())],
            votes_lost: prng.chance(1, 2),
            accept_data_loss: prng.chance(1, 2),
        },
        18 => Command::DiskFailed { server: server_id, incarnation, why: "it hangs".into() },
        10 | 11 => Command::Suspect { server: server_id, incarnation },
        12 => Command::ServerDown { server: server_id, incarnation, suspect },
        13 => Command::Reinstate { server: server_id, incarnation, suspect },
        14 => Command::InSync { server: server_id, incarnation, slots: random_slots(prng, state) },
        16 => Command::Goodbye { server: server_id, incarnation },
        15 => Command::TakeOut { server: server_id, slots: random_slots(prng, state) },
        0 => Command::AddServer { addresses: vec!["h:1".into()], token: u128::from(prng.between(1, 3)) },
        1 => {
            let now = state.servers.get(&ServerId(server)).map_or(0, |s| s.incarnation.0);
            server_up(server, now + prng.below(3), &[(u128::from(server), now)])
        }
        2 | 3 => Command::CreateDisk {
            name,
            size: prng.below(3) * 512,
            scheme: *prng.pick(&[Scheme::Striped, Scheme::Chained, Scheme::Chained3]),
            stripe_unit: ELEMENT_SIZE << prng.below(3),
        },
        4 => Command::DeleteDisk { vdisk },
        5 => Command::RenameDisk { vdisk, name },
        6 => Command::ResizeDisk { vdisk, size: prng.below(4) * 512, session: SessionId(prng.below(64)) },
        7 | 8 => Command::Attach {
            vdisk,
            mode: *prng.pick(&[Attachment::Exclusive, Attachment::Shared, Attachment::ReadOnly]),
            holder: "h".into(),
            take_over: prng.chance(1, 2),
        },
        _ => Command::Detach { session: SessionId(prng.below(state.index + 2)) },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_history_leaves_a_consistent_state_that_is_the_same_everywhere(seed: u64) {
        let mut prng = Prng::new(seed);
        let (mut a, mut b) = (State::genesis(&genesis(3)), State::genesis(&genesis(3)));
        let mut log: Vec<Entry> = Vec::new();
        for step in 1..=120u64 {
            let again = !log.is_empty() && prng.chance(1, 8);
            let entry = if again {
                prng.pick(&log).clone()
            } else {
                let (proposer, number) = (step % 3, step);
                let finished_below = number.saturating_sub(prng.below(9));
                Entry { id: CommandId { proposer, number, finished_below }, command: random_command(&mut prng, &a) }
            };
            log.push(entry.clone());
            let before = a.clone();
            let (result, effects) = a.apply(&entry);
            prop_assert_eq!(b.apply(&entry), (result.clone(), effects.clone()));
            prop_assert_eq!(a.complaint(), None);
            prop_assert_eq!(a.index, step);
            if result.is_err() {
                prop_assert_eq!(&effects, &Effects::default());
                prop_assert_eq!(&a.vdisks, &before.vdisks);
                prop_assert_eq!(&a.slots, &before.slots);
            }
            for (id, slot) in a.all_slots() {
                let old = before.slot(id).map_or(0, |s| s.term);
                prop_assert_eq!(effects.slots.contains(&id), slot.term != old, "a new term is told: {:?}", id);
            }
            // A server that starts from the other's bytes goes on the same way.
            if prng.chance(1, 16) {
                b = State::decode(&a.encode()).unwrap();
            }
        }
        prop_assert_eq!(a, b);
    }
}

// ------------------------------------------------------------------------------------------------
// Failures.

fn member_states(f: &Fixture, slot: u32) -> (Vec<u16>, Term) {
    let slots = f.state.slots.values().next().expect("a disk was made");
    (slots[slot as usize].in_sync().map(|s| s.0).collect(), slots[slot as usize].term)
}

fn suspect(f: &mut Fixture, server: u16) -> StateIndex {
    f.run(Command::Suspect { server: ServerId(server), incarnation: Incarnation(1) }).unwrap();
    f.state.index
}

fn down(server: u16, suspect: StateIndex) -> Command {
    Command::ServerDown { server: ServerId(server), incarnation: Incarnation(1), suspect }
}

#[test]
fn suspicion_moves_nothing_and_a_server_down_leaves_the_sets_of_others() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let before = member_states(&f, 0);
    assert_eq!(before.0, [1, 2]);
    let index = suspect(&mut f, 1);
    assert_eq!(member_states(&f, 0), before);
    assert!(f.effects.names.contains(&ServerId(1)) && f.effects.slots.is_empty());
    assert_eq!(f.run(down(1, index - 1)), Err(CommandError::Overtaken), "another suspicion");
    f.run(down(1, index)).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index));
    assert_eq!(member_states(&f, 1).0, [2, 3], "not its slot");
    assert!(member_states(&f, 1).1 < f.state.index);
    let slot = SlotId { gmap: *f.state.slots.keys().next().unwrap(), slot: 0 };
    assert_eq!(f.state.acting(slot), Some(ServerId(2)));
}

#[test]
fn the_last_in_sync_member_stays_and_leads_when_it_is_back() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let first = suspect(&mut f, 1);
    f.run(down(1, first)).unwrap();
    let second = suspect(&mut f, 2);
    f.run(down(2, second)).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index), "I3, and a term of its own");
    f.run(server_up(1, 2, &[(1, 1)])).unwrap();
    assert_eq!(member_states(&f, 0).0, [2], "what it has may be old");
    f.run(server_up(2, 2, &[(2, 1)])).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index));
}

#[test]
fn of_two_that_went_down_together_the_first_one_back_leads_alone() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let (first, second) = (suspect(&mut f, 1), suspect(&mut f, 2));
    f.run(down(1, first)).unwrap();
    assert_eq!(member_states(&f, 0).0, [1, 2], "nobody is live: everybody stays");
    f.run(down(2, second)).unwrap();
    assert_eq!(member_states(&f, 0).0, [1, 2]);
    f.run(server_up(2, 2, &[(2, 1)])).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index));
}

#[test]
fn a_reinstated_server_goes_on_in_its_terms_and_lets_go_of_those_who_are_down() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let (first, second) = (suspect(&mut f, 1), suspect(&mut f, 2));
    f.run(down(1, first)).unwrap();
    let term = member_states(&f, 1).1;
    f.run(Command::Reinstate { server: ServerId(2), incarnation: Incarnation(1), suspect: second }).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index));
    assert_eq!(member_states(&f, 1), (vec![2, 3], term));
    assert_eq!(f.run(down(2, second)), Err(CommandError::Overtaken));
}

#[test]
fn a_member_comes_back_only_in_the_term_and_life_in_which_it_caught_up() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let slot = SlotId { gmap: *f.state.slots.keys().next().unwrap(), slot: 0 };
    let index = suspect(&mut f, 1);
    f.run(down(1, index)).unwrap();
    let term = f.state.index;
    let back = |incarnation, term| Command::InSync {
        server: ServerId(1),
        incarnation: Incarnation(incarnation),
        slots: vec![(slot, term)],
    };
    assert_eq!(f.run(back(1, term)), Err(CommandError::Overtaken), "it is down");
    f.run(server_up(1, 2, &[(1, 1)])).unwrap();
    assert_eq!(f.run(back(1, term)), Err(CommandError::Overtaken));
    assert_eq!(f.run(back(2, term - 1)), Err(CommandError::Overtaken));
    f.run(back(2, term)).unwrap();
    assert_eq!(member_states(&f, 0), (vec![1, 2], f.state.index));
    assert_eq!(f.effects.names, [ServerId(1), ServerId(2)].into());
}

#[test]
fn a_member_is_taken_out_only_if_a_live_one_remains() {
    let mut f = Fixture::up(4);
    f.disk("a");
    let slot = SlotId { gmap: *f.state.slots.keys().next().unwrap(), slot: 0 };
    let take_out = |server, term| Command::TakeOut { server: ServerId(server), slots: vec![(slot, term)] };
    let term = member_states(&f, 0).1;
    f.run(take_out(1, term)).unwrap();
    assert_eq!(member_states(&f, 0), (vec![2], f.state.index));
    assert_eq!(f.run(take_out(2, f.state.index)), Err(CommandError::Overtaken));
}

#[test]
fn who_says_goodbye_is_down_at_once_and_leaves_nobody_to_wait_for() {
    let mut f = Fixture::up(3);
    f.disk("a");
    let goodbye = |server, life| Command::Goodbye { server: ServerId(server), incarnation: Incarnation(life) };
    assert_eq!(f.run(goodbye(2, 7)), Err(CommandError::Overtaken), "another life of it");
    f.run(goodbye(2, 1)).unwrap();
    assert_eq!(f.effects.downs, [ServerId(2)]);
    assert!(f.effects.names.contains(&ServerId(2)));
    let state = &f.state;
    for (_, slot) in state.all_slots() {
        assert!(!slot.in_sync().any(|s| s == ServerId(2)));
        assert!(!slot.has_unaware(&state.servers), "its lease is over: nobody waits for it");
        let was_member = slot.member(ServerId(2)).is_some();
        assert_eq!(slot.term == state.index, was_member);
    }
    assert_eq!(f.run(goodbye(2, 1)), Err(CommandError::Overtaken), "once");
    // The last copy stays in sync, whoever goes (I3), and comes back as it went.
    f.run(goodbye(1, 1)).unwrap();
    let failed = Command::DiskFailed { server: ServerId(3), incarnation: Incarnation(1), why: "it hangs".into() };
    f.run(failed).unwrap();
    assert!(f.state.all_slots().all(|(_, slot)| slot.in_sync().count() == 1));
    f.run(server_up(3, 2, &[(3, 1)])).unwrap();
    assert!(!f.state.servers[&ServerId(3)].down);
}
