//! Snapshots that the cluster makes and deletes by itself (2.9): `petal snapshot policy`.
//!
//! The leader of the ring looks every [`LOOK_EVERY`] at every disk that has a policy. Of each kind (hourly, daily,
//! weekly) it makes one snapshot in every hour, day or week of UTC that comes while it looks; what was missed while
//! nobody led is not made up for. Of each kind the newest are kept, as many as the policy says; of the others those go
//! that are neither protected nor attached.
//!
//! *Once, whoever leads.* A snapshot is named by its hour, day or week, and the command is conditional on the epoch that
//! the disk writes. So a second leader, or a second try, finds the name taken or the epoch over, and makes nothing.
//!
//! *Wall time* comes in from the driver. It chooses names, and when something is proposed; nothing that must be right
//! depends on it (P9). What is newest is said by the state index at which it was made: a leader whose clock is wrong
//! gives names that are wrong, and makes one snapshot in each of *its* hours; it deletes nothing too early.
//!
//! What somebody deleted by hand within its hour, day or week is not made again: the disk remembers the last of each kind
//! ([`Automatic`](crate::translator::vdir::Automatic)).

use crate::global_state::{Command, CommandError, Outcome, SnapshotOf, State};
use crate::ids::*;
use crate::message::CommandId;
use crate::translator::vdir::{Kind, Vdisk};
use std::collections::BTreeMap;
use stdx::{Duration, Instant};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What was refused for a reason that passes is asked for again after so long, in the same hour, day or week.
const AGAIN: Duration = Duration::from_secs(60);
/// Commands that are under way at one time: with 10,000 disks that are due at one moment, a few seconds.
const PROPOSED_MAX: usize = 64;
/// Snapshots that one command deletes.
const DELETED_AT_ONCE: usize = 64;

/// What the leader does about policies.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    /// Seconds since 1970, and when that was.
    wall: Option<(u64, Instant)>,
    look_at: Option<Instant>,
    /// What is under way, of each disk.
    proposed: BTreeMap<VdiskId, CommandId>,
    /// The name of the last snapshot of each kind that was proposed: what was refused is not proposed all the time.
    made: BTreeMap<(VdiskId, Kind), String>,
    /// Disks of which something was refused, and when that is tried again; none: at the next look it is known when.
    refused: BTreeMap<VdiskId, Option<Instant>>,
}

impl Policies {
    /// The driver tells the time.
    pub fn on_wall_clock(&mut self, now: Instant, unix_seconds: u64) {
        self.wall = Some((unix_seconds, now));
    }

    /// What is to be proposed now, at most one command for each disk. [`Policies::on_proposed`] tells as what.
    pub fn look(&mut self, now: Instant, state: &State) -> Vec<(VdiskId, Command)> {
        let Some((seconds, at)) = self.wall else { return Vec::new() };
        if self.look_at.is_some_and(|at| at > now) {
            return Vec::new();
        }
        self.look_at = Some(now + LOOK_EVERY);
        let seconds = seconds + now.since(at).as_secs();
        self.proposed.retain(|_, id| !state.is_executed(id));
        for (disk, again) in &mut self.refused {
            if *again.get_or_insert(now + AGAIN) <= now {
                self.made.retain(|(of, _), _| of != disk);
            }
        }
        self.refused.retain(|_, again| again.is_some_and(|at| at > now));
        let with_policy = |disk: &VdiskId| state.vdisk(*disk).is_some_and(|d| !d.policy.is_empty());
        self.made.retain(|(disk, _), _| with_policy(disk));
        let mut automatic: BTreeMap<VdiskId, [Vec<&Vdisk>; 3]> = BTreeMap::new();
        for disk in state.vdisks.values() {
            if let Some(of) = disk.snapshot_of {
                let name = disk.name.split_once('@').map_or("", |(_, name)| name);
                let is_foreign = disk.imported.begun.is_some();
                if let (Some(kind), true, false) = (Kind::of(name), with_policy(&of), is_foreign) {
                    automatic.entry(of).or_default()[kind as usize].push(disk);
                }
            } else if !disk.policy.is_empty() {
                automatic.entry(disk.id).or_default();
            }
        }
        let mut wanted = Vec::new();
        for (id, snapshots) in automatic {
            if self.proposed.len() + wanted.len() >= PROPOSED_MAX {
                // The rest when these are decided.
                break;
            }
            if self.proposed.contains_key(&id) {
                continue;
            }
            let disk = state.vdisk(id).expect("just found");
            // What an import has written a part of is no state to be kept; of what is flattened nothing is made.
            let is_no_time = disk.is_importing() || state.flattening(id).is_some();
            let due = if is_no_time { None } else { self.due(state, disk, seconds) };
            let command = due.or_else(|| over(disk, snapshots));
            wanted.extend(command.map(|command| (id, command)));
        }
        wanted
    }

    /// The next snapshot of a disk that is due.
    fn due(&mut self, state: &State, disk: &Vdisk, seconds: u64) -> Option<Command> {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.keeps(disk.policy) > 0) {
            let name = kind.name(seconds);
            let is_there = state.vdisk_named(&format!("{}@{name}", disk.name)).is_some();
            // A leader whose clock is a little behind that of the one before comes to an hour that is over.
            let is_over = |made: u64| (seconds..seconds + kind.seconds()).contains(&made);
            let was_there = disk.automatic.last(kind).is_some_and(|made| kind.name(made) == name || is_over(made));
            if is_there || was_there || self.made.get(&(disk.id, kind)) == Some(&name) {
                continue;
            }
            self.made.insert((disk.id, kind), name.clone());
            let of = vec![SnapshotOf { vdisk: disk.id, epoch: disk.epoch, name }];
            return Some(Command::Snapshot { of, made: seconds, protected: false });
        }
        None
    }

    /// A command that `look` wanted is under way.
    pub fn on_proposed(&mut self, disk: VdiskId, id: CommandId) {
        self.proposed.insert(disk, id);
    }

    /// A command was applied.
    pub fn on_executed(&mut self, id: CommandId, result: &Result<Outcome, CommandError>) {
        let is_same = |(_, own): &(&VdiskId, &CommandId)| (own.proposer, own.number) == (id.proposer, id.number);
        let Some(disk) = self.proposed.iter().find(is_same).map(|(disk, _)| *disk) else { return };
        self.proposed.remove(&disk);
        match result {
            Ok(_) => {}
            // Somebody else made a snapshot of it at the same time: again, of its present epoch.
            Err(CommandError::Overtaken) => self.made.retain(|(of, _), _| *of != disk),
            // These pass by themselves.
            Err(CommandError::IsFlattened { .. } | CommandError::ImportUnfinished { .. }) => {
                self.refused.insert(disk, None);
            }
            Err(_) => {}
        }
        // There may be more to do.
        self.look_at = None;
    }

    /// This server does not lead: nothing of it is wanted any more.
    pub fn step_down(&mut self) -> Vec<CommandId> {
        self.look_at = None;
        self.made.clear();
        self.refused.clear();
        std::mem::take(&mut self.proposed).into_values().collect()
    }
}

/// Those that have been kept for long enough.
fn over(disk: &Vdisk, snapshots: [Vec<&Vdisk>; 3]) -> Option<Command> {
    let mut going = Vec::new();
    for (kind, mut snapshots) in Kind::ALL.into_iter().zip(snapshots) {
        let keeps = kind.keeps(disk.policy);
        if keeps == 0 {
            // A kind that the policy does not have: nobody said that its snapshots are to go.
            continue;
        }
        snapshots.sort_by_key(|s| (s.id.index(), s.id));
        let over = snapshots.len().saturating_sub(keeps);
        let may_go = |s: &&&Vdisk| !s.protected && s.sessions.is_empty();
        going.extend(snapshots[..over].iter().filter(may_go).map(|s| s.id));
    }
    going.truncate(DELETED_AT_ONCE);
    going.sort_unstable();
    (!going.is_empty()).then_some(Command::DeleteDisks { vdisks: going })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_state::{Attachment, Fixture};
    use crate::translator::vdir::{ForeignState, Policy};

    /// 2026-11-29 02:15:07 UTC, a Sunday.
    const SUNDAY: u64 = 1_795_918_507;
    const HOUR: u64 = 3600;

    /// A ring of one, in one body: what the leader proposes is applied at once.
    struct Led {
        f: Fixture,
        policies: Policies,
        now: Instant,
        proposals: u64,
    }

    impl Led {
        fn new() -> Led {
            Led { f: Fixture::up(3), policies: Policies::default(), now: Instant::ZERO, proposals: 0 }
        }

        fn disk(&mut self, name: &str, hourly: u16, daily: u16, weekly: u16) -> VdiskId {
            let vdisk = self.f.disk(name);
            self.f.run(Command::SetPolicy { vdisk, policy: Policy { hourly, daily, weekly } }).unwrap();
            vdisk
        }

        /// One look, some time after the last one.
        fn look(&mut self) -> Vec<(VdiskId, Command)> {
            self.now += LOOK_EVERY;
            self.policies.look(self.now, &self.f.state)
        }

        /// Everything that is due at a moment; what came of each command.
        fn at(&mut self, unix_seconds: u64) -> Vec<Result<Outcome, CommandError>> {
            let mut results = Vec::new();
            loop {
                self.policies.on_wall_clock(self.now + LOOK_EVERY, unix_seconds);
                let wanted = self.look();
                if wanted.is_empty() {
                    return results;
                }
                for (disk, command) in wanted {
                    let id = self.propose(disk);
                    let result = self.f.run(command);
                    self.policies.on_executed(id, &result);
                    results.push(result);
                }
            }
        }

        fn propose(&mut self, disk: VdiskId) -> CommandId {
            self.proposals += 1;
            let id = CommandId { proposer: 9, number: self.proposals, finished_below: 0 };
            self.policies.on_proposed(disk, id);
            id
        }

        fn snapshots(&self) -> Vec<&str> {
            self.f.state.vdisks.values().filter(|v| v.is_snapshot()).map(|v| v.name.as_str()).collect()
        }
    }

    #[test]
    fn one_of_each_kind_is_made_in_its_hour_day_and_week() {
        let mut led = Led::new();
        led.disk("db", 2, 2, 2);
        led.at(SUNDAY);
        let first = ["db@auto-hourly-2026-11-29T02", "db@auto-daily-2026-11-29", "db@auto-weekly-2026-W48"];
        assert_eq!(led.snapshots(), first);
        assert_eq!(led.at(SUNDAY + 60), []);
        led.at(SUNDAY + HOUR);
        assert_eq!(led.snapshots()[3..], ["db@auto-hourly-2026-11-29T03"]);
        led.at(SUNDAY + 22 * HOUR);
        let monday = ["db@auto-hourly-2026-11-30T00", "db@auto-daily-2026-11-30", "db@auto-weekly-2026-W49"];
        assert_eq!(led.snapshots()[3..], monday, "and the oldest of two hourly ones has gone");
        assert_eq!(led.f.state.vdisk_named(monday[0]).unwrap().made, SUNDAY + 22 * HOUR);
    }

    #[test]
    fn the_oldest_go_when_there_are_more_than_are_kept_but_not_those_that_are_protected_or_attached() {
        let mut led = Led::new();
        led.disk("db", 2, 0, 0);
        led.at(SUNDAY);
        led.at(SUNDAY + HOUR);
        let protected = led.f.state.vdisk_named("db@auto-hourly-2026-11-29T02").unwrap().id;
        let attached = led.f.state.vdisk_named("db@auto-hourly-2026-11-29T03").unwrap().id;
        led.f.run(Command::Protect { vdisk: protected, protected: true }).unwrap();
        let session = led.f.attach(attached, Attachment::ReadOnly, false).unwrap();
        let own = led.f.state.vdisk_named("db").unwrap().clone();
        let of = vec![SnapshotOf { vdisk: own.id, epoch: own.epoch, name: "auto-hourly-mine".into() }];
        led.f.run(Command::Snapshot { of, made: 0, protected: false }).unwrap();
        for hour in 2..6 {
            led.at(SUNDAY + hour * HOUR);
        }
        let kept = [
            "db@auto-hourly-2026-11-29T02",
            "db@auto-hourly-2026-11-29T03",
            "db@auto-hourly-mine",
            "db@auto-hourly-2026-11-29T06",
            "db@auto-hourly-2026-11-29T07",
        ];
        assert_eq!(led.snapshots(), kept);
        led.f.run(Command::Detach { session }).unwrap();
        led.f.run(Command::Protect { vdisk: protected, protected: false }).unwrap();
        led.at(SUNDAY + 5 * HOUR);
        assert_eq!(led.snapshots(), kept[2..]);
    }

    #[test]
    fn a_new_leader_makes_nothing_twice_nor_does_a_late_command_of_the_old_one() {
        let mut led = Led::new();
        led.disk("db", 24, 0, 0);
        led.policies.on_wall_clock(led.now, SUNDAY);
        let [(_, late)] = &led.look()[..] else { panic!("one is due") };
        let late = late.clone();
        // Another server leads; its command is decided first.
        led.policies = Policies::default();
        assert_eq!(led.at(SUNDAY).len(), 1);
        assert!(led.f.run(late).is_err());
        assert_eq!((led.snapshots().len(), led.at(SUNDAY).len()), (1, 0));
        // A third one knows of neither.
        led.policies = Policies::default();
        assert_eq!(led.at(SUNDAY), []);
    }

    #[test]
    fn a_new_leader_whose_clock_is_a_little_behind_makes_nothing_of_the_hour_that_is_over() {
        let mut led = Led::new();
        led.disk("db", 1, 1, 1);
        led.at(SUNDAY);
        let full_hour = SUNDAY - SUNDAY % HOUR + HOUR;
        led.at(full_hour + 1);
        let hourly = "db@auto-hourly-2026-11-29T03";
        led.policies = Policies::default();
        assert_eq!(led.at(full_hour - 9), [], "the one of the hour before has gone, and does not come again");
        assert!(led.snapshots().contains(&hourly));
        assert_eq!(led.at(full_hour + 5), []);
        assert_eq!(led.at(full_hour + HOUR).len(), 2, "one is made, one goes");
    }

    #[test]
    fn snapshots_that_were_imported_are_not_the_policys() {
        let mut led = Led::new();
        let disk = led.disk("db", 1, 0, 0);
        let foreign =
            ForeignState { cluster: ClusterId(9), family: FamilyId(1), lineage: LineageId(1), epoch: Epoch(4) };
        let session = led.f.attach(disk, Attachment::Import, false).unwrap();
        let seen = led.f.state.vdisk(disk).unwrap().imported;
        led.f.run(Command::BeginImport { vdisk: disk, session, seen, to: foreign }).unwrap();
        let name = "auto-hourly-2026-11-29T01".into();
        led.f.run(Command::EndImport { vdisk: disk, session, name, made: SUNDAY }).unwrap();
        led.f.run(Command::Detach { session }).unwrap();
        led.at(SUNDAY);
        led.at(SUNDAY + HOUR);
        assert_eq!(led.snapshots(), ["db@auto-hourly-2026-11-29T01", "db@auto-hourly-2026-11-29T03"]);
    }

    #[test]
    fn what_was_refused_is_tried_again_within_its_hour() {
        let mut led = Led::new();
        let disk = led.disk("db", 1, 0, 0);
        let epoch = led.f.state.vdisk(disk).unwrap().epoch;
        let clone = Command::Clone { source: disk, epoch, name: "copy".into(), made: 0 };
        let Ok(Outcome::Disk(copy)) = led.f.run(clone) else { panic!() };
        led.f.run(Command::SetPolicy { vdisk: copy, policy: Policy { hourly: 1, daily: 0, weekly: 0 } }).unwrap();
        led.f.run(Command::SetPolicy { vdisk: disk, policy: Policy::default() }).unwrap();
        led.policies.on_wall_clock(led.now, SUNDAY);
        let [(of, due)] = &led.look()[..] else { panic!("one is due") };
        assert_eq!(*of, copy);
        // Somebody else's command comes first, and it is refused.
        let flatten = |wanted| Command::Flatten { vdisk: copy, wanted };
        led.f.run(flatten(true)).unwrap();
        let id = led.propose(copy);
        let refused = led.f.run(due.clone());
        assert!(matches!(refused, Err(CommandError::IsFlattened { .. })));
        led.policies.on_executed(id, &refused);
        assert_eq!(led.at(SUNDAY + 5), [], "while it is flattened nothing is asked for");
        led.f.run(flatten(false)).unwrap();
        assert_eq!(led.at(SUNDAY + 10), [], "not all the time");
        led.now += AGAIN;
        assert_eq!(led.at(SUNDAY + 70).len(), 1);
    }

    #[test]
    fn who_was_overtaken_by_another_snapshot_tries_again() {
        let mut led = Led::new();
        let disk = led.disk("db", 24, 0, 0);
        led.policies.on_wall_clock(led.now, SUNDAY);
        let [(_, command)] = &led.look()[..] else { panic!("one is due") };
        let command = command.clone();
        let id = led.propose(disk);
        assert_eq!(led.look(), [], "one command of a disk is under way at one time");
        let epoch = led.f.state.vdisk(disk).unwrap().epoch;
        let of = vec![SnapshotOf { vdisk: disk, epoch, name: "by-hand".into() }];
        led.f.run(Command::Snapshot { of, made: 0, protected: false }).unwrap();
        let result = led.f.run(command);
        assert_eq!(result, Err(CommandError::Overtaken));
        led.policies.on_executed(id, &result);
        assert_eq!(led.at(SUNDAY).len(), 1);
        assert_eq!(led.snapshots(), ["db@by-hand", "db@auto-hourly-2026-11-29T02"]);
    }

    #[test]
    fn missed_hours_are_not_made_up_for() {
        let mut led = Led::new();
        led.disk("db", 24, 0, 0);
        led.at(SUNDAY);
        led.at(SUNDAY + 9 * HOUR);
        assert_eq!(led.snapshots(), ["db@auto-hourly-2026-11-29T02", "db@auto-hourly-2026-11-29T11"]);
    }

    #[test]
    fn what_was_deleted_by_hand_stays_away_until_the_next_hour() {
        let mut led = Led::new();
        led.disk("db", 24, 0, 0);
        led.at(SUNDAY);
        let made = led.f.state.vdisk_named("db@auto-hourly-2026-11-29T02").unwrap().id;
        led.f.run(Command::DeleteDisks { vdisks: vec![made] }).unwrap();
        assert_eq!(led.at(SUNDAY + 60), []);
        led.policies = Policies::default();
        assert_eq!(led.at(SUNDAY + 120), [], "whoever leads");
        assert_eq!(led.at(SUNDAY + HOUR).len(), 1);
    }

    #[test]
    fn a_clock_that_goes_back_deletes_nothing_that_is_newer() {
        let mut led = Led::new();
        led.disk("db", 3, 0, 0);
        for hour in 0..3 {
            led.at(SUNDAY + hour * HOUR);
        }
        let back = SUNDAY - 100 * HOUR;
        led.policies = Policies::default();
        led.at(back);
        let left = ["db@auto-hourly-2026-11-29T03", "db@auto-hourly-2026-11-29T04", "db@auto-hourly-2026-11-24T22"];
        assert_eq!(led.snapshots(), left);
        assert_eq!(led.at(back + 60), [], "and it does not go on so");
    }

    #[test]
    fn without_a_policy_or_without_a_clock_nothing_is_done() {
        let mut led = Led::new();
        led.f.disk("other");
        let disk = led.disk("db", 1, 0, 0);
        assert_eq!(led.look(), [], "nobody has told the time");
        led.at(SUNDAY);
        led.at(SUNDAY + HOUR);
        led.f.run(Command::SetPolicy { vdisk: disk, policy: Policy::default() }).unwrap();
        assert_eq!(led.at(SUNDAY + 2 * HOUR), []);
        assert_eq!(led.snapshots(), ["db@auto-hourly-2026-11-29T03"], "what was made stays");
    }

    #[test]
    fn many_disks_take_their_turns() {
        let mut led = Led::new();
        for n in 0..3 * PROPOSED_MAX {
            led.disk(&format!("d{n}"), 1, 0, 0);
        }
        led.policies.on_wall_clock(led.now, SUNDAY);
        assert_eq!(led.look().len(), PROPOSED_MAX);
        led.policies = Policies::default();
        assert_eq!(led.at(SUNDAY).len(), 3 * PROPOSED_MAX);
    }
}
