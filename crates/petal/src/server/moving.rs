//! The steps of reconfigurations that the leader takes by itself (`mover.rs`): what it wants goes to the log.

use super::{Server, Stage};
use crate::message::CommandId;

impl Server {
    /// Called whenever time has passed, which a running server notices at each heartbeat.
    pub(super) fn look_at_moves(&mut self) {
        let now = self.now;
        let Some(global) = &mut self.global else { return };
        if !self.leads || self.stage != Stage::Running {
            self.mover.step_down().iter().for_each(|id| global.forget_proposal(id));
            return;
        }
        for (subject, command) in self.mover.look(now, global.state()) {
            let id = global.propose_own(now, command);
            self.mover.on_proposed(subject, id);
        }
    }

    /// A command was applied: it may be one of these.
    pub(super) fn movers_follow(&mut self, id: CommandId) {
        self.mover.on_executed(id);
    }
}
