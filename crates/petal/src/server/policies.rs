//! The snapshots that the leader makes by itself (`policy.rs`): what it wants goes to the log.

use super::{Server, Stage};
use crate::message::CommandId;

impl Server {
    /// Called whenever time has passed, which a running server notices at each heartbeat.
    pub(super) fn look_at_policies(&mut self) {
        let now = self.now;
        let Some(global) = &mut self.global else { return };
        if !self.leads || self.stage != Stage::Running {
            self.policies.step_down().iter().for_each(|id| global.forget_proposal(id));
            return;
        }
        for (disk, command) in self.policies.look(now, global.state()) {
            let id = global.propose_own(now, command);
            self.policies.on_proposed(disk, id);
        }
    }

    /// A command was applied: it may be one of these.
    pub(super) fn policies_follow(&mut self, id: CommandId) {
        let result = self.global.as_ref().and_then(|global| global.state().result(&id));
        if let Some((_, result)) = result {
            self.policies.on_executed(id, result);
        }
    }
}
