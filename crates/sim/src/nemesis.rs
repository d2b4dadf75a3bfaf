//! Faults: what goes wrong, drawn one after the other while the faulty phase lasts.

use crate::codec;
use crate::counters::Kind;
use crate::disk::SimDisk;
use crate::event::Event;
use crate::formatting;
use crate::host::ServerHost;
use crate::net::{ConnectionId, EndPoint, Node, Side};
use crate::workload::draw_weighted;
use crate::world::World;
use bytes::Bytes;
use petal::global_state::{Command, ServerState, State};
use petal::ids::{DiskId, GmapId, Incarnation, ServerId, SlotId, Term, VdiskId};
use petal::message::{Admin, AdminRequest, Body, CommandId, Message, Part, Payload};
use petal::server::{self, Peer};
use petal::store::{BlockSum, DiskCommand};
use petal::translator::gmap::Scheme;
use stdx::{Duration, Instant, Machine};

/// A moment at which somebody is killed: while the command is in flight, or about when the message
/// leaves or arrives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trap {
    /// A disk write.
    Write,
    /// A checkpoint.
    Commit,
    /// A disk file grows.
    Extend,
    /// A write goes to a secondary.
    Replicate,
    /// A secondary tells what is stable.
    StreamAck,
    /// A promise or a settlement.
    Settle,
    /// A write is acknowledged to its client.
    Answer,
    /// A stream's message or acknowledgement: its connection is reset about when it arrives.
    Cut,
    /// A write goes to a secondary: it is held up.
    Hold,
    /// A write goes to a secondary: its sender is killed at once, so that often only the secondary has it.
    Strand,
    /// A write goes to a secondary: it is altered, and the secondary killed before it is acknowledged.
    Differ,
    /// A write goes to a secondary: it will come again later.
    Ghost,
    /// Data go to a replica: a bit of them turns over on the way.
    Damage,
    /// Anything goes to a member that is being brought back: one of the two ends is killed, or everybody.
    Relapse,
    /// An element is copied to a member: this is held up, and `Believed` follows. Or it is told that it has everything:
    /// this is held up and its sender killed, or `Counted` follows.
    Lag,
    /// A write goes to that member: the same.
    Counted {
        /// The slot.
        slot: SlotId,
        /// The member.
        to: ServerId,
    },
    /// A member is asked for its promise: an older proposal about it comes, and `Believed` follows.
    Late,
    /// It is asked for its promise of a newer term: the proposal was believed, and who asks is killed before it has
    /// made the member equal.
    Believed {
        /// The slot.
        slot: SlotId,
        /// The member.
        to: ServerId,
        /// Newer than this.
        term: Term,
    },
}

impl Trap {
    const ALL: [Trap; 8] = [
        Trap::Write,
        Trap::Write,
        Trap::Commit,
        Trap::Extend,
        Trap::Replicate,
        Trap::StreamAck,
        Trap::Settle,
        Trap::Answer,
    ];
}

impl World {
    pub(crate) fn on_fault(&mut self) {
        let Some(interval) = self.options.fault_interval.filter(|_| self.ending.is_faulty()) else { return };
        let at = self.now + self.draw(interval * 2) + Duration::from_micros(1);
        self.queue.plan(at, Event::Fault);
        let weights = self.options.faults.list();
        if weights.iter().sum::<u64>() == 0 {
            return;
        }
        if self.options.alone {
            if !self.is_long_whole() {
                return;
            }
            self.whole_since = None;
        }
        // Before the others have heard of it and put back what was lost, anything else would be a second failure.
        if self.lied && !self.is_long_whole() {
            return;
        }
        self.lied = false;
        let kind = draw_weighted(&mut self.chaos, &weights);
        self.trace.event(self.now, &[9, kind as u64], || format!("fault {kind}"));
        match kind {
            0 => self.crash_some(1, Kind::CrashOne),
            1 => self.crash_several(),
            2 => self.crash_some(usize::MAX, Kind::CrashAll),
            3 => self.stop_one(),
            4 => self.reset_one(),
            5 => self.stall_one(),
            6 => self.slow_disk(),
            7 => self.slow_server(),
            8 => self.crash_one_client(),
            9 => self.trap = Some(*self.chaos.pick(&Trap::ALL)),
            10 => self.trap = Some(Trap::Cut),
            11 => self.trap = Some(Trap::Hold),
            12 => self.trap = Some(Trap::Strand),
            13 => self.trap = Some(Trap::Differ),
            14 => self.trap = Some(Trap::Ghost),
            15 => self.partition(),
            16 => self.freeze_one(),
            17 => self.sever(),
            18 => self.trap = Some(Trap::Relapse),
            19 => self.trap = Some(Trap::Lag),
            20 => self.trap = Some(Trap::Late),
            21 => self.spoil_blocks(),
            22 => self.lose_disks(),
            23 => self.hang_disk(),
            24 => self.fail_disk(),
            25 => self.stumble(),
            26 => self.lie(),
            27 => self.isolate(),
            28 => self.oust(),
            29 => self.estrange(),
            30 => self.trap = Some(Trap::Damage),
            _ => self.shift(),
        }
    }

    /// Nothing that went wrong before is felt any more, as was so a second ago.
    fn is_long_whole(&mut self) -> bool {
        let hampered = |s: &ServerHost| {
            s.frozen_until > self.now || s.slow_until > self.now || s.disks.iter().any(|d| d.is_hung(self.now))
        };
        if self.servers.iter().any(hampered) || self.net.is_anything_stalled(self.now) || self.unready().is_some() {
            self.whole_since = None;
        } else if self.whole_since.is_none() {
            self.whole_since = Some(self.now);
        }
        self.whole_since.is_some_and(|since| self.now.since(since) >= Duration::from_secs(1))
    }

    /// Springs the trap if this is the command that it waits for.
    pub(crate) fn spring_at_command(&mut self, host: usize, command: &DiskCommand) {
        let caught = match (self.trap, command) {
            (Some(Trap::Write), DiskCommand::Write { .. }) => self.chaos.chance(1, 5),
            (Some(Trap::Commit), DiskCommand::PmapCommit { .. }) => true,
            (Some(Trap::Extend), DiskCommand::Extend { .. }) => true,
            _ => false,
        };
        if caught {
            let times = self.options.disk_times;
            let most = times.max * if self.trap == Some(Trap::Commit) { times.commit_factor } else { 1 };
            self.spring(&[host], most * 2);
        }
    }

    /// Springs the trap if this is the message that it waits for.
    pub(crate) fn spring_at_message(&mut self, host: usize, to: Peer, message: &Message) {
        let caught = match (self.trap, &message.body) {
            (Some(Trap::Replicate), Body::Replicate(_)) => self.chaos.chance(1, 5),
            (Some(Trap::StreamAck), Body::StreamAck(_)) => self.chaos.chance(1, 5),
            (Some(Trap::Settle), Body::Promise(_) | Body::Promised(_) | Body::Listed(_) | Body::Fetched(_)) => {
                self.chaos.chance(1, 3)
            }
            (Some(Trap::Answer), Body::WriteReply(_)) => self.chaos.chance(1, 5),
            (Some(Trap::Relapse), Body::Replicate(m)) => {
                // Where there is something to lose.
                self.is_out(host, to, m.slot) && self.has_data(m.slot) && self.chaos.chance(1, 2)
            }
            _ => false,
        };
        if caught {
            let at = |server: ServerId| self.servers.iter().position(|s| s.id == Some(server));
            let other = match to {
                Peer::Server(server) => at(server),
                Peer::Client(_) => None,
            };
            let victims: Vec<usize> = [Some(host), other].into_iter().flatten().collect();
            self.spring(&victims, self.options.net.max * 2);
        }
    }

    /// Traps whose victim is the connection or the message itself, which is about to leave `host`.
    pub(crate) fn meddle(
        &mut self,
        host: usize,
        to: Peer,
        connection: ConnectionId,
        side: Side,
        message: &mut Message,
    ) {
        let Some(trap) = self.trap else { return };
        let Peer::Server(server) = to else { return };
        let Some(other) = self.servers.iter().position(|s| s.id == Some(server)) else { return };
        let is_write = matches!(&message.body, Body::Replicate(m) if matches!(m.part, Part::Write { .. }));
        match trap {
            Trap::Lag | Trap::Counted { .. } => self.lag_behind(trap, host, connection, side, message),
            Trap::Late => self.come_late(host, server, message),
            Trap::Believed { slot, to, term } => {
                let Body::Promise(promise) = &message.body else { return };
                if server == to && promise.slots.iter().any(|(s, t)| *s == slot && *t > term) {
                    self.trap = None;
                    let at = self.now + self.draw(self.options.net.max * 2);
                    self.queue.plan(at, Event::Ambush { host: Some(host) });
                }
            }
            Trap::Cut if matches!(message.body, Body::Replicate(_) | Body::StreamAck(_)) => {
                let most = self.options.net.max * 2;
                self.trap = None;
                let at = self.now + Duration::from_nanos(self.chaos.below(most.as_nanos() as u64 + 1));
                self.queue.plan(at, Event::Cut { connection });
            }
            Trap::Hold if is_write => {
                self.trap = None;
                self.counters.count(Kind::Stall);
                let until = self.now + Duration::from_micros(self.chaos.between(1_000, 200_000));
                self.net.stall(connection, side.other(), until);
            }
            Trap::Strand if is_write && self.chaos.chance(1, 3) => {
                self.trap = None;
                let most = self.options.disk_times.min;
                let at = self.now + Duration::from_nanos(self.chaos.below(most.as_nanos() as u64 + 1));
                self.queue.plan(at, Event::Ambush { host: Some(host) });
            }
            Trap::Differ if is_write && alter(message) => {
                self.trap = None;
                // Until the secondary is dead nothing of it arrives.
                self.net.stall(connection, side, self.now + Duration::from_secs(2));
                let most = self.options.net.max * 3 + self.options.disk_times.max * 10;
                let at = self.now + most / 2 + self.draw(most / 2);
                self.queue.plan(at, Event::Ambush { host: Some(other) });
            }
            Trap::Damage if self.chaos.chance(1, 3) => {
                let Body::Replicate(m) = &mut message.body else { return };
                let mut bytes = m.data.to_bytes().to_vec();
                if !bytes.is_empty() {
                    self.trap = None;
                    self.counters.count(Kind::Damage);
                    let at = self.chaos.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << self.chaos.below(8);
                    m.data = Payload(vec![Bytes::from(bytes)]);
                }
            }
            Trap::Ghost if is_write && self.chaos.chance(1, 3) => {
                self.trap = None;
                let Ok(frame) = codec::encode(message) else { return };
                let at = self.now + Duration::from_micros(self.chaos.between(5_000, 500_000));
                self.queue.plan(at, Event::Ghost { from: host, to: other, frame });
            }
            _ => {}
        }
    }

    /// True if `to` is a member of the slot that is not in sync, as the server on `host` knows.
    fn is_out(&self, host: usize, to: Peer, slot: SlotId) -> bool {
        let state = self.servers[host].life.as_ref().and_then(|l| l.server.state());
        let Peer::Server(to) = to else { return false };
        state.and_then(|s| s.slot(slot)).and_then(|s| s.member(to)).is_some_and(|m| !m.in_sync)
    }

    /// Something was written in the slot.
    fn has_data(&self, slot: SlotId) -> bool {
        self.written.contains(&slot)
    }

    fn lag_behind(&mut self, trap: Trap, host: usize, connection: ConnectionId, side: Side, message: &Message) {
        let Body::Replicate(m) = &message.body else { return };
        let Some(to) = self.net.ends(connection).map(|ends| ends[side.other() as usize].node) else { return };
        let Node::Server(to) = to else { return };
        let Some(to) = self.servers[to].id else { return };
        let springs = match trap {
            Trap::Lag if matches!(m.part, Part::Copy { settles: false, .. }) => {
                if self.has_data(m.slot) && self.chaos.chance(1, 8) {
                    self.trap = Some(Trap::Believed { slot: m.slot, to, term: m.term });
                    self.counters.count(Kind::Lag);
                    self.net.stall(connection, side.other(), self.now + Duration::from_millis(500));
                }
                return;
            }
            Trap::Lag if matches!(m.part, Part::CaughtUp) && self.has_data(m.slot) => {
                let now = self.chaos.chance(1, 2);
                if !now {
                    self.trap = Some(Trap::Counted { slot: m.slot, to });
                }
                now
            }
            Trap::Counted { slot, to: member } => {
                matches!(m.part, Part::Write { .. }) && (slot, member) == (m.slot, to)
            }
            _ => false,
        };
        if !springs {
            return;
        }
        self.trap = None;
        self.counters.count(Kind::Lag);
        self.net.stall(connection, side.other(), self.now + Duration::from_millis(500));
        // A primary waits up to 200 ms with what it proposes.
        let at = self.now + Duration::from_micros(self.chaos.between(5_000, 400_000));
        self.queue.plan(at, Event::Ambush { host: Some(host) });
    }

    /// Notes what will be proposed, to propose it again when it is not true any more.
    pub(crate) fn note_caught_up(&mut self, host: usize, to: Peer, slot: SlotId, term: Term) {
        let state = self.servers[host].life.as_ref().and_then(|l| l.server.state());
        let Peer::Server(server) = to else { return };
        let Some(life) = state.and_then(|s| s.servers.get(&server)) else { return };
        self.caught_up.insert((slot, server), (term, life.incarnation));
    }

    fn come_late(&mut self, host: usize, server: ServerId, message: &Message) {
        let Body::Promise(promise) = &message.body else { return };
        let Some((slot, term)) = promise.slots.iter().copied().find(|(slot, _)| {
            let to = Peer::Server(server);
            self.has_data(*slot) && self.is_out(host, to, *slot) && self.caught_up.contains_key(&(*slot, server))
        }) else {
            return;
        };
        let (proposed, incarnation) = self.caught_up[&(slot, server)];
        let state = self.servers[host].life.as_ref().and_then(|l| l.server.state());
        let present = state.and_then(|s| s.servers.get(&server)).map(|s| s.incarnation);
        if proposed == term && present == Some(incarnation) {
            return;
        }
        self.trap = Some(Trap::Believed { slot, to: server, term });
        self.counters.count(Kind::Late);
        self.execute_anywhere(Command::InSync { server, incarnation, slots: vec![(slot, proposed)] });
    }

    pub(crate) fn on_cut(&mut self, connection: ConnectionId) {
        if self.ending.is_faulty() {
            self.counters.count(Kind::Cut);
            self.reset(connection);
        }
    }

    pub(crate) fn on_ghost(&mut self, from: usize, to: usize, frame: Bytes) {
        let Some(sender) = self.servers[from].id else { return };
        let Some(life) = &self.servers[to].life else { return };
        if let Some((connection, side)) = life.driver.connections.get(&Peer::Server(sender)).copied() {
            self.on_deliver(connection, side, frame, 0);
        }
    }

    /// Somebody dies within `most`: one of the victims, or everybody.
    fn spring(&mut self, victims: &[usize], most: Duration) {
        self.trap = None;
        let host = (!self.chaos.chance(1, 4)).then(|| *self.chaos.pick(victims));
        let delay = Duration::from_nanos(self.chaos.below(most.as_nanos() as u64 + 1));
        self.queue.plan(self.now + delay, Event::Ambush { host });
    }

    pub(crate) fn on_ambush(&mut self, host: Option<usize>) {
        // What was altered must never be acknowledged.
        if !self.ending.is_faulty() && self.options.faults.differ == 0 {
            return;
        }
        self.trace.event(self.now, &[12], || format!("ambush on {host:?}"));
        self.counters.count(Kind::Ambush);
        match host {
            None => self.crash_some(usize::MAX, Kind::CrashAll),
            Some(host) => {
                self.crash_server(host);
                let at = self.now + self.draw(self.options.restart_delay);
                self.plan_start(Node::Server(host), at);
            }
        }
    }

    /// Declares a dead server down, as its ring would when its leases have run out: here it is known that
    /// it is dead.
    pub(crate) fn on_bury(&mut self, host: usize, life: u64) {
        let machine = &self.servers[host];
        let (Some(server), None) = (machine.id, &machine.life) else { return };
        if machine.lives != life {
            return;
        }
        let running = self.running();
        let newest = running.iter().filter_map(|h| self.servers[*h].life.as_ref()?.server.state());
        let Some(state) = newest.max_by_key(|s| s.index).and_then(|s| s.servers.get(&server)) else {
            return self.queue.plan(self.now + Duration::from_millis(50), Event::Bury { host, life });
        };
        if state.down {
            self.counters.count(Kind::Down);
            return;
        }
        if state.incarnation.0 == 0 {
            return;
        }
        let incarnation = state.incarnation;
        let command = match state.suspect {
            None => Command::Suspect { server, incarnation },
            Some(suspect) => Command::ServerDown { server, incarnation, suspect },
        };
        self.execute_anywhere(command);
        self.queue.plan(self.now + Duration::from_millis(20), Event::Bury { host, life });
    }

    /// A server dies, and its disks with it as soon as the others do without them.
    fn lose_disks(&mut self) {
        let running = self.running();
        // One at a time; a server whose disk has failed for good is one, too.
        let is_one = self.servers.iter().any(|s| s.losing || s.has_failed());
        if running.len() > 1 && !is_one {
            let host = *self.chaos.pick(&running);
            self.lose_disks_of(host);
        }
    }

    /// The same of this one, which runs.
    pub(crate) fn lose_disks_of(&mut self, host: usize) {
        let machine = &mut self.servers[host];
        machine.losing = true;
        let life = machine.life.as_ref().expect("it runs").server.incarnation();
        self.crash_server(host);
        self.queue.plan(self.now, Event::Lose { host, life, tries: 0 });
    }

    /// Waits until the server is in no in-sync set; then some of its disks are gone. If that takes too long it comes
    /// back with all of them.
    pub(crate) fn on_lose(&mut self, host: usize, life: Incarnation, tries: u32) {
        let Some(id) = self.servers[host].id else { return };
        // (A state from before that life says nothing about it. Who is the whole ring may have declared itself down, for a
        // disk that hangs; without its votes there is no cluster.)
        let needs = |s: &State| {
            let is_down = s.servers.get(&id).is_some_and(|x| x.down && x.incarnation == life);
            let is_ring = s.ring.members.iter().all(|m| m.server == id);
            !is_down || is_ring || s.all_slots().any(|(_, slot)| slot.in_sync().any(|m| m == id))
        };
        if self.newest_state().is_none_or(needs) {
            if tries == 60 {
                self.servers[host].losing = false;
                return self.plan_start(Node::Server(host), self.now);
            }
            return self.queue.plan(self.now + Duration::from_millis(50), Event::Lose { host, life, tries: tries + 1 });
        }
        let machine = &mut self.servers[host];
        let only = self.chaos.chance(1, 2).then(|| self.chaos.below(machine.disks.len() as u64) as usize);
        let lost = |disk: usize| only.is_none_or(|only| only == disk);
        let number = u128::from(self.chaos.next_u64());
        // Kept ones first, in their order: the first disks have what was voted.
        let mut order: Vec<usize> = (0..machine.disks.len()).collect();
        order.sort_by_key(|disk| lost(*disk));
        let disks = order.iter().map(|disk| match lost(*disk) {
            true => DiskId(number << 8 | *disk as u128),
            false => machine.disk_ids[*disk],
        });
        let disks: Vec<DiskId> = disks.collect();
        let mut old: Vec<Option<SimDisk>> = std::mem::take(&mut machine.disks).into_iter().map(Some).collect();
        machine.disks = order.iter().filter_map(|disk| old[*disk].take()).collect();
        for (at, disk) in order.iter().enumerate() {
            if lost(*disk) {
                machine.disks[at].wipe();
            }
        }
        let kind = if order.iter().all(|disk| lost(*disk)) { Kind::ServerReplaced } else { Kind::DiskReplaced };
        self.counters.count(kind);
        self.trace.words(self.now, || format!("host {host} loses disks, and will have {disks:?}"));
        self.queue.plan(self.now, Event::Replace { host, disks });
    }

    /// Asks until the cluster knows of the new disks; then they are made, and the server starts.
    pub(crate) fn on_replace(&mut self, host: usize, disks: Vec<DiskId>) {
        let Some(server) = self.servers[host].id else { return };
        let known = self.newest_state().and_then(|s| s.servers.get(&server)).cloned();
        let votes_from = self.newest_state().map_or(0, |s| s.ring.id);
        let machine = &mut self.servers[host];
        // Its votes are on both of its disks.
        let votes_lost = true;
        match known {
            Some(known) if disks.iter().all(|d| known.disks.contains_key(d)) => {
                formatting::replace(machine, disks, known.incarnation, votes_from, &self.options);
                machine.losing = false;
                self.plan_start(Node::Server(host), self.now);
            }
            known => {
                if let Some(ServerState { incarnation, .. }) = known {
                    let disks = disks.clone();
                    let accept_data_loss = false;
                    let command = Command::ReplaceDisks { server, incarnation, disks, votes_lost, accept_data_loss };
                    self.execute_anywhere(command);
                }
                self.queue.plan(self.now + Duration::from_millis(100), Event::Replace { host, disks });
            }
        }
    }

    /// Has a command decided, as an operator could.
    pub(crate) fn execute_anywhere(&mut self, command: Command) {
        let running = self.running();
        let number = self.chaos.below(1 << 40) + 1;
        let id = CommandId { proposer: self.chaos.next_u64(), number, finished_below: 0 };
        let request = AdminRequest::Execute { id, command, deadline_millis: 1000 };
        let message = Message { state_index: 0, body: Body::Admin(Admin { tag: number, request }) };
        if running.is_empty() {
            return;
        }
        let at = *self.chaos.pick(&running);
        let machine = &mut self.servers[at];
        let Some(alive) = &mut machine.life else { return };
        if alive.ready {
            let from = Peer::Client(u64::MAX);
            alive.server.handle(machine.clock.local(self.now), server::Input::Message { from, message });
            self.plan_run(Node::Server(at));
        }
    }

    fn running(&self) -> Vec<usize> {
        (0..self.servers.len()).filter(|h| self.servers[*h].life.is_some()).collect()
    }

    /// Kills so many of the running servers, and plans their return.
    pub fn crash_some(&mut self, count: usize, kind: Kind) {
        let mut running = self.running();
        if running.is_empty() {
            return;
        }
        self.counters.count(kind);
        self.chaos.shuffle(&mut running);
        for host in running.into_iter().take(count) {
            self.crash_server(host);
            let at = self.now + self.draw(self.options.restart_delay);
            self.plan_start(Node::Server(host), at);
        }
    }

    fn crash_several(&mut self) {
        let running = self.running().len() as u64;
        if running > 2 {
            let count = self.chaos.between(2, running - 1) as usize;
            self.crash_some(count, Kind::CrashSeveral);
        }
    }

    fn stop_one(&mut self) {
        let running = self.running();
        if !running.is_empty() {
            let host = *self.chaos.pick(&running);
            self.stop_server(host);
        }
    }

    fn reset_one(&mut self) {
        let alive = self.net.alive();
        if !alive.is_empty() {
            self.counters.count(Kind::Reset);
            let connection = *self.chaos.pick(&alive);
            self.reset(connection);
        }
    }

    fn stall_one(&mut self) {
        let alive = self.net.alive();
        if !alive.is_empty() {
            self.counters.count(Kind::Stall);
            let connection = *self.chaos.pick(&alive);
            let until = self.now + Duration::from_micros(self.chaos.between(100, 500_000));
            // One way or both.
            let sides: &[Side] = match self.chaos.below(3) {
                0 => &[Side::Dialler],
                1 => &[Side::Acceptor],
                _ => &[Side::Dialler, Side::Acceptor],
            };
            for side in sides {
                self.net.stall(connection, *side, until);
            }
        }
    }

    /// Nothing gets through for a while: between a server and one other node, or all of them.
    fn partition(&mut self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        self.counters.count(Kind::Partition);
        let host = *self.chaos.pick(&running);
        let Some(at) = self.servers[host].end_point(host) else { return };
        let mut cut = self.net.of(at);
        if self.chaos.chance(1, 2) && !cut.is_empty() {
            cut = vec![*self.chaos.pick(&cut)];
        }
        let until = self.now + Duration::from_millis(self.chaos.between(100, 4000));
        let (inwards, outwards) = *self.chaos.pick(&[(true, true), (true, true), (true, false), (false, true)]);
        for (connection, side) in cut {
            if inwards {
                self.net.stall(connection, side, until);
            }
            if outwards {
                self.net.stall(connection, side.other(), until);
            }
        }
    }

    /// Nothing gets through between a server and another one, or all others; clients reach it.
    fn sever(&mut self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let host = *self.chaos.pick(&running);
        let mut links = self.links(host);
        if links.is_empty() {
            return;
        }
        self.counters.count(Kind::Sever);
        // All of them until it is silent for half a lease or more; or one for so long that the silent one is taken out
        // though connected.
        let millis = match self.chaos.chance(1, 2) {
            true => self.chaos.between(400, 1600),
            false => {
                links = vec![*self.chaos.pick(&links)];
                // Alone for longer than anything may stand.
                if self.options.alone { self.chaos.between(1500, 9000) } else { self.chaos.between(1500, 3000) }
            }
        };
        self.sever_links(&links, Duration::from_millis(millis));
    }

    /// Nothing gets through between a client and one server, for longer than two leases or less; everybody else reaches
    /// both. One link at a time.
    fn estrange(&mut self) {
        let is_client = |node| matches!(node, Node::Client(number) if number > 0);
        let running = self.running();
        let all: Vec<_> = running.iter().flat_map(|host| self.links_with(*host, is_client)).collect();
        if running.is_empty() || all.iter().any(|(link, _)| self.net.is_stalled(*link, self.now)) {
            return;
        }
        let host = *self.chaos.pick(&running);
        let links = self.links_with(host, is_client);
        if !links.is_empty() {
            self.counters.count(Kind::Estrange);
            let link = *self.chaos.pick(&links);
            let time = Duration::from_millis(self.chaos.between(500, 5000));
            self.sever_links(&[link], time);
        }
    }

    /// What an operator does about placement. He looks at the newest state, and so plans from what holds; the ring's
    /// leader does the rest.
    fn shift(&mut self) {
        let which = self.chaos.next_u64();
        let Some(state) = self.newest_state() else { return };
        let servers: Vec<ServerId> =
            state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0).map(|(id, _)| *id).collect();
        let drained: Vec<ServerId> = state.servers.iter().filter(|(_, s)| s.drained).map(|(id, _)| *id).collect();
        let under_way: Vec<GmapId> = state.reconfigurations.keys().copied().collect();
        // A disk that is still to be made may need them all.
        if servers.is_empty() || self.workload.to_create > 0 {
            return;
        }
        if let Some(seconds) = self.options.replace_after.filter(|seconds| *seconds != state.replace_after) {
            return self.execute_anywhere(Command::ReplaceAfter { seconds });
        }
        if state.servers.values().any(|s| s.away) {
            self.counters.count(Kind::StayedAway);
        }
        let Some(state) = self.newest_state() else { return };
        let other = other_copies(state, which);
        let command = match self.chaos.below(9) {
            8 if !under_way.is_empty() => Command::AbortReconfiguration { gmap: *self.chaos.pick(&under_way) },
            0 | 1 if other.is_some() => {
                let (vdisk, scheme) = other.expect("just seen");
                Command::SetCopies { vdisk, scheme }
            }
            1..=3 if !drained.is_empty() => Command::Drain { server: *self.chaos.pick(&drained), drained: false },
            // What the servers do with a plan that makes no sense is nobody's harm, so any server will do.
            _ => Command::Drain { server: *self.chaos.pick(&servers), drained: drained.is_empty() },
        };
        self.counters.count(Kind::Shift);
        self.execute_anywhere(command);
    }

    /// Connections of a host with other servers.
    pub(crate) fn links(&self, host: usize) -> Vec<(ConnectionId, Side)> {
        self.links_with(host, |node| matches!(node, Node::Server(_)))
    }

    /// Connections of a host with such nodes.
    fn links_with(&self, host: usize, is_wanted: impl Fn(Node) -> bool) -> Vec<(ConnectionId, Side)> {
        let Some(at) = self.servers[host].end_point(host) else { return Vec::new() };
        let has = |ends: [EndPoint; 2]| ends.iter().any(|e| *e != at && is_wanted(e.node));
        let mut links = self.net.of(at);
        links.retain(|(connection, _)| self.net.ends(*connection).is_some_and(has));
        links
    }

    fn sever_links(&mut self, links: &[(ConnectionId, Side)], time: Duration) {
        for (connection, side) in links {
            self.net.stall(*connection, *side, self.now + time);
            self.net.stall(*connection, side.other(), self.now + time);
        }
    }

    /// Others are silent to a server, and it to them, until they act in its place; clients reach it all the time, and
    /// some of them have not heard of anything.
    fn isolate(&mut self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let host = *self.chaos.pick(&running);
        let links = self.links(host);
        if !links.is_empty() {
            self.counters.count(Kind::Isolate);
            let time = Duration::from_millis(self.chaos.between(1500, 3500));
            self.sever_links(&links, time);
        }
    }

    /// Two servers do not hear each other, and the ring hears both: one takes the other out. Just before that the
    /// other one is cut off from all, and cannot know.
    fn oust(&mut self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let host = *self.chaos.pick(&running);
        let links = self.links(host);
        let Some(at) = self.servers[host].end_point(host) else { return };
        if !links.is_empty() {
            self.counters.count(Kind::Oust);
            let link = *self.chaos.pick(&links);
            self.sever_links(&[link], Duration::from_millis(2500));
            // Who is connected and silent is taken out after a second (`SILENCE_CONNECTED`).
            let when = self.now + Duration::from_millis(self.chaos.between(900, 1300));
            self.queue.plan(when, Event::Oust { host, life: at.life });
        }
    }

    pub(crate) fn on_oust(&mut self, host: usize, life: u64) {
        let is_there = self.servers[host].end_point(host).is_some_and(|at| at.life == life);
        if is_there && self.ending.is_faulty() {
            self.trace.event(self.now, &[13, host as u64], || format!("host {host} is cut off"));
            let links = self.links(host);
            let time = Duration::from_millis(self.chaos.between(500, 1100));
            self.sever_links(&links, time);
        }
    }

    /// Some blocks become bad, each where another server has a good copy.
    fn spoil_blocks(&mut self) {
        for _ in 0..20 {
            let host = self.chaos.below(self.servers.len() as u64) as usize;
            self.spoil_blocks_of(host, 1);
        }
    }

    /// Up to so many blocks of one server become bad, each where another server has a good copy; how many did.
    pub(crate) fn spoil_blocks_of(&mut self, host: usize, most: usize) -> u64 {
        let mut spoilt = 0;
        for _ in 0..most {
            let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
            let Some((page, content)) = self.servers[host].disks[disk].draw_page() else { continue };
            let content = *content;
            let others = self.servers.iter().enumerate().filter(|(h, s)| *h != host && !s.has_failed());
            if others.flat_map(|(_, s)| &s.disks).any(|d| d.has(&content)) {
                let how = *self.chaos.pick(&[Kind::Rotten, Kind::Unreadable]);
                self.counters.count(how);
                self.trace.words(self.now, || format!("host {host} disk {disk}: page {page} is bad: {how:?}"));
                self.servers[host].disks[disk].spoil(page, how);
                spoilt += 1;
            }
        }
        spoilt
    }

    /// A disk answers nothing for a while. Where nothing else goes wrong, not before everything is whole again.
    fn hang_disk(&mut self) {
        let others = self.options.faults.list().iter().sum::<u64>() > self.options.faults.hang;
        let is_hung = self.servers.iter().flat_map(|s| &s.disks).any(|d| d.is_hung(self.now));
        if is_hung || !others && self.unready().is_some() {
            return;
        }
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
        let until = self.now + Duration::from_millis(self.chaos.between(2_000, 20_000));
        let reads_on = self.chaos.chance(1, 3);
        self.counters.count(if reads_on { Kind::HungWrites } else { Kind::HungDisk });
        self.trace
            .words(self.now, || format!("host {host} disk {disk} hangs until {until:?}, reads go on: {reads_on}"));
        self.servers[host].disks[disk].hang(until, reads_on);
    }

    /// A disk fails for good: not where it is the only one that has something, or its server has the only voice.
    fn fail_disk(&mut self) {
        if self.servers.iter().any(ServerHost::has_failed) || self.unready().is_some() {
            return;
        }
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let state = self.servers[host].life.as_ref().and_then(|l| l.server.state());
        let (Some(state), Some(id)) = (state, self.servers[host].id) else { return };
        let is_alone = state.all_slots().any(|(_, slot)| slot.in_sync().eq([id]));
        if is_alone || host < self.options.ring && self.options.ring < 3 {
            return;
        }
        let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
        self.counters.count(Kind::FailedDisk);
        self.trace.words(self.now, || format!("host {host} disk {disk} fails for good"));
        self.servers[host].disks[disk].failing = true;
        // A block that rotted elsewhere may have had its only good copy here: two failures.
        self.servers.iter_mut().flat_map(|s| &mut s.disks).for_each(SimDisk::mend);
    }

    /// A server dies, and one of its disks has not kept what it had acknowledged; all of it is elsewhere. Not what a
    /// ring member has promised and accepted, of which there is one copy where it has one disk.
    fn lie(&mut self) {
        if self.unready().is_some() {
            return;
        }
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let state = self.servers[host].life.as_ref().and_then(|l| l.server.state());
        let (Some(state), Some(id)) = (state, self.servers[host].id) else { return };
        let is_alone = state.all_slots().any(|(_, slot)| slot.in_sync().eq([id]));
        if is_alone || host < self.options.ring && self.options.disks < 2 {
            return;
        }
        let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
        // First: what a crash keeps of what is in flight is newer than what is lost here.
        let lost = self.servers[host].disks[disk].lose();
        self.crash_server(host);
        if lost {
            self.counters.count(Kind::Lied);
            self.trace.words(self.now, || format!("host {host} disk {disk} has lost what it had acknowledged"));
            self.lied = true;
            self.whole_since = None;
        }
        let at = self.now + self.draw(self.options.restart_delay);
        self.plan_start(Node::Server(host), at);
    }

    fn stumble(&mut self) {
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
        let stumbles = self.servers[host].disks[disk].stumble();
        self.counters.add(Kind::Stumble, u64::from(stumbles));
    }

    fn freeze_one(&mut self) {
        let running = self.running();
        if !running.is_empty() {
            let host = *self.chaos.pick(&running);
            let time = Duration::from_millis(self.chaos.between(100, 4000));
            let mut at = self.now;
            if !self.options.alone && self.chaos.chance(1, 2) {
                // By then its reads are not sent elsewhere any more: what it asked is answered by the frozen one.
                at += Duration::from_millis(300);
                self.leave_a_client_with(host, at + time + Duration::from_millis(50));
            }
            self.queue.plan(at, Event::Freeze { host, time });
        }
    }

    pub(crate) fn on_freeze(&mut self, host: usize, time: Duration) {
        if self.ending.is_faulty() && self.servers[host].life.is_some() {
            self.counters.count(Kind::Freeze);
            self.servers[host].frozen_until = self.now + time;
        }
    }

    /// A client reaches no server but this one, so that it does not ask elsewhere what it has asked here.
    fn leave_a_client_with(&mut self, host: usize, until: Instant) {
        let client = self.chaos.below(self.clients.len() as u64) as usize;
        let Some(at) = self.clients[client].end_point(client) else { return };
        for (connection, side) in self.net.of(at) {
            let is_other = |ends: [EndPoint; 2]| ends.iter().all(|e| e.node != Node::Server(host));
            if self.net.ends(connection).is_some_and(is_other) {
                self.net.stall(connection, side, until);
                self.net.stall(connection, side.other(), until);
            }
        }
    }

    fn slow_disk(&mut self) {
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let disk = self.chaos.below(self.servers[host].disks.len() as u64) as usize;
        let until = self.now + Duration::from_millis(self.chaos.between(5, 1000));
        let factor = *self.chaos.pick(&[5, 30]);
        self.counters.count(Kind::SlowDisk);
        self.servers[host].disks[disk].slow_down(factor, until);
    }

    fn slow_server(&mut self) {
        let host = self.chaos.below(self.servers.len() as u64) as usize;
        let until = self.now + Duration::from_millis(self.chaos.between(5, 1000));
        self.counters.count(Kind::SlowServer);
        self.servers[host].slow_until = until;
    }

    fn crash_one_client(&mut self) {
        let running: Vec<usize> = (0..self.clients.len()).filter(|c| self.clients[*c].life.is_some()).collect();
        if !running.is_empty() {
            let client = *self.chaos.pick(&running);
            self.crash_client(client);
            let at = self.now + self.draw(self.options.restart_delay);
            self.plan_start(Node::Client(client), at);
        }
    }
}

/// Turns over the data of a write on its way to a replica, with its checksums, so that nothing but the
/// other copies can tell. False if it has no data.
fn alter(message: &mut Message) -> bool {
    let Body::Replicate(m) = &mut message.body else { return false };
    let Part::Write { sums, .. } = &mut m.part else { return false };
    let bytes: Vec<u8> = m.data.to_bytes().iter().map(|b| !b).collect();
    let mut blocks = bytes.chunks(petal::ids::BLOCK_SIZE as usize);
    for sum in sums.iter_mut().filter(|s| **s != BlockSum::Zero) {
        *sum = BlockSum::Crc(stdx::checksum::crc32c(blocks.next().expect("a block for each checksum")));
    }
    let altered = !bytes.is_empty();
    m.data = Payload(vec![Bytes::from(bytes)]);
    altered
}

/// Some disk, and a scheme that it does not have. Never fewer copies than two: other faults are chosen by how many copies
/// there are.
fn other_copies(state: &State, which: u64) -> Option<(VdiskId, Scheme)> {
    let count = state.vdisks.len().max(1) as u64;
    let disk = state.vdisks.values().nth((which % count) as usize)?;
    let scheme = state.gmaps.get(&state.family(disk.family)?.gmap)?.scheme;
    Some((disk.id, if scheme == Scheme::Chained { Scheme::Chained3 } else { Scheme::Chained }))
}
