//! Who has settled what: calls that wait at the desk, and gates of shared disks (2.1, 2.9).

use super::*;

/// Who has not settled something by then is asked again.
const SETTLE_AGAIN: Duration = HALF_LEASE;

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

    /// A server has settled an index; so it has applied it, which a message that was passed on does not show by itself.
    pub(super) fn on_settled(&mut self, server: ServerId, index: StateIndex) {
        self.admin.on_settled(server, index, &mut self.out);
        if self.data.gates.on_settled(server, index) | self.data.gates.on_applied(server, index) {
            self.with_data(|data, ctx| data.complete_what_waited(ctx));
        }
        let leaving = &mut self.data.leaving.unsettled;
        if leaving.on_settled(server, index) | leaving.on_applied(server, index) {
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
        let me = self.me;
        if server == me {
            self.with_data(|data, ctx| data.on_settle(ctx, me, me, index));
        } else {
            self.send(server, Body::Settle(Settle { index, asker: me, settler: server }));
            self.settle_again.get_or_insert(self.now + SETTLE_AGAIN);
        }
    }

    /// What a server is waited for to settle.
    pub(super) fn unsettled_at(&self, server: ServerId) -> BTreeSet<StateIndex> {
        let gates = [&self.data.gates, &self.data.leaving.unsettled];
        let of_gates = gates.into_iter().flat_map(|gates| gates.unsettled_at(server));
        self.admin.unsettled_at(server).into_iter().chain(of_gates).collect()
    }

    /// Whoever has not answered is asked again, also through another server, each time another one: a link may be cut that
    /// nobody else misses, and then nobody is declared down.
    pub(super) fn ask_again_to_settle(&mut self) {
        if self.settle_again.is_none_or(|at| at > self.now) {
            return;
        }
        self.settle_again = None;
        self.settle_rounds += 1;
        let (asker, servers) = (self.me, self.state().map_or_else(Vec::new, |s| s.servers.keys().copied().collect()));
        for settler in servers.into_iter().filter(|s| *s != asker) {
            let others: Vec<ServerId> = self.connected.keys().copied().filter(|s| *s != settler).collect();
            let other = (!others.is_empty()).then(|| others[self.settle_rounds % others.len()]);
            for index in self.unsettled_at(settler) {
                self.ask_to_settle(settler, index);
                if let Some(other) = other {
                    self.send(other, Body::Settle(Settle { index, asker, settler }));
                }
            }
        }
    }

    /// A question or an answer that is for a server which its sender does not reach: passed on, once. Returned if it is for
    /// this one.
    pub(super) fn pass_on_settling(&mut self, sender: ServerId, body: Body) -> Option<Body> {
        let (from, to) = match &body {
            Body::Settle(m) => (m.asker, m.settler),
            Body::Settled(m) => (m.settler, m.asker),
            _ => return Some(body),
        };
        if to == self.me {
            return Some(body);
        }
        if from == sender && self.connected.contains_key(&to) {
            self.send(to, body);
        }
        None
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
