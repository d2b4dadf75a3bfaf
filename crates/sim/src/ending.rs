//! How a run ends: faults stop, everything must finish, everything must be readable, all must be equal.
//!
//! ```text
//!   Faulty --time or operations up--> Draining --all answered, all ready--> PowerLoss (half of the runs)
//!     --all ready--> Judging: a new client takes over every disk, reads, writes, reads again
//!     --done--> Scrubbing: blocks of one server have gone bad, and the scrub must find them all
//!     --all rounds ended--> Quiet: nothing happens for a while --> Over: all stopped, disks examined
//! ```
//!
//! Each arrow but the first has a bound in virtual time: that is the progress checker.

use crate::checkers;
use crate::checkers::progress::PATIENCE;
use crate::clock::Clock;
use crate::counters::Kind;
use crate::event::Event;
use crate::host::{ClientHost, ServerHost};
use crate::net::Node;
use crate::workload::{Asked, Held, Role};
use crate::world::World;
use petal::client::Request;
use petal::global_state::{Attachment, Command, State};
use petal::ids::VdiskId;
use petal::message::{Admin, AdminRequest, Body, Message, ScrubOrder};
use petal::mover::next_step;
use petal::server::{self, Peer};
use petal::translator::vdir::Vdisk;
use std::collections::{BTreeMap, VecDeque};
use stdx::{Duration, Instant, Machine};

/// How often the world looks whether a phase is over.
pub const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Time without requests after which nothing may be busy any more.
const QUIET: Duration = Duration::from_secs(3);

/// Where a run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// Faults are injected.
    #[default]
    Faulty,
    /// No more faults and no new requests.
    Draining,
    /// Everything was killed once more.
    PowerLoss,
    /// The judge reads everything.
    Judging,
    /// Blocks of one server went bad, and every server reads everything that it stores.
    Scrubbing,
    /// Nothing is asked.
    Quiet,
}

/// The end of a run.
#[derive(Debug, Default)]
pub struct Ending {
    phase: Phase,
    since: Instant,
    /// When the phase began; `since` is later when something was got on with.
    entered: Instant,
    judge: usize,
    /// Disks that the judge has still to judge.
    to_judge: VecDeque<(VdiskId, String)>,
    /// The one that it asked for last.
    asked: Option<(VdiskId, String)>,
    /// Rounds of scrub that must end.
    rounds: BTreeMap<usize, u64>,
    /// What the judge does with the present one.
    steps: VecDeque<Step>,
    held: Option<Held>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64),
}

impl Ending {
    /// Faults may happen.
    pub fn is_faulty(&self) -> bool {
        self.phase == Phase::Faulty
    }

    /// Where the run is.
    pub fn phase(&self) -> Phase {
        self.phase
    }
}

impl World {
    pub(crate) fn on_phase(&mut self) {
        if self.options.scripted {
            return;
        }
        self.queue.plan(self.now + LOOK_EVERY, Event::Phase);
        let waited = self.now.since(self.ending.since);
        if self.ending.phase == Phase::Draining {
            self.mend_the_only_copy();
        }
        match self.ending.phase {
            Phase::Faulty => {
                let enough = self.history.finished() + self.history.unknown() >= 2 * self.options.operations;
                if waited >= self.options.faulty || enough {
                    self.calm_down();
                }
            }
            // Who is away for good would be replaced at some later time, when everything is at rest.
            Phase::Draining if self.replaces() => {
                self.execute_anywhere(Command::ReplaceAfter { seconds: 0 });
                self.lose_patience(waited, "who stays away is still replaced");
            }
            Phase::Draining => match self.unfinished() {
                None if self.options.power_loss_at_end => {
                    self.crash_some(usize::MAX, Kind::CrashAll);
                    self.enter(Phase::PowerLoss);
                }
                None => self.begin_to_judge(),
                Some(what) => self.lose_patience(waited, &what),
            },
            Phase::PowerLoss => match self.unready() {
                None => self.begin_to_judge(),
                Some(what) => self.lose_patience(waited, &what),
            },
            Phase::Judging => self.lose_patience(waited, "the judge has not read everything"),
            Phase::Scrubbing => match self.unscrubbed() {
                None => self.enter(Phase::Quiet),
                Some(what) => self.lose_patience(waited, &what),
            },
            Phase::Quiet if waited >= QUIET => {
                self.check_at_rest();
                self.stop();
            }
            Phase::Quiet => {}
        }
    }

    fn replaces(&self) -> bool {
        let after = self.newest_state().map_or(0, |s| s.replace_after);
        self.options.replace_after.is_some_and(|wanted| wanted == after)
    }

    fn enter(&mut self, phase: Phase) {
        self.trace.event(self.now, &[30, phase as u64], || format!("phase {phase:?}"));
        self.ending.phase = phase;
        self.ending.since = self.now;
        self.ending.entered = self.now;
    }

    fn lose_patience(&mut self, waited: Duration, what: &str) {
        if waited >= PATIENCE {
            let complaint =
                checkers::progress::complaint(self.ending.phase, waited, what, &self.servers, &self.clients);
            self.complain(complaint);
            self.stop();
        }
    }

    /// A scenario is over: from here on it goes on as in any other run.
    pub(crate) fn end_script(&mut self) {
        self.options.scripted = false;
        self.calm_down();
        self.queue.plan(self.now, Event::Phase);
    }

    /// The end of all faults.
    fn calm_down(&mut self) {
        self.enter(Phase::Draining);
        self.workload.stopped = true;
        for connection in self.net.heal(self.now) {
            self.reset(connection);
        }
        for host in 0..self.servers.len() {
            self.servers[host].slow_until = Instant::ZERO;
            // A block may have rotted that a crash then left as the only good copy's place: two failures of one
            // block, which nobody has promised to survive.
            self.servers[host].disks.iter_mut().for_each(crate::disk::SimDisk::mend);
            // What it was about to do when it froze was planned for the end of that.
            let frozen = std::mem::replace(&mut self.servers[host].frozen_until, Instant::ZERO) > self.now;
            if let Some(life) = self.servers[host].life.as_ref().filter(|_| frozen) {
                let (node, life) = (Node::Server(host), life.driver.life);
                self.queue.plan(self.now, Event::Run { node, life });
            }
            for disk in &mut self.servers[host].disks {
                disk.slow_down(1, Instant::ZERO);
                disk.hang(Instant::ZERO, false);
                disk.steady();
            }
            if self.servers[host].id.is_some() && self.servers[host].life.is_none() {
                self.plan_start(Node::Server(host), self.now);
            }
        }
        if self.clients[0].life.is_none() {
            self.plan_start(Node::Client(0), self.now);
        }
    }

    /// Servers may still be away.
    pub(crate) fn is_before_judgement(&self) -> bool {
        matches!(self.ending.phase, Phase::Faulty | Phase::Draining)
    }

    /// Nobody has promised to survive the loss of a copy that is the only one at that moment, because the others were
    /// taken out before: then somebody has repaired the disk after all.
    fn mend_the_only_copy(&mut self) {
        let Some(host) = (0..self.servers.len()).find(|h| self.servers[*h].lost) else { return };
        let (Some(id), Some(state)) = (self.servers[host].id, self.newest_state()) else { return };
        if state.all_slots().any(|(_, slot)| slot.in_sync().eq([id])) {
            self.servers[host].lost = false;
            self.servers[host].disks.iter_mut().for_each(|d| d.failing = false);
            self.plan_start(Node::Server(host), self.now);
        }
    }

    pub(crate) fn unready(&self) -> Option<String> {
        if !self.workload.is_set_up() {
            return Some("not every server has joined, or no disk could be made".into());
        }
        let is_ready = |s: &ServerHost| s.lost || s.life.as_ref().is_some_and(|l| l.ready);
        let not = |h: &usize| !is_ready(&self.servers[*h]);
        let unready: Vec<usize> = (0..self.servers.len()).filter(not).collect();
        if !unready.is_empty() {
            return Some(format!("hosts {unready:?} are not ready"));
        }
        let state = self.newest_state()?;
        let out = state
            .all_slots()
            .flat_map(|(id, slot)| slot.tuple.iter().filter(|m| !m.in_sync).map(move |m| (id, m.server)))
            .filter(|(_, server)| !self.servers.iter().any(|s| s.lost && s.id == Some(*server)));
        let out: Vec<_> = out.take(3).collect();
        if !out.is_empty() {
            return Some(format!("{out:?} are not in sync again"));
        }
        // Who is away for good is waited for, so that nothing is planned or moved to it; what can go on without it does.
        let waits = self.servers.iter().any(|s| s.lost);
        let under_way = state.reconfigurations.keys().chain(&state.replan);
        let moves = under_way.filter(|gmap| !waits || next_step(state, **gmap).is_some()).collect::<Vec<_>>();
        if !moves.is_empty() {
            return Some(format!("{moves:?} are reconfigured"));
        }
        let flattened: Vec<_> = state.flattenings.iter().take(3).collect();
        (!flattened.is_empty()).then(|| format!("{flattened:?} are flattened"))
    }

    fn unfinished(&self) -> Option<String> {
        let busy = |(i, c): (usize, &ClientHost)| {
            c.life.as_ref().filter(|l| !l.user.is_idle()).map(|l| format!("client {i} has {}", l.user.waits_for()))
        };
        self.unready().or_else(|| self.clients.iter().enumerate().find_map(busy))
    }

    // --------------------------------------------------------------------------------------------
    // The judge.

    fn begin_to_judge(&mut self) {
        self.enter(Phase::Judging);
        let Some(newest) = self.newest_state().cloned() else { return };
        self.adopt_all(&newest);
        let known = &self.workload.disks;
        let all = newest.vdisks.values().filter(|v| known.contains_key(&v.id));
        let (snapshots, disks): (Vec<&Vdisk>, Vec<&Vdisk>) = all.partition(|v| v.is_snapshot());
        // Snapshots are the same when all the disks have been written once more.
        let order = snapshots.iter().chain(&disks).chain(&snapshots);
        self.ending.to_judge = order.map(|v| (v.id, v.name.clone())).collect();
        self.ending.judge = self.clients.len();
        self.clients.push(ClientHost {
            clock: Clock::new(0, 0),
            life: None,
            lives: 0,
            start_planned: false,
            role: Role::Judge,
        });
        let judge = self.ending.judge;
        self.plan_start(Node::Client(judge), self.now);
        self.queue.plan(self.now + LOOK_EVERY, Event::Phase);
        self.ending.steps.clear();
        self.ending.held = None;
    }

    /// Called when the judge's client lives and whenever it has an answer.
    pub(crate) fn judge_next(&mut self, host: usize) {
        if self.ending.phase != Phase::Judging || host != self.ending.judge {
            return;
        }
        if !self.clients[host].life.as_ref().is_some_and(|l| l.user.is_idle()) {
            return;
        }
        self.ending.since = self.now;
        let Some(held) = self.ending.held.clone() else { return self.judge_disk(host) };
        match self.ending.steps.pop_front() {
            Some(Step::Read(start, end)) => self.read_range(host, held, start, end),
            Some(Step::Write(start, end)) => self.write_range(host, held, start, end),
            None => {
                self.ending.held = None;
                self.ask(host, Request::Detach { session: held.session }, Asked::Detach);
            }
        }
    }

    /// A server that holds a lease may know the names of half a lease ago: for so long the judge asks again.
    pub(crate) fn judge_asks_again(&mut self, host: usize) -> bool {
        let is_early = self.now.since(self.ending.entered) < Duration::from_secs(1);
        if let Some(disk) = self.ending.asked.take().filter(|_| is_early) {
            self.ending.to_judge.push_front(disk);
            self.judge_disk(host);
        }
        is_early
    }

    fn judge_disk(&mut self, host: usize) {
        match self.ending.to_judge.pop_front() {
            Some((vdisk, name)) => {
                self.ending.asked = Some((vdisk, name.clone()));
                match self.workload.is_snapshot(vdisk) {
                    true => self.attach_as(host, name, Attachment::ReadOnly, false),
                    false => self.attach_as(host, name, Attachment::Exclusive, true),
                }
            }
            None => self.begin_to_scrub(),
        }
    }

    pub(crate) fn judge_attached(&mut self, _host: usize, held: Held) {
        let layout = &self.workload.disks[&held.vdisk].layout;
        let writes = held.mode != Attachment::ReadOnly;
        let mut steps = VecDeque::new();
        for spot in &layout.spots {
            let inside: Vec<u64> = spot.iter().copied().filter(|c| *c <= held.size).collect();
            if let (Some(first), Some(last)) = (inside.first(), inside.last().filter(|_| inside.len() > 1)) {
                steps.push_back(Step::Read(*first, *last));
                if writes {
                    steps.push_back(Step::Write(inside[inside.len() / 2 - 1], inside[inside.len() / 2]));
                    steps.push_back(Step::Read(*first, *last));
                }
            }
        }
        self.ending.steps = steps;
        self.ending.held = Some(held);
    }

    // --------------------------------------------------------------------------------------------
    // Scrub.

    /// All copies are in sync and nobody asks for anything any more. Blocks of one server go bad, each where another
    /// server has a good one, so all of them must be found and repaired by scrub alone.
    fn begin_to_scrub(&mut self) {
        self.enter(Phase::Scrubbing);
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let spoilt = if self.options.faults.spoil > 0 { self.spoil_blocks_of(host, 20) } else { 0 };
        self.counters.add(Kind::SpoiltAtRest, spoilt);
        for host in 0..self.servers.len() {
            let machine = &mut self.servers[host];
            let (local, Some(life)) = (machine.clock.local(self.now), &mut machine.life) else { continue };
            let request = AdminRequest::Scrub(ScrubOrder::Begin);
            let message = Message { state_index: 0, body: Body::Admin(Admin { tag: 1, request }) };
            life.server.handle(local, server::Input::Message { from: Peer::Client(u64::MAX), message });
            let round = life.server.data().scrub_status().present.map_or(0, |r| r.number);
            self.ending.rounds.insert(host, round);
            self.plan_run(Node::Server(host));
        }
    }

    /// Whose round has not ended.
    fn unscrubbed(&mut self) -> Option<String> {
        for (host, round) in self.ending.rounds.clone() {
            let Some(life) = &self.servers[host].life else { continue };
            let status = life.server.data().scrub_status();
            let Some(last) = status.last.filter(|r| r.number >= round) else {
                return Some(format!("the scrub of host {host} has not ended: {:?}", status.present));
            };
            self.ending.rounds.remove(&host);
            self.counters.add(Kind::FoundByScrub, last.repaired);
            if last.repaired < last.bad {
                self.complain(format!("the scrub of host {host} repaired {} of {} blocks", last.repaired, last.bad));
            }
        }
        None
    }

    // --------------------------------------------------------------------------------------------
    // At rest.

    pub(crate) fn newest_state(&self) -> Option<&State> {
        let lives = self.servers.iter().filter_map(|s| s.life.as_ref());
        lives.filter_map(|l| l.server.state()).max_by_key(|s| s.index)
    }

    fn check_at_rest(&mut self) {
        if let Some(what) = self.unready() {
            self.complain(format!("not at rest: {what}"));
        }
        for complaint in checkers::global_state::all_equal(&self.servers) {
            self.complain(complaint);
        }
        for host in 0..self.servers.len() {
            let left = self.servers[host].life.as_ref().map_or(0, |l| l.server.repairs());
            if left > 0 {
                self.complain(format!("host {host} has {left} elements that it could not repair"));
            }
        }
        let state = self.newest_state().cloned();
        for host in 0..self.servers.len() {
            self.crash_server(host);
        }
        let Some(state) = state else { return };
        self.counters.add(Kind::Moved, state.layouts.len() as u64);
        self.counters.add(Kind::Flattened, self.checkers.families.flattened() as u64);
        let mut found = BTreeMap::new();
        for host in 0..self.servers.len() {
            let Some(id) = self.servers[host].id.filter(|_| !self.servers[host].has_failed()) else { continue };
            let examined = checkers::addresses::examine(&mut self.servers[host], &self.options, &state);
            for complaint in &examined.complaints {
                self.complain(format!("the disks of {id}: {complaint}"));
            }
            found.insert(id, examined.elements);
        }
        for complaint in checkers::copies::compare(&state, &found) {
            self.complain(complaint);
        }
    }

    /// Judges the whole history; for after the run.
    pub fn check_history(&mut self) {
        self.history.close();
        for complaint in self.history.complaints().to_vec() {
            self.complain(complaint);
        }
        let takings = self.takings();
        for complaint in checkers::snapshots::complaints(&self.history, &self.checkers.families, &takings) {
            self.complain(complaint);
        }
    }
}
