//! Scenarios: a cluster in which nothing happens by itself. A test asks, cuts and kills, and waits for what it wants
//! to see; at the end everything is judged as in any other run.
//!
//! The same world, cores and checkers as elsewhere. The seed draws only how fast things are and in which order what
//! falls together happens, so a test goes through a few seeds.

use crate::content::{Layout, Value};
use crate::history::OperationId;
use crate::net::Node;
use crate::options::{Options, Overrides, SnapshotMix};
use crate::trace::{Keep, Trace};
use crate::workload::{Asked, Call, Held, Role, scheme_of};
use crate::world::World;
use petal::client::{RequestError, Response};
use petal::global_state::{Attachment, Command, Outcome, State};
use petal::ids::{ELEMENT_SIZE, ServerId, StateIndex, VdiskId};
use petal::message::AdminResponse;
use stdx::{Duration, Instant, Prng};

/// Virtual time that anything may take which a scenario waits for.
const PATIENCE: Duration = Duration::from_secs(30);
const DISK_SIZE: u64 = 1 << 30;

/// A scenario.
pub struct Scenario {
    world: World,
}

impl Scenario {
    /// Three servers, all of them the ring, and two copies, unless the caller wants others; all ready.
    pub fn new(seed: u64, wanted: &Overrides) -> Scenario {
        let overrides = Overrides {
            servers: wanted.servers.or(Some(3)),
            copies: wanted.copies.or(Some(2)),
            crowded: true,
            swift: true,
            snapshots: true,
            scripted: true,
            ..wanted.clone()
        };
        let mut prng = Prng::new(seed);
        let mut options = Options::draw(&mut prng, &overrides);
        // One element after the other is in another slot; who dies is declared down soon.
        options.stripe_unit = ELEMENT_SIZE;
        options.bury_after = Some(Duration::from_millis(1));
        options.faulty = Duration::from_secs(3600);
        let mut scenario = Scenario { world: World::new(options, prng, Trace::new(Keep::Hash)) };
        scenario.until("everybody is ready", |w| {
            let servers = w.servers.iter().all(|s| s.life.as_ref().is_some_and(|l| l.ready));
            servers && w.clients.iter().all(|c| c.life.is_some())
        });
        scenario
    }

    /// Waits for something.
    fn until(&mut self, what: &str, is_so: impl Fn(&World) -> bool) {
        let end = self.world.now + PATIENCE;
        while !is_so(&self.world) {
            let goes_on = self.world.advance() && self.world.now < end;
            assert!(goes_on, "it never was that {what}; complaints: {:#?}", self.world.complaints);
        }
    }

    /// Waits until the newest state is such.
    pub fn until_state(&mut self, what: &str, is_so: impl Fn(&State) -> bool) {
        self.until(what, |world| world.newest_state().is_some_and(&is_so));
    }

    /// Virtual time.
    pub fn now(&self) -> Instant {
        self.world.now
    }

    /// Lets time go by.
    pub fn pass(&mut self, time: Duration) {
        let end = self.world.now + time;
        while self.world.now < end && self.world.advance() {}
    }

    /// Servers go on, everything is read and written once more, and compared: what must not be.
    pub fn finish(mut self) -> Vec<String> {
        self.world.end_script();
        self.world.run();
        self.world.check_history();
        self.world.complaints
    }

    // --------------------------------------------------------------------------------------------
    // Disks and sessions.

    /// Makes a disk with one hot block in each of so many elements, each in another slot as far as there are slots.
    pub fn create(&mut self, name: &str, elements: u64) -> VdiskId {
        let scheme = scheme_of(self.world.options.copies[0]);
        let stripe_unit = self.world.options.stripe_unit;
        let command = Command::CreateDisk { name: name.into(), size: DISK_SIZE, scheme, stripe_unit };
        self.world.execute(0, command, Call::Create { name: name.into(), size: DISK_SIZE });
        self.idle(0);
        let vdisk = self.named(name).expect("the disk was made");
        let spot = |element: u64| vec![element * ELEMENT_SIZE, element * ELEMENT_SIZE + 4096];
        let layout = Layout { spots: (0..elements).map(spot).collect() };
        self.world.workload.disks.get_mut(&vdisk).expect("just made").layout = layout;
        vdisk
    }

    /// The first blocks of one element after the other, so many, are hot.
    pub fn fill_hot(&mut self, vdisk: VdiskId, blocks: u64) {
        let cuts = (0..=blocks).map(|block| block * 4096).collect();
        self.world.workload.disks.get_mut(&vdisk).expect("it was made").layout = Layout { spots: vec![cuts] };
    }

    /// What has this name now, as far as any server knows.
    pub fn named(&self, name: &str) -> Option<VdiskId> {
        self.state().vdisk_named(name).map(|v| v.id)
    }

    fn state(&self) -> &State {
        self.world.newest_state().expect("some server runs")
    }

    /// Attaches; `false` if that was refused.
    pub fn attach(&mut self, client: usize, name: &str, mode: Attachment) -> bool {
        // Who made it was told by one server; another one may hear of it a moment later.
        for _ in 0..100 {
            self.world.workload.lags = false;
            self.world.attach_as(client, name.into(), mode, false);
            self.idle(client);
            if !self.world.workload.lags || self.named(name).is_none() {
                break;
            }
            self.pass(Duration::from_millis(1));
        }
        let vdisk = self.named(name);
        vdisk.is_some_and(|vdisk| self.held(client, vdisk).is_some())
    }

    /// Gives back.
    pub fn detach(&mut self, client: usize, vdisk: VdiskId) {
        let session = self.held(client, vdisk).expect("it is attached").session;
        self.world.detach(client, session);
        self.idle(client);
    }

    fn held(&self, client: usize, vdisk: VdiskId) -> Option<Held> {
        let life = self.world.clients[client].life.as_ref()?;
        life.user.sessions().iter().find(|held| held.vdisk == vdisk).cloned()
    }

    // --------------------------------------------------------------------------------------------
    // Reading and writing.

    /// Begins to write the hot block of an element.
    pub fn begin_write(&mut self, client: usize, vdisk: VdiskId, element: u64) {
        let held = self.held(client, vdisk).expect("it is attached");
        let start = element * ELEMENT_SIZE;
        self.world.write_range(client, held, start, start + 4096);
    }

    /// Writes it.
    pub fn write(&mut self, client: usize, vdisk: VdiskId, element: u64) {
        self.begin_write(client, vdisk, element);
        self.idle(client);
    }

    /// Begins to write a block.
    pub fn begin_write_block(&mut self, client: usize, vdisk: VdiskId, block: u64) {
        let held = self.held(client, vdisk).expect("it is attached");
        self.world.write_range(client, held, block * 4096, (block + 1) * 4096);
    }

    /// Begins to write several blocks of one element.
    pub fn begin_write_blocks(&mut self, client: usize, vdisk: VdiskId, first: u64, blocks: u64) {
        let held = self.held(client, vdisk).expect("it is attached");
        self.world.write_range(client, held, first * 4096, (first + blocks) * 4096);
    }

    /// Begins to read the hot block of an element.
    pub fn begin_read(&mut self, client: usize, vdisk: VdiskId, element: u64) {
        let held = self.held(client, vdisk).expect("it is attached");
        let start = element * ELEMENT_SIZE;
        self.world.read_range(client, held, start, start + 4096);
    }

    /// Reads the hot blocks of these elements, and waits.
    pub fn read(&mut self, client: usize, vdisk: VdiskId, elements: impl IntoIterator<Item = u64>) {
        for element in elements {
            self.begin_read(client, vdisk, element);
        }
        self.idle(client);
    }

    /// What was read last of an element's hot block, through a client that still has it attached.
    pub fn value(&self, client: usize, vdisk: VdiskId, element: u64) -> Option<Value> {
        let held = self.held(client, vdisk)?;
        let shown = self.world.checkers.families.shown(vdisk, held.session)?;
        let cell = self.world.history.of_cell((shown, element * ELEMENT_SIZE));
        cell.iter().rev().find_map(|o| match o.action {
            crate::checkers::linearizability::Action::Read(value) => Some(value),
            crate::checkers::linearizability::Action::Write(_) => None,
        })
    }

    /// Operations of a client without an answer.
    pub fn outstanding(&self, client: usize) -> usize {
        self.world.clients[client].life.as_ref().map_or(0, |l| l.user.outstanding())
    }

    /// Number of the operation that was asked last.
    pub fn last_operation(&self) -> OperationId {
        self.world.history.last()
    }

    /// Waits until a client has all its answers.
    pub fn idle(&mut self, client: usize) {
        self.until("the client has its answers", |w| w.clients[client].life.as_ref().is_some_and(|l| l.user.is_idle()));
    }

    // --------------------------------------------------------------------------------------------
    // Management.

    fn keeper(&self) -> usize {
        self.world.clients.iter().position(|c| c.role == Role::Keeper).expect("there is a keeper")
    }

    /// Asks for snapshots of these disks at one instant; their names.
    pub fn begin_snapshot(&mut self, disks: &[VdiskId]) -> Vec<String> {
        let state = self.state().clone();
        let disks: Vec<_> = disks.iter().map(|v| state.vdisk(*v).expect("it exists")).collect();
        self.world.take_snapshots(self.keeper(), SnapshotMix::default(), &disks)
    }

    /// The snapshot call is still without its answer.
    pub fn is_taking(&self) -> bool {
        self.outstanding(self.keeper()) > 0
    }

    /// Waits until all that was asked of the keeper has been answered.
    pub fn taken(&mut self) {
        self.idle(self.keeper());
    }

    /// Takes a snapshot and waits for the answer; its name and id.
    pub fn snapshot(&mut self, disk: VdiskId) -> (String, VdiskId) {
        let name = self.begin_snapshot(&[disk]).remove(0);
        self.taken();
        let id = self.named(&name).expect("the snapshot was made");
        (name, id)
    }

    /// Clones a snapshot or a disk; its name and id.
    pub fn clone_of(&mut self, source: VdiskId) -> (String, VdiskId) {
        let state = self.state().clone();
        let source = state.vdisk(source).expect("it exists");
        let name = self.world.clone_of(self.keeper(), SnapshotMix::default(), source);
        self.taken();
        let id = self.named(&name).expect("the clone was made");
        (name, id)
    }

    /// Asks for a rollback.
    pub fn begin_rollback(&mut self, disk: VdiskId, to: VdiskId) {
        let state = self.state().clone();
        self.world.roll_back(self.keeper(), &state, disk, to);
    }

    /// A command of the operator; what became of it.
    pub fn execute(&mut self, command: Command) -> Result<(StateIndex, Outcome), RequestError> {
        let before = self.world.answers.len();
        self.begin_execute(command);
        self.until("the command is answered", |w| w.answers.len() > before);
        match self.world.answers.pop().expect("just answered")? {
            Response::Admin(AdminResponse::Executed { index, outcome, .. }) => Ok((index, outcome)),
            other => panic!("a command was answered with {other:?}"),
        }
    }

    /// A command that nobody waits for.
    pub fn begin_execute(&mut self, command: Command) {
        self.world.ask(0, crate::ask::execute(command), Asked::Scripted);
    }

    /// Ends somebody's session, as an operator does; nobody waits for it to be settled.
    pub fn evict(&mut self, client: usize, vdisk: VdiskId) {
        let session = self.held(client, vdisk).expect("it is attached").session;
        self.begin_execute(Command::Detach { session });
        self.until("the session is over", |w| w.newest_state().is_some_and(|s| s.session(session).is_none()));
    }

    /// Waits until the disk is what one of its snapshots was.
    pub fn rolled_back(&mut self, disk: VdiskId) {
        let before = self.state().vdisk(disk).map(|v| v.lineage);
        self.until("the disk is rolled back", |w| {
            w.newest_state().and_then(|s| s.vdisk(disk)).map(|v| v.lineage) != before
        });
    }

    // --------------------------------------------------------------------------------------------
    // Servers.

    /// The hosts that hold an element, the one that acts for it first.
    pub fn hosts_of(&self, vdisk: VdiskId, element: u64) -> Vec<usize> {
        let state = self.state();
        let family = state.vdisk(vdisk).expect("it exists").family;
        let slot = state.slot_of(family, element).and_then(|s| state.slot(s)).expect("it has a slot");
        slot.in_sync().map(|server| self.host(server)).collect()
    }

    fn host(&self, server: ServerId) -> usize {
        self.world.servers.iter().position(|s| s.id == Some(server)).expect("every server has a host")
    }

    /// Kills a server; it stays dead, and is declared down.
    pub fn crash(&mut self, host: usize) {
        self.world.crash_server(host);
    }

    /// A server does nothing for so long.
    pub fn freeze(&mut self, host: usize, time: Duration) {
        self.world.servers[host].frozen_until = self.world.now + time;
    }

    /// Waits until a server is suspected.
    pub fn suspected(&mut self, host: usize) {
        let id = self.world.servers[host].id.expect("it has an id");
        self.until("it is suspected", |w| w.newest_state().is_some_and(|s| s.servers[&id].suspect.is_some()));
    }

    /// A server is taken out of an element's slot, as by one that does not know yet that it is suspected.
    pub fn take_out(&mut self, host: usize, vdisk: VdiskId, element: u64) -> Result<(), RequestError> {
        let state = self.state();
        let family = state.vdisk(vdisk).expect("it exists").family;
        let slot = state.slot_of(family, element).expect("it has a slot");
        let term = state.slot(slot).expect("it has a slot").term;
        let server = self.world.servers[host].id.expect("it has an id");
        self.execute(Command::TakeOut { server, slots: vec![(slot, term)] }).map(|_| ())
    }

    /// A server is declared down.
    pub fn is_down(&self, host: usize) -> bool {
        let id = self.world.servers[host].id.expect("it has an id");
        self.state().servers[&id].down
    }

    /// Waits until a server is declared down.
    pub fn down(&mut self, host: usize) {
        let id = self.world.servers[host].id.expect("it has an id");
        self.until("it is down", |w| w.newest_state().is_some_and(|s| s.servers[&id].down));
    }

    /// Starts a server.
    pub fn start(&mut self, host: usize) {
        let now = self.world.now;
        self.world.plan_start(Node::Server(host), now);
    }

    /// A server starts without its last disk. True if that life becomes ready.
    pub fn start_without_a_disk(&mut self, host: usize) -> bool {
        self.world.servers[host].lacks_a_disk = true;
        self.start(host);
        self.until("it begins", |w| w.servers[host].life.is_some());
        self.until("it is ready or gone", |w| w.servers[host].life.as_ref().is_none_or(|l| l.ready));
        self.world.servers[host].lacks_a_disk = false;
        self.world.servers[host].life.is_some()
    }

    /// A server dies and loses its disks; it starts with new ones.
    pub fn lose_disks(&mut self, host: usize) {
        self.world.lose_disks_of(host);
    }

    /// Some member is out of sync.
    pub fn is_recovering(&self) -> bool {
        self.world.is_recovering()
    }

    /// A server is ready.
    pub fn ready(&mut self, host: usize) {
        self.until("it is ready", |w| w.servers[host].life.as_ref().is_some_and(|l| l.ready));
    }

    /// Waits until every member is in sync.
    pub fn in_sync(&mut self) {
        self.until("everybody is in sync", |w| w.unready().is_none());
    }

    /// What one server sends to another arrives only after this time.
    pub fn hold(&mut self, from: usize, to: usize, time: Duration) {
        let until = self.world.now + time;
        for (connection, side) in self.world.links(to) {
            let other = self.world.net.ends(connection).map(|ends| ends[side.other() as usize].node);
            if other == Some(Node::Server(from)) {
                self.world.net.stall(connection, side, until);
            }
        }
    }

    /// What the others send to a server arrives only after this time.
    pub fn deafen(&mut self, host: usize, time: Duration) {
        for other in (0..self.world.servers.len()).filter(|o| *o != host) {
            self.hold(other, host, time);
        }
    }

    /// A client reaches no server but this one for so long.
    pub fn leave_with(&mut self, client: usize, host: usize, time: Duration) {
        let until = self.world.now + time;
        let Some(at) = self.world.clients[client].end_point(client) else { return };
        for (connection, side) in self.world.net.of(at) {
            let is_other = |ends: [crate::net::EndPoint; 2]| ends.iter().all(|e| e.node != Node::Server(host));
            if self.world.net.ends(connection).is_some_and(is_other) {
                self.world.net.stall(connection, side, until);
                self.world.net.stall(connection, side.other(), until);
            }
        }
    }

    /// Waits until some server knows this name.
    pub fn exists(&mut self, name: &str) {
        self.until("there is something of that name", |w| {
            w.newest_state().is_some_and(|s| s.vdisk_named(name).is_some())
        });
    }

    /// Operations that were refused because their session was over.
    pub fn fenced(&self) -> u64 {
        self.world.counters.get(crate::counters::Kind::Fenced)
    }

    /// Operations that were refused for lack of space.
    pub fn refused_for_space(&self) -> u64 {
        self.world.counters.get(crate::counters::Kind::NoSpace)
    }
}
