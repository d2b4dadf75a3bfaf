//! The keeper: an operator who snapshots, clones, rolls back and deletes, at the worst moments.
//!
//! He does as the programs do: looks at the state of some server, which may lag, and asks for what that lets expect.
//! Another operator renames, resizes and deletes disks at the same time, servers and clients die, and so does he:
//! then nobody knows whether what he asked for was done, until somebody attaches it by its name or sees it in a state.

use crate::checkers::snapshots::Taken;
use crate::counters::Kind;
use crate::event::Event;
use crate::families::Point;
use crate::options::SnapshotMix;
use crate::workload::{Asked, Call, Disk, Role, draw_weighted};
use crate::world::World;
use petal::client::{Request, RequestError, Response};
use petal::global_state::{Attachment, Command, CommandError, Outcome, SnapshotOf, State, split_name};
use petal::ids::{SessionId, StateIndex, VdiskId};
use petal::message::{AdminError, AdminRequest, AdminResponse};
use petal::translator::vdir::{Policy, Vdisk};
use std::collections::{BTreeMap, BTreeSet};
use stdx::Duration;

/// A snapshot or a clone that was asked for.
#[derive(Clone, Debug)]
pub struct Birth {
    /// Of a snapshot: its disk.
    pub of: Option<VdiskId>,
    /// Whose hot set it has.
    pub source: VdiskId,
    /// The command that closes what it stands on; a clone of a snapshot stands on what is closed.
    pub taking: Option<usize>,
}

/// A call of the keeper.
#[derive(Clone, Debug)]
pub enum Kept {
    /// What is there?
    Look,
    /// Snapshots: of which disks, by which names.
    Snapshot {
        /// Of which disks, by which names.
        of: Vec<(VdiskId, String)>,
        /// When.
        taking: usize,
    },
    /// A clone.
    Clone {
        /// Its name.
        name: String,
        /// When, if it is of a disk.
        taking: Option<usize>,
    },
    /// A disk goes back.
    Rollback {
        /// Which.
        vdisk: VdiskId,
        /// When; what it held until then may be kept.
        taking: usize,
        /// It is.
        keeps: bool,
    },
    /// Deletions.
    Delete {
        /// Of what.
        vdisks: Vec<VdiskId>,
        /// Clones stand on some of it.
        are_parents: bool,
    },
    /// Protects or releases.
    Protect,
    /// Sets a policy.
    Policy,
    /// Flattens, or stops that.
    Flatten {
        /// Which of these.
        wanted: bool,
    },
    /// Ends a session.
    Evict {
        /// Whose.
        session: SessionId,
    },
}

/// What takes several calls: first nobody may have it attached any more.
#[derive(Clone, Debug)]
pub enum Intent {
    /// Delete these.
    Delete(Vec<VdiskId>),
    /// Take this disk back to that snapshot.
    Rollback(VdiskId, VdiskId),
}

impl Intent {
    fn vdisks(&self) -> Vec<VdiskId> {
        match self {
            Intent::Delete(vdisks) => vdisks.clone(),
            Intent::Rollback(vdisk, _) => vec![*vdisk],
        }
    }
}

/// Calls after which the keeper gives up something that takes several.
const TRIES_MAX: u32 = 8;
/// How often somebody tries to attach what is just being made.
const EAGER_TRIES: u32 = 12;
/// Sessions that one client may hold by that.
const EAGER_SESSIONS_MAX: usize = 6;

impl World {
    /// The keeper thinks of something.
    pub(crate) fn keep(&mut self, host: usize) {
        if self.workload.stopped || !self.workload.is_set_up() {
            return;
        }
        let (request, deadline) = (AdminRequest::State, Some(Duration::from_secs(1)));
        self.ask(host, Request::Call { to: None, request, deadline }, Asked::Admin(Call::Kept(Kept::Look)));
    }

    fn ask_kept(&mut self, host: usize, command: Command, kept: Kept) {
        self.execute(host, command, Call::Kept(kept));
    }

    pub(crate) fn on_kept(&mut self, host: usize, kept: Kept, result: Result<Response, RequestError>) {
        match (kept, result) {
            (Kept::Look, Ok(Response::Admin(AdminResponse::State(bytes)))) => match State::decode(&bytes) {
                Ok(state) => self.on_looked(host, &state),
                Err(why) => self.complain(format!("a server tells a state that is none: {why}")),
            },
            (kept, Ok(Response::Admin(AdminResponse::Executed { index, outcome, unsettled }))) => {
                self.trace.words(self.now, || format!("not settled at {unsettled:?}"));
                self.on_kept_done(kept, index, outcome, unsettled.is_empty());
            }
            (kept, Err(error)) => self.on_kept_error(kept, &error),
            (kept, Ok(response)) => self.complain(format!("the keeper's {kept:?} was answered with {response:?}")),
        }
    }

    /// Makes known what somebody has seen, if it was asked for by that name.
    pub(crate) fn adopt(&mut self, vdisk: VdiskId, name: &str) {
        if self.workload.disks.contains_key(&vdisk) {
            return;
        }
        let (disk, snapshot) = split_name(name);
        let key = snapshot.unwrap_or(disk);
        let Some(birth) = self.workload.births.get(key) else { return };
        let source = &self.workload.disks[&birth.source];
        let new = Disk {
            of: birth.of,
            taken: birth.taking,
            names: vec![key.into()],
            layout: source.layout.clone(),
            full_size: source.full_size,
            resized: false,
            deleting: false,
        };
        self.workload.disks.insert(vdisk, new);
    }

    /// The same for everything in a state.
    pub(crate) fn adopt_all(&mut self, state: &State) {
        for disk in state.vdisks.values() {
            self.adopt(disk.id, &disk.name);
            let (of, snapshot) = split_name(&disk.name);
            let name = snapshot.unwrap_or(of).to_string();
            // Another one may have renamed it.
            if let Some(known) = self.workload.disks.get_mut(&disk.id).filter(|d| !d.names.contains(&name)) {
                known.names.push(name);
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // What he does.

    fn on_looked(&mut self, host: usize, state: &State) {
        self.adopt_all(state);
        let (Some(mix), false) = (self.options.snapshots, self.workload.stopped) else { return };
        if let Some((intent, tries)) = self.workload.intent.take() {
            return self.pursue(host, state, intent, tries);
        }
        let known = &self.workload.disks;
        let there: Vec<&Vdisk> =
            state.vdisks.values().filter(|v| known.get(&v.id).is_some_and(|d| !d.deleting)).collect();
        let (snapshots, disks): (Vec<&Vdisk>, Vec<&Vdisk>) = there.into_iter().partition(|v| v.is_snapshot());
        if disks.is_empty() {
            return;
        }
        let made = snapshots.len() + disks.iter().filter(|d| d.stands_on > 0).count();
        let weights = [
            mix.one,
            mix.several,
            mix.clone_snapshot,
            mix.clone_disk,
            mix.rollback,
            mix.delete,
            mix.rename,
            mix.protect,
            mix.policy,
            mix.evict,
            mix.flatten,
        ];
        let choice = draw_weighted(&mut self.workload.prng, &weights);
        let choice = if made >= mix.most && choice < 4 { 5 } else { choice };
        let prng = &mut self.workload.prng;
        let disk = *prng.pick(&disks);
        let snapshot = (!snapshots.is_empty()).then(|| *prng.pick(&snapshots));
        match (choice, snapshot) {
            (1, _) if disks.len() > 1 => {
                let mut several = disks;
                prng.shuffle(&mut several);
                let most = several.len().min(3) as u64;
                several.truncate(prng.between(2, most) as usize);
                self.take_snapshots(host, mix, &several);
            }
            (0 | 1, _) => drop(self.take_snapshots(host, mix, &[disk])),
            (2, Some(snapshot)) => drop(self.clone_of(host, mix, snapshot)),
            (3, _) => drop(self.clone_of(host, mix, disk)),
            (4, Some(snapshot)) => {
                let Some(disk) = snapshot.snapshot_of else { return };
                self.pursue(host, state, Intent::Rollback(disk, snapshot.id), 0);
            }
            (5, _) => self.delete_something(host, state, &disks, &snapshots),
            (6, Some(snapshot)) => self.rename_to_something(host, snapshot.id),
            (7, Some(snapshot)) => {
                let protected = prng.chance(1, 3);
                self.ask_kept(host, Command::Protect { vdisk: snapshot.id, protected }, Kept::Protect);
            }
            (8, _) => {
                let mut few = || prng.below(3) as u16;
                let policy = Policy { hourly: few(), daily: few(), weekly: few() };
                self.ask_kept(host, Command::SetPolicy { vdisk: disk.id, policy }, Kept::Policy);
            }
            (9, _) => self.evict_somebody(host, state),
            (10, _) => self.flatten_something(host, state, &disks),
            _ => {}
        }
    }

    /// Asks for snapshots of these disks at one instant; their names.
    pub(crate) fn take_snapshots(&mut self, host: usize, mix: SnapshotMix, disks: &[&Vdisk]) -> Vec<String> {
        let taking = self.new_taking();
        let mut of = Vec::new();
        for disk in disks {
            let name = self.workload.new_name("snap");
            let birth = Birth { of: Some(disk.id), source: disk.id, taking: Some(taking) };
            self.workload.births.insert(name.clone(), birth);
            of.push(SnapshotOf { vdisk: disk.id, epoch: disk.epoch, name });
        }
        let names: Vec<(VdiskId, String)> = of.iter().map(|s| (s.vdisk, s.name.clone())).collect();
        let protected = mix.protect > 0 && self.workload.prng.chance(1, 10);
        let full: Vec<String> = disks.iter().zip(&names).map(|(d, (_, name))| format!("{}@{name}", d.name)).collect();
        for name in &full {
            self.plan_eager(mix, name.clone(), Attachment::ReadOnly);
        }
        let made = self.now.as_nanos() / 1_000_000_000;
        self.ask_kept(host, Command::Snapshot { of, made, protected }, Kept::Snapshot { of: names, taking });
        full
    }

    /// Asks for a clone; its name.
    pub(crate) fn clone_of(&mut self, host: usize, mix: SnapshotMix, source: &Vdisk) -> String {
        let name = self.workload.new_name("disk");
        let taking = (!source.is_snapshot()).then(|| self.new_taking());
        self.workload.births.insert(name.clone(), Birth { of: None, source: source.id, taking });
        let mode = *self.workload.prng.pick(&[Attachment::Exclusive, Attachment::Shared]);
        self.plan_eager(mix, name.clone(), mode);
        let made = self.now.as_nanos() / 1_000_000_000;
        let command = Command::Clone { source: source.id, epoch: source.epoch, name: name.clone(), made };
        self.ask_kept(host, command, Kept::Clone { name: name.clone(), taking });
        name
    }

    /// A moment that begins now and ends with the answer.
    fn new_taking(&mut self) -> usize {
        let now = self.history.moment();
        self.workload.takings.push((now, None));
        self.workload.takings.len() - 1
    }

    fn delete_something(&mut self, host: usize, state: &State, disks: &[&Vdisk], snapshots: &[&Vdisk]) {
        let prng = &mut self.workload.prng;
        let clones: Vec<VdiskId> = disks.iter().filter(|d| d.stands_on > 0).map(|d| d.id).collect();
        let with_all = |disk: VdiskId| {
            let of_it = snapshots.iter().filter(move |s| s.snapshot_of == Some(disk)).map(|s| s.id);
            std::iter::once(disk).chain(of_it).collect::<Vec<_>>()
        };
        let going: Vec<VdiskId> = match prng.below(8) {
            0 if disks.len() > 1 => with_all(prng.pick(disks).id),
            1 | 2 if disks.len() > 1 && !clones.is_empty() => with_all(*prng.pick(&clones)),
            3 if snapshots.len() > 2 => {
                let mut some: Vec<VdiskId> = snapshots.iter().map(|s| s.id).collect();
                prng.shuffle(&mut some);
                some.truncate(3);
                some
            }
            // The oldest and the newest are the odd ones.
            4 => snapshots.first().map(|s| s.id).into_iter().collect(),
            5 => snapshots.last().map(|s| s.id).into_iter().collect(),
            _ if !snapshots.is_empty() => vec![prng.pick(snapshots).id],
            _ => Vec::new(),
        };
        if going.is_empty() {
            return;
        }
        if prng.chance(1, 2) {
            return self.pursue(host, state, Intent::Delete(going), 0);
        }
        self.delete_now(host, state, going);
    }

    /// Ends the sessions that are in the way, one after the other, and then does it.
    fn pursue(&mut self, host: usize, state: &State, intent: Intent, tries: u32) {
        let vdisks = intent.vdisks();
        if tries >= TRIES_MAX || vdisks.iter().any(|v| state.vdisk(*v).is_none()) {
            return;
        }
        let session = vdisks.iter().filter_map(|v| state.vdisk(*v)).find_map(|v| v.sessions.first());
        if let Some(session) = session {
            self.workload.intent = Some((intent, tries + 1));
            return self.evict(host, *session);
        }
        match intent {
            Intent::Delete(vdisks) => self.delete_now(host, state, vdisks),
            Intent::Rollback(disk, to) => self.roll_back(host, state, disk, to),
        }
    }

    fn delete_now(&mut self, host: usize, state: &State, vdisks: Vec<VdiskId>) {
        for vdisk in &vdisks {
            if let Some(disk) = self.workload.disks.get_mut(vdisk) {
                disk.deleting = true;
            }
        }
        let stood_on: BTreeSet<_> = state
            .families
            .values()
            .flat_map(|f| f.lineages.values().filter_map(move |l| l.parent.map(|(lineage, e)| (f.id, lineage, e))))
            .collect();
        let is_parent = |v: &Vdisk| match v.is_snapshot() {
            true => stood_on.contains(&(v.family, v.lineage, v.epoch)),
            false => stood_on.iter().any(|(family, lineage, _)| (*family, *lineage) == (v.family, v.lineage)),
        };
        let are_parents = vdisks.iter().filter_map(|v| state.vdisk(*v)).any(is_parent);
        self.ask_kept(host, Command::DeleteDisks { vdisks: vdisks.clone() }, Kept::Delete { vdisks, are_parents });
    }

    /// Asks for a rollback.
    pub(crate) fn roll_back(&mut self, host: usize, state: &State, vdisk: VdiskId, to: VdiskId) {
        let (Some(disk), Some(_)) = (state.vdisk(vdisk), state.vdisk(to)) else { return };
        let taking = self.new_taking();
        let keep = self.workload.prng.chance(1, 2).then(|| self.workload.new_name("snap"));
        if let Some(keep) = &keep {
            let birth = Birth { of: Some(vdisk), source: vdisk, taking: Some(taking) };
            self.workload.births.insert(keep.clone(), birth);
        }
        if let Some(known) = self.workload.disks.get_mut(&vdisk) {
            known.resized = true;
        }
        let keeps = keep.is_some();
        let made = self.now.as_nanos() / 1_000_000_000;
        let command = Command::Rollback { vdisk, epoch: disk.epoch, to, keep, made };
        self.ask_kept(host, command, Kept::Rollback { vdisk, taking, keeps });
    }

    /// Sessions of the dead are ended at any time, those of the living now and then.
    fn evict_somebody(&mut self, host: usize, state: &State) {
        let held: BTreeSet<SessionId> = self.held_sessions();
        let all: Vec<SessionId> = state.vdisks.values().flat_map(|v| v.sessions.iter().copied()).collect();
        let orphans: Vec<SessionId> = all.iter().copied().filter(|s| !held.contains(s)).collect();
        let prng = &mut self.workload.prng;
        if !orphans.is_empty() {
            let session = *prng.pick(&orphans);
            self.evict(host, session);
        } else if !all.is_empty() && prng.chance(1, 4) {
            let session = *prng.pick(&all);
            self.evict(host, session);
        }
    }

    fn held_sessions(&self) -> BTreeSet<SessionId> {
        let lives = self.clients.iter().filter_map(|c| c.life.as_ref());
        lives.flat_map(|l| l.user.sessions().iter().map(|held| held.session)).collect()
    }

    fn evict(&mut self, host: usize, session: SessionId) {
        self.ask_kept(host, Command::Detach { session }, Kept::Evict { session });
    }

    /// A disk that inherits, or now and then one that is being flattened: then that is stopped.
    fn flatten_something(&mut self, host: usize, state: &State, disks: &[&Vdisk]) {
        let inherits =
            |disk: &&&Vdisk| state.family(disk.family).is_some_and(|f| f.ancestors(disk.lineage).count() > 0);
        let able: Vec<VdiskId> = disks.iter().filter(inherits).map(|disk| disk.id).collect();
        if able.is_empty() {
            return;
        }
        let vdisk = *self.workload.prng.pick(&able);
        let wanted = state.flattening(vdisk).is_none() || self.workload.prng.chance(1, 2);
        self.ask_kept(host, Command::Flatten { vdisk, wanted }, Kept::Flatten { wanted });
    }

    // --------------------------------------------------------------------------------------------
    // What became of it.

    fn on_kept_done(&mut self, kept: Kept, index: StateIndex, outcome: Outcome, is_settled: bool) {
        let now = self.history.moment();
        let in_recovery = self.is_recovering();
        match (kept, outcome) {
            (Kept::Snapshot { of, taking }, Outcome::Disks(made)) if made.len() == of.len() => {
                self.counters.count(if of.len() > 1 { Kind::SnapshotsAtOnce } else { Kind::SnapshotMade });
                self.counters.add(Kind::SnapshotInRecovery, u64::from(in_recovery));
                self.end_taking(taking, now, is_settled);
                for (vdisk, (_, name)) in made.into_iter().zip(of) {
                    self.adopt(vdisk, &format!("?@{name}"));
                }
            }
            (Kept::Clone { name, taking }, Outcome::Disk(vdisk)) => {
                self.counters.count(if taking.is_some() { Kind::ClonedDisk } else { Kind::ClonedSnapshot });
                if let Some(taking) = taking {
                    self.end_taking(taking, now, is_settled);
                }
                self.adopt(vdisk, &name);
            }
            (Kept::Rollback { vdisk, taking, keeps }, Outcome::Done) => {
                self.counters.count(Kind::RolledBack);
                self.counters.add(Kind::RollbackKept, u64::from(keeps));
                self.end_taking(taking, now, is_settled);
                if is_settled {
                    // Whoever had it attached before has nothing to do with it any more.
                    self.history.fence(vdisk, SessionId(index));
                }
            }
            (Kept::Delete { vdisks, are_parents }, Outcome::Done) => {
                let snapshots = vdisks.iter().filter(|v| self.workload.is_snapshot(**v)).count() as u64;
                self.counters.add(Kind::SnapshotDeleted, snapshots);
                self.counters.add(Kind::ParentDeleted, u64::from(are_parents));
                self.counters.add(Kind::DeletedInRecovery, u64::from(in_recovery));
            }
            (Kept::Protect, Outcome::Done) => self.counters.count(Kind::Protected),
            (Kept::Policy, Outcome::Done) => self.counters.count(Kind::PolicySet),
            (Kept::Flatten { wanted: true }, Outcome::Done) => self.counters.count(Kind::FlattenBegun),
            (Kept::Flatten { wanted: false }, Outcome::Done) => self.counters.count(Kind::FlattenStopped),
            (Kept::Evict { session }, Outcome::Done) => {
                self.counters.count(Kind::Evicted);
                if is_settled {
                    self.history.end_session(session);
                }
            }
            (kept, outcome) => self.complain(format!("the keeper's {kept:?} was executed as {outcome:?}")),
        }
    }

    fn end_taking(&mut self, taking: usize, now: u64, is_settled: bool) {
        if is_settled {
            self.workload.takings[taking].1 = Some(now);
        }
    }

    /// Some member is out of sync.
    pub(crate) fn is_recovering(&self) -> bool {
        self.newest_state().is_some_and(|s| s.all_slots().any(|(_, slot)| slot.tuple.iter().any(|m| !m.in_sync)))
    }

    fn on_kept_error(&mut self, kept: Kept, error: &RequestError) {
        let is_refused = match error {
            RequestError::Admin(AdminError::NotDecided { .. } | AdminError::Starting(_)) => false,
            RequestError::Deadline { .. } => false,
            // It was executed, and nobody remembers how.
            RequestError::Admin(AdminError::Refused(CommandError::Forgotten)) => false,
            RequestError::Admin(AdminError::Refused(why)) => {
                let kind = match why {
                    CommandError::Overtaken => Some(Kind::EpochOver),
                    CommandError::InUse { .. } => Some(Kind::RefusedInUse),
                    CommandError::Protected { .. } => Some(Kind::RefusedProtected),
                    CommandError::IsFlattened { .. } => Some(Kind::RefusedFlattened),
                    CommandError::StandsByItself { .. }
                    | CommandError::IsInherited { .. }
                    | CommandError::NoSuchDisk(_)
                    | CommandError::NoSuchSession(_)
                    | CommandError::HasSnapshots { .. } => None,
                    why => return self.complain(format!("the keeper's {kept:?} was refused: {why} ({why:?})")),
                };
                if let Some(kind) = kind {
                    self.counters.count(kind);
                }
                true
            }
            error => return self.complain(format!("the keeper's {kept:?} failed: {error} ({error:?})")),
        };
        if let (Kept::Delete { vdisks, .. }, true) = (&kept, is_refused) {
            for vdisk in vdisks {
                if let Some(disk) = self.workload.disks.get_mut(vdisk) {
                    disk.deleting = false;
                }
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Those who cannot wait.

    /// Somebody attaches what is being made, perhaps before everybody has heard of it.
    fn plan_eager(&mut self, mix: SnapshotMix, name: String, mode: Attachment) {
        if !self.workload.prng.chance(mix.eager_percent, 100) {
            return;
        }
        let data: Vec<usize> = (0..self.clients.len()).filter(|c| self.clients[*c].role == Role::Data).collect();
        for _ in 0..self.workload.prng.between(1, 2) {
            let client = *self.workload.prng.pick(&data);
            let at = self.now + self.draw(self.options.net.max * 2);
            let event = Event::Eager { client, name: name.clone(), mode, tries: EAGER_TRIES };
            self.queue.plan(at, event);
        }
    }

    pub(crate) fn on_eager(&mut self, client: usize, name: String, mode: Attachment, tries: u32) {
        let Some(life) = self.clients[client].life.as_ref().filter(|_| !self.workload.stopped) else { return };
        let key = split_name(&name).1.unwrap_or(&name);
        let of_it = |v: &VdiskId| self.workload.disks.get(v).is_some_and(|d| d.names.iter().any(|n| n == key));
        if life.user.sessions().iter().any(|held| of_it(&held.vdisk)) || tries == 0 {
            return;
        }
        if !life.user.is_attaching() && life.user.sessions().len() < EAGER_SESSIONS_MAX {
            self.attach_as(client, name.clone(), mode, false);
        }
        let at = self.now + Duration::from_millis(1) + self.draw(Duration::from_millis(8));
        self.queue.plan(at, Event::Eager { client, name, mode, tries: tries - 1 });
    }

    /// Who has just attached a snapshot reads it at several places at once: not all of that goes to the primaries.
    pub(crate) fn read_at_once(&mut self, host: usize, held: &crate::workload::Held) {
        let taken = self.workload.disks[&held.vdisk].taken;
        if taken.is_some_and(|taken| self.workload.takings[taken].1.is_none()) {
            self.counters.count(Kind::SnapshotEarly);
        }
        for _ in 0..4 {
            self.read(host, held.clone());
        }
    }

    // --------------------------------------------------------------------------------------------
    // For the checkers.

    /// When each point was made, as far as anybody knows.
    pub(crate) fn takings(&self) -> BTreeMap<Point, Taken> {
        let families = &self.checkers.families;
        let mut takings = BTreeMap::new();
        let taken = |disk: &Disk| {
            let command = disk.taken?;
            let (invoked, returned) = self.workload.takings[command];
            Some(Taken { command, invoked, returned })
        };
        for (vdisk, disk) in &self.workload.disks {
            let point = match disk.of {
                Some(_) => families.point(*vdisk),
                None => families.first_line(*vdisk).and_then(|line| families.parent(line)),
            };
            if let (Some(point), Some(taken)) = (point, taken(disk)) {
                takings.insert(point, taken);
            }
        }
        takings
    }
}
