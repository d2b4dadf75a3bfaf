//! How a server stops: as it was told to, handing over; or because a disk of it hangs or has failed, out of the way of the
//! others (design 2.5, 2.10).
//!
//! For a disk it gives up its lease, tells the ring (`DiskFailed`), and ends its life when that is decided, or a moment later: it may
//! never hear of it. A disk that hangs may answer again, so there the process begins a new life; a disk that
//! has failed ends the process, with what to do. Which disk is in trouble is `disk_watch.rs`.

use super::{GlobalState, Output, STOP_DEADLINE, Server, Stage};
use crate::disk_watch::Trouble;
use crate::global_state::{Command, ServerState};
use crate::ids::ServerId;
use crate::limits::TEXT_MAX;
use crate::sabotage::Sabotage;
use stdx::Duration;

/// How long one whose disk does not work waits until that is decided; it may never hear.
const LEAVE_DEADLINE: Duration = Duration::from_millis(300);

impl Server {
    /// Begins to stop. Its last read is served and its last write acknowledged *before* it says `Goodbye`, so
    /// the others need not wait for its lease to end. It still takes in what primaries send, and answers
    /// promises, until it is out: writes go on meanwhile.
    pub(super) fn shut_down(&mut self) {
        if matches!(self.stage, Stage::Stopping { .. }) {
            return;
        }
        let (server, incarnation, now) = (self.me, self.incarnation, self.now);
        let goodbye = self.has_others().then(|| {
            if self.sabotage != Sabotage::ServeAfterGoodbye {
                self.liveness.retire();
            }
            self.global().propose_own(now, Command::Goodbye { server, incarnation })
        });
        if self.global.is_some() {
            self.with_data(|data, ctx| data.run_scrub(ctx, false));
        }
        self.stage = Stage::Stopping { deadline: now + STOP_DEADLINE, goodbye };
    }

    /// It serves, and others may act in its place.
    pub(super) fn has_others(&self) -> bool {
        let is_live = |(server, s): (&ServerId, &ServerState)| *server != self.me && s.incarnation.0 > 0 && !s.down;
        self.stage == Stage::Running && self.state().is_some_and(|s| s.servers.iter().any(is_live))
    }

    /// The cluster knows that this life is over.
    pub(super) fn is_out(&self) -> bool {
        let own = self.state().and_then(|s| s.servers.get(&self.me));
        own.is_some_and(|s| s.down && s.incarnation == self.incarnation)
    }

    /// It has said goodbye, and that is not decided yet.
    pub(super) fn is_handing_over(&self) -> bool {
        let serves_on = self.sabotage == Sabotage::ServeAfterGoodbye;
        matches!(self.stage, Stage::Stopping { goodbye: Some(_), .. }) && !self.is_out() && !serves_on
    }

    pub(super) fn check_stopping(&mut self) {
        let Stage::Stopping { deadline, goodbye } = self.stage else { return };
        let over = match (goodbye, &self.global) {
            (Some(id), Some(global)) => match global.state().result(&id) {
                // Who leads the ring tells the others first: they would only learn it from the next leader.
                Some((index, _)) => !global.leads() || global.is_known_to_all(*index),
                None => false,
            },
            _ => self.data.operations() == 0,
        };
        // With a disk that does not work there is nothing to wait for.
        if over && self.last_word.is_none() && !self.is_marked {
            self.is_marked = true;
            self.stores.mark_journals();
        }
        let noted = self.last_word.is_some() || self.stores.are_labelled();
        if over && noted || self.now >= deadline {
            self.out.push_back(self.last_word.clone().unwrap_or(Output::Stopped));
        }
    }

    /// The ring can decide without this server, as far as it knows.
    fn ring_needs_it(&self) -> bool {
        let Some(state) = self.state() else { return true };
        let is_live = |s: ServerId| state.servers.get(&s).is_some_and(|s| !s.down && s.suspect.is_none());
        let members = &state.ring.members;
        let others = members.iter().filter(|m| m.server != self.me && is_live(m.server)).count();
        others < members.len() / 2 + 1
    }

    /// A disk does not work: this life ends, with `last_word`. It says so to the others and is down by its own word,
    /// so that they need not wait for its lease to end. Who leads the ring cannot have anything decided without its
    /// disk: it goes at once, and they find that it refuses connections.
    fn leave(&mut self, why: String, last_word: Output) {
        if self.last_word.is_some() {
            return;
        }
        let leads = self.global.as_ref().is_some_and(GlobalState::leads);
        if !self.has_others() || leads {
            return self.out.push_back(last_word);
        }
        let (server, incarnation, now) = (self.me, self.incarnation, self.now);
        self.liveness.retire();
        self.with_data(|data, ctx| data.run_scrub(ctx, false));
        let goodbye = Some(self.global().propose_own(now, Command::DiskFailed { server, incarnation, why }));
        self.stage = Stage::Stopping { deadline: now + LEAVE_DEADLINE, goodbye };
        self.last_word = Some(last_word);
    }

    /// A disk has failed for good.
    pub(super) fn on_disk_failed(&mut self, reason: &str) {
        let why = format!("disk {reason}");
        if matches!(self.stage, Stage::Opening | Stage::Joining { .. }) {
            return self.out.push_back(Output::Fatal(why));
        }
        let advice = format!(
            "{why}; the others go on with their copies. See what is wrong with the disk (dmesg, smartctl), and start the \
             server again when it works; one that does not is lost: put another in its place, and see `petal rejoin --help`"
        );
        self.leave(short(why), Output::Fatal(advice));
    }

    /// A disk that hangs, or fails too often. Where the others could do nothing without this server it waits.
    pub(super) fn watch_disks(&mut self) {
        let Some((disk, trouble)) = self.watch.look(self.now) else { return };
        if self.stage != Stage::Running {
            return;
        }
        let path = self.stores.path(disk).to_string();
        match trouble {
            Trouble::Fails(what) => self.on_disk_failed(&format!("{path} {what}")),
            Trouble::Hangs(_) if self.ring_needs_it() || !self.has_others() => {}
            Trouble::Hangs(what) => {
                let why = format!("disk {path} {what}");
                let restart = format!("{why}; others act in its place, and it begins a new life when the disk answers");
                self.leave(short(why), Output::Restart(restart));
            }
        }
    }
}

/// Words for people that fit into a command.
fn short(mut words: String) -> String {
    if words.len() > TEXT_MAX {
        let end = (0..=TEXT_MAX).rev().find(|at| words.is_char_boundary(*at)).unwrap_or(0);
        words.truncate(end);
    }
    words
}
