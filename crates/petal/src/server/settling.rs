//! Who has settled what: calls that wait at the desk, and gates of shared disks (2.1, 2.9).

use super::*;

impl Server {
    /// These servers are down by the command `index`: nobody waits for them. What waited is settled when every
    /// server that is left has settled that command (2.1).
    pub(super) fn on_downs(&mut self, index: StateIndex, downs: Vec<ServerId>) {
        let me = self.me;
        // Of a life that is joining only the number is known: it may have been another's, whose disk was copied.
        let is_own_end = self.is_out() && self.stage == Stage::Running;
        let state = self.global().state();
        let left = settlers(state);
        for server in self.admin.on_downs(index, &downs, &left) {
            self.ask_to_settle(server, index);
        }
        let opened = self.data.gates.on_downs(index, &downs, &left) | self.data.gates.on_applied(me, index);
        if opened {
            self.with_data(|data, ctx| data.complete_what_waited(ctx));
        }
        let leaving = &mut self.data.leaving.unsettled;
        if leaving.on_downs(index, &downs, &left) | leaving.on_applied(me, index) {
            self.data.want_sweep();
        }
        for server in left {
            let gates = [&self.data.gates, &self.data.leaving.unsettled];
            if gates.iter().any(|gates| gates.unsettled_at(server).contains(&index)) {
                self.ask_to_settle(server, index);
            }
        }
        if is_own_end && !std::mem::replace(&mut self.ended, true) {
            let why = format!("{me} was not heard from and is declared down; it starts again as a new life");
            self.out.push_back(Output::Restart(why));
        }
    }

    pub(super) fn on_settled(&mut self, server: ServerId, index: StateIndex) {
        self.admin.on_settled(server, index, &mut self.out);
        if self.data.gates.on_settled(server, index) {
            self.with_data(|data, ctx| data.complete_what_waited(ctx));
        }
        if self.data.leaving.unsettled.on_settled(server, index) {
            self.data.want_sweep();
        }
    }

    /// This server is no member of some slots any more: when everybody has settled that, their elements are dropped.
    pub(super) fn settle_leaving(&mut self) {
        if !self.data.leaving.take_due() {
            return;
        }
        let state = self.global().state();
        let (index, settlers) = (state.index, settlers(state));
        self.data.leaving.unsettled.close_again(index, &settlers);
        for server in settlers {
            self.ask_to_settle(server, index);
        }
    }

    /// Writes of these disks that get their epoch from here on wait until the present index is settled.
    pub(super) fn close_gate(&mut self, disks: &[VdiskId]) {
        if disks.is_empty() {
            return;
        }
        let state = self.global().state();
        let (index, settlers) = (state.index, settlers(state));
        self.data.gates.close(index, disks, &settlers);
        for server in settlers {
            self.ask_to_settle(server, index);
        }
    }

    /// What was decided while this server was not there may have begun new epochs.
    pub(super) fn close_gate_of_all(&mut self) {
        let disks: Vec<VdiskId> = self.global().state().disks_with_gates().collect();
        self.close_gate(&disks);
    }

    pub(super) fn ask_to_settle(&mut self, server: ServerId, index: StateIndex) {
        if server == self.me {
            self.with_data(|data, ctx| data.on_settle(ctx, Peer::Server(server), index));
        } else {
            self.send(server, Body::Settle(Settle { index }));
        }
    }
}

/// Who must settle a command: every member of a slot, and who may not know that it is none any more; but nobody who is
/// down, whose next life begins with a state that has it.
pub(super) fn settlers(state: &State) -> Vec<ServerId> {
    let mut servers = state.servers_with_slots();
    servers.extend(state.all_slots().flat_map(|(_, slot)| slot.unaware_leavers(&state.servers)).map(|d| d.server));
    servers.sort_unstable();
    servers.dedup();
    servers.retain(|s| state.servers.get(s).is_some_and(|s| !s.down));
    servers
}
