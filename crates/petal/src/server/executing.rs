//! Commands that clients want executed: to the log, and back to whoever waits for them.

use super::*;
use crate::global_state::check_length;

impl Server {
    pub(super) fn log(&self) -> Vec<LogLine> {
        let Some(global) = &self.global else { return Vec::new() };
        let line = |(index, recent): (StateIndex, &RecentEntry)| LogLine {
            index,
            text: recent.entry.command.to_string(),
            refused: recent.refused.as_ref().map(ToString::to_string),
            age_millis: recent.applied.map(|at| u64::try_from(self.now.since(at).as_millis()).unwrap_or(u64::MAX)),
        };
        global.recent().map(line).collect()
    }

    pub(super) fn on_execute(
        &mut self,
        client: ClientId,
        tag: Tag,
        id: CommandId,
        command: Command,
        deadline_millis: u32,
    ) {
        if let Err(refused) = check_length(&command) {
            return self.reply_admin(client, tag, Err(refused.into()));
        }
        let now = self.now;
        let deadline = now + Duration::from_millis(u64::from(deadline_millis));
        if !self.admin.expect(client, tag, id, deadline) {
            return self.reply_admin(client, tag, Err(AdminError::Busy(self.me)));
        }
        if self.global().state().is_executed(&id) {
            // Sent again: it has been done. It may not have been settled, so that is asked again.
            self.on_executed(id, true);
        } else {
            self.global().propose(now, id, command);
        }
    }

    /// A command of the log has been applied; somebody may wait for it here.
    pub(super) fn on_executed(&mut self, id: CommandId, narrows: bool) {
        let global = self.global.as_ref().expect("commands are applied when the disks are open");
        let state = global.state();
        let Some(&(index, ref result)) = state.result(&id) else { return };
        // Who is asked follows from the present state, so that is what they must have settled: somebody who is
        // down by a later command is not waited for, and the others must know that command (2.1).
        let (servers, settled) = (settlers(state), state.index);
        let settles = narrows && result.is_ok() && self.sabotage != Sabotage::FenceBeforeSettled;
        let result = result.clone();
        let settle_at = settles.then(|| (settled, servers.clone()));
        let Some(asked) = self.admin.on_executed(id, index, result, settle_at, &mut self.out) else { return };
        for server in servers {
            self.ask_to_settle(server, asked);
        }
    }
}
