//! The client against a pretended cluster: one set of bytes, and servers that answer what they are
//! told to, refuse, break connections, or say nothing.

use super::*;
use crate::global_state::{CommandError, Outcome};
use crate::message::*;
use crate::store::BlockSum;
use crate::translator::gmap::slot_of_element;
use crate::translator::vdir::{Automatic, Family, Imported, Lineage, Policy, Vdisk};
use stdx::checksum::crc32c;

mod hedges;
mod relays;

const SERVERS: u16 = 4;
const SLOTS: u32 = 8;
const SIZE: u64 = 64 << 20;

/// One write as it was asked for: element, first byte, bytes (`None`: so many zeros).
type Change = (u64, u32, Result<Bytes, u32>);

/// What every server of the pretended cluster knows.
struct World {
    now: Instant,
    client: Client,
    replies: BTreeMap<RequestNumber, Result<Response, RequestError>>,
    warnings: Vec<String>,
    /// Sent and not yet handled: `(server, life of the connection, message)`.
    to_servers: VecDeque<(ServerId, u64, Message)>,
    to_client: VecDeque<(ServerId, u64, Message)>,
    /// Connections: number of the present one, if it is up.
    up: BTreeMap<ServerId, Option<u64>>,
    connections: u64,
    hints: Hints,
    elements: BTreeMap<u64, Vec<u8>>,
    sessions: BTreeMap<SessionId, bool>,
    commands: BTreeMap<u64, AdminResponse>,
    applied: BTreeMap<u64, Change>,
    finished_below: u64,
    /// Next answers to data messages, instead of true ones.
    refuse: VecDeque<Refusal>,
    /// Flip a bit in the next read answered by this server.
    rot: Option<ServerId>,
    /// Elements that a `Map` tells in one answer.
    map_limit: usize,
    counts: BTreeMap<&'static str, u64>,
    /// Who was asked for hints.
    hinted: BTreeSet<ServerId>,
    next_number: RequestNumber,
}

impl World {
    fn new() -> World {
        Self::with(SIZE, None)
    }

    fn with(size: u64, deadline: Option<Duration>) -> World {
        let addresses = |s: u16| vec![format!("host{s}:1")];
        let config = ClientConfig {
            servers: (1..=SERVERS).map(|s| (ServerId(s), addresses(s))).collect(),
            proposer: 77,
            deadline,
        };
        let server = |n: u32| ServerId((n % u32::from(SERVERS)) as u16 + 1);
        let vdisk = Vdisk {
            id: VdiskId(5),
            name: "vol0".into(),
            size,
            family: FamilyId(5),
            lineage: LineageId(1),
            epoch: Epoch(1),
            snapshot_of: None,
            stands_on: 0,
            protected: false,
            made: 0,
            policy: Policy::default(),
            imported: Imported::default(),
            reached: None,
            automatic: Automatic::default(),
            revision: 5,
            sessions: vec![],
        };
        let hints = Hints {
            state_index: 10,
            vdisk,
            family: Family {
                id: FamilyId(5),
                gmap: GmapId(3),
                stripe_unit: 1 << 20,
                shift: 3,
                revision: 5,
                lineages: [(LineageId(1), Lineage { parent: None })].into(),
                next_lineage: LineageId(2),
            },
            revision: 5,
            slots: (0..SLOTS).map(|n| SlotHint { term: 4, in_sync: vec![server(n), server(n + 1)] }).collect(),
            servers: (1..=SERVERS).map(|s| ServerHint { server: ServerId(s), addresses: addresses(s) }).collect(),
        };
        let now = Instant::from_nanos(1_000_000_000);
        let mut world = World {
            now,
            client: Client::new(now, config),
            replies: BTreeMap::new(),
            warnings: Vec::new(),
            to_servers: VecDeque::new(),
            to_client: VecDeque::new(),
            up: (1..=SERVERS).map(|s| (ServerId(s), None)).collect(),
            connections: 0,
            hints,
            elements: BTreeMap::new(),
            sessions: BTreeMap::new(),
            commands: BTreeMap::new(),
            applied: BTreeMap::new(),
            finished_below: 0,
            refuse: VecDeque::new(),
            rot: None,
            map_limit: 1000,
            counts: BTreeMap::new(),
            hinted: BTreeSet::new(),
            next_number: 0,
        };
        for server in 1..=SERVERS {
            world.connect(ServerId(server));
        }
        world
    }

    /// A world with the disk attached.
    fn attached() -> (World, SessionId) {
        Self::new().attach()
    }

    fn attach(mut self) -> (World, SessionId) {
        let mode = Attachment::Exclusive;
        let request = Request::Attach { name: "vol0".into(), mode, holder: "test".into(), take_over: false };
        match self.run(request) {
            Ok(Response::Attached { session, vdisk, size }) => {
                assert_eq!((vdisk, size), (VdiskId(5), self.hints.vdisk.size));
                (self, session)
            }
            other => panic!("attach answered {other:?}"),
        }
    }

    // ---- driving

    fn input(&mut self, input: Input) {
        self.client.handle(self.now, input);
        self.client.check_invariants();
        while let Some(output) = self.client.poll_output() {
            match output {
                Output::Send { to, message } => {
                    let connection = self.up[&to].expect("it sends only over connections that are up");
                    self.check_finished_below(&message.body);
                    self.to_servers.push_back((to, connection, message));
                }
                Output::Reply { number, result } => {
                    assert!(self.replies.insert(number, result).is_none(), "answered once");
                }
                Output::Warning(text) => self.warnings.push(text),
                Output::Dial { .. } => *self.counts.entry("dial").or_default() += 1,
            }
        }
    }

    fn check_finished_below(&mut self, body: &Body) {
        let (Body::Write(Write { finished_below, .. }) | Body::Zero(Zero { finished_below, .. })) = body else {
            return;
        };
        assert!(*finished_below >= self.finished_below, "it never falls (I6)");
        self.finished_below = *finished_below;
    }

    fn connect(&mut self, server: ServerId) {
        self.connections += 1;
        self.up.insert(server, Some(self.connections));
        self.input(Input::Connected { server, incarnation: Incarnation(1) });
    }

    fn disconnect(&mut self, server: ServerId) {
        self.up.insert(server, None);
        self.input(Input::Disconnected { server });
    }

    fn ask(&mut self, request: Request) -> RequestNumber {
        self.next_number += 1;
        let number = self.next_number;
        self.input(Input::Request { number, request });
        number
    }

    /// Delivers everything until nothing moves.
    fn settle(&mut self) {
        loop {
            if let Some((server, connection, message)) = self.to_servers.pop_front() {
                if self.up[&server] == Some(connection) {
                    self.serve(server, connection, message);
                }
            } else if let Some((from, connection, message)) = self.to_client.pop_front() {
                if self.up[&from] == Some(connection) {
                    self.input(Input::Message { from, message });
                }
            } else {
                return;
            }
        }
    }

    fn sleep(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.client.next_timeout().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            self.input(Input::Tick);
            self.settle();
        }
        self.now = end;
    }

    /// Asks and waits for at most two minutes of virtual time.
    fn run(&mut self, request: Request) -> Result<Response, RequestError> {
        let number = self.ask(request);
        self.wait(number)
    }

    fn wait(&mut self, number: RequestNumber) -> Result<Response, RequestError> {
        for _ in 0..12_000 {
            self.settle();
            if let Some(result) = self.replies.remove(&number) {
                return result;
            }
            self.sleep(Duration::from_millis(10));
        }
        panic!("request {number} is not answered: {:#?}", self.client);
    }

    fn read(&mut self, session: SessionId, offset: u64, length: u64) -> Vec<u8> {
        match self.run(Request::Read { session, offset, length }) {
            Ok(Response::Data(pieces)) => pieces.concat(),
            other => panic!("read answered {other:?}"),
        }
    }

    fn write(&mut self, session: SessionId, offset: u64, data: &[u8]) {
        let data = Bytes::copy_from_slice(data);
        assert_eq!(self.run(Request::Write { session, offset, data }), Ok(Response::Done));
    }

    fn count(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    // ---- the servers

    fn slot(&self, element: u64) -> u32 {
        slot_of_element(element, self.hints.family.stripe_unit, self.hints.family.shift, SLOTS)
    }

    fn need(&self, element: u64) -> Need {
        Need { revision: self.hints.revision, term: self.hints.slots[self.slot(element) as usize].term }
    }

    fn serve(&mut self, server: ServerId, connection: u64, message: Message) {
        let name = match &message.body {
            Body::Read(_) => "read",
            Body::Write(_) => "write",
            Body::Zero(_) => "zero",
            Body::Map(_) => "map",
            _ => "admin",
        };
        *self.counts.entry(name).or_default() += 1;
        let body = match message.body {
            Body::Admin(admin) => {
                Body::AdminReply(AdminReply { tag: admin.tag, result: self.admin(server, admin.request) })
            }
            Body::Read(m) => self.serve_read(server, m),
            Body::Write(m) => {
                assert_eq!(m.crcs, split::piece_crcs(m.offset, &m.data.to_bytes()));
                let change = (m.element, m.offset, Ok(m.data.to_bytes()));
                self.serve_change(server, m.access, m.number, m.finished_below, change)
            }
            Body::Zero(m) => {
                let change = (m.element, m.offset, Err(m.length));
                self.serve_change(server, m.access, m.number, m.finished_below, change)
            }
            Body::Map(m) => self.serve_map(server, m),
            other => panic!("a client sends no {other:?}"),
        };
        let message = Message { state_index: self.hints.state_index, body };
        self.to_client.push_back((server, connection, message));
    }

    fn admin(&mut self, server: ServerId, request: AdminRequest) -> Result<AdminResponse, AdminError> {
        match request {
            AdminRequest::Hints { name } if name != "vol0" => Err(AdminError::NoSuchDisk(name)),
            AdminRequest::Hints { .. } | AdminRequest::HintsById { .. } => {
                *self.counts.entry("hints").or_default() += 1;
                self.hinted.insert(server);
                Ok(AdminResponse::Hints(Box::new(self.hints.clone())))
            }
            AdminRequest::Execute { id, command, .. } => {
                assert_eq!(id.proposer, 77);
                if !self.commands.contains_key(&id.number) {
                    self.hints.state_index += 1;
                    self.hints.revision = self.hints.state_index;
                    let outcome = self.execute(command);
                    let index = self.hints.state_index;
                    self.commands.insert(id.number, AdminResponse::Executed { index, outcome, unsettled: vec![] });
                }
                Ok(self.commands[&id.number].clone())
            }
            AdminRequest::ServerStatus => {
                Ok(AdminResponse::ServerStatus(Box::new(ServerStatus { server, ..ServerStatus::default() })))
            }
            _ => Ok(AdminResponse::ShuttingDown),
        }
    }

    fn execute(&mut self, command: Command) -> Outcome {
        match command {
            Command::Attach { .. } => {
                let session = SessionId(self.hints.state_index);
                self.sessions.insert(session, true);
                Outcome::Session(session)
            }
            Command::Detach { session } => {
                self.sessions.insert(session, false);
                Outcome::Done
            }
            _ => Outcome::Done,
        }
    }

    /// The checks that a server makes of every data message.
    fn check(&mut self, server: ServerId, element: u64, access: &Access, primary: bool) -> Result<(), Refusal> {
        if let Some(refusal) = self.refuse.pop_front() {
            return Err(refusal);
        }
        assert!(access.need.revision <= self.hints.revision && access.need.term <= self.need(element).term);
        let in_sync = &self.hints.slots[self.slot(element) as usize].in_sync;
        if (primary && in_sync[0] != server) || !in_sync.contains(&server) {
            return Err(Refusal::StaleMap);
        }
        if self.sessions.get(&access.session) != Some(&true) {
            return Err(Refusal::SessionEnded);
        }
        Ok(())
    }

    fn serve_read(&mut self, server: ServerId, m: Read) -> Body {
        let result = self.check(server, m.element, &m.access, false);
        let mut data = Vec::new();
        let result = result.map(|()| {
            let empty = vec![0; ELEMENT_SIZE as usize];
            let element = self.elements.get(&m.element).unwrap_or(&empty);
            let blocks = element.chunks(4096).skip(m.first_block.into()).take(m.blocks.into());
            let sum = |block: &[u8]| {
                if block.iter().all(|b| *b == 0) {
                    return BlockSum::Zero;
                }
                data.extend_from_slice(block);
                BlockSum::Crc(crc32c(block))
            };
            blocks.map(sum).collect()
        });
        if self.rot == Some(server) && !data.is_empty() {
            data[0] ^= 1;
        }
        let (tag, need) = (m.access.tag, self.need(m.element));
        Body::ReadReply(ReadReply { tag, need, result, data: Bytes::from(data).into() })
    }

    fn serve_change(
        &mut self,
        server: ServerId,
        access: Access,
        number: u64,
        finished_below: u64,
        change: Change,
    ) -> Body {
        assert!(finished_below <= number, "a number is sent that is finished (I6)");
        let element = change.0;
        let result = self.check(server, element, &access, true);
        if result.is_ok() {
            match self.applied.get(&number) {
                Some(before) => {
                    assert_eq!(before, &change, "a number stands for one change");
                    *self.counts.entry("again").or_default() += 1;
                }
                None => {
                    self.apply(&change);
                    self.applied.insert(number, change);
                }
            }
        }
        Body::WriteReply(WriteReply { tag: access.tag, need: self.need(element), result })
    }

    fn apply(&mut self, (element, offset, what): &Change) {
        let bytes = self.elements.entry(*element).or_insert_with(|| vec![0; ELEMENT_SIZE as usize]);
        let from = *offset as usize;
        match what {
            Ok(data) => bytes[from..from + data.len()].copy_from_slice(data),
            Err(length) => bytes[from..from + *length as usize].fill(0),
        }
    }

    fn serve_map(&mut self, server: ServerId, m: Map) -> Body {
        if let Some(refusal) = self.refuse.pop_front() {
            return Body::MapReply(MapReply { tag: m.access.tag, result: Err(refusal) });
        }
        let acts = |e: &u64| self.hints.slots[self.slot(*e) as usize].in_sync[0] == server;
        let mut elements = Vec::new();
        let mut complete_below = m.end_element;
        for (element, bytes) in self.elements.range(m.first_element..m.end_element).filter(|(e, _)| acts(e)) {
            if elements.len() == self.map_limit {
                complete_below = *element;
                break;
            }
            let bit = |(n, block): (usize, &[u8])| u16::from(block.iter().any(|b| *b != 0)) << n;
            let mask = bytes.chunks(4096).enumerate().map(bit).sum();
            if mask != 0 {
                elements.push((*element, mask));
            }
        }
        let not_here = (0..SLOTS).filter(|s| self.hints.slots[*s as usize].in_sync[0] != server).collect();
        let part = MapPart { elements, complete_below, not_here };
        Body::MapReply(MapReply { tag: m.access.tag, result: Ok(part) })
    }

    /// A command gives the slots of `from` to the other member, as a failover would.
    fn fail_over(&mut self, from: ServerId) {
        self.hints.state_index += 1;
        for slot in self.hints.slots.iter_mut().filter(|s| s.in_sync.len() > 1 && s.in_sync.contains(&from)) {
            slot.in_sync.retain(|s| *s != from);
            slot.term = self.hints.state_index;
        }
    }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut prng = Prng::new(seed);
    (0..length).map(|_| prng.next_u64() as u8).collect()
}

// ------------------------------------------------------------------------------------------------

#[test]
fn attach_looks_up_executes_and_learns_what_came_of_it() {
    let (world, session) = World::attached();
    assert_eq!(session, SessionId(11));
    // By name before the command, by id after it.
    assert_eq!(world.count("hints"), 2);
    assert_eq!(world.client.size(session), Some(SIZE));
}

#[test]
fn attach_to_a_disk_that_is_not_there_is_refused() {
    let mut world = World::new();
    let mode = Attachment::Shared;
    let request = Request::Attach { name: "vol1".into(), mode, holder: "test".into(), take_over: false };
    assert_eq!(world.run(request), Err(RequestError::Admin(AdminError::NoSuchDisk("vol1".into()))));
}

#[test]
fn an_aligned_write_is_one_message_to_the_acting_primary() {
    let (mut world, session) = World::attached();
    world.ask(Request::Write { session, offset: 8192, data: Bytes::from(vec![9; 4096]) });
    let (to, _, message) = world.to_servers.pop_front().unwrap();
    // Element 0 is in slot (0 + shift 3) mod 8, whose first member is s4.
    assert_eq!(to, ServerId(4));
    let Body::Write(write) = message.body else { panic!("{message:?}") };
    assert_eq!((write.element, write.offset, write.number, write.finished_below), (0, 8192, 1, 1));
    assert_eq!(write.crcs, [crc32c(&[9; 4096])]);
    assert_eq!(write.access.need, Need { revision: 11, term: 4 });
    assert_eq!(message.state_index, 11);
    assert!(world.to_servers.is_empty());
}

#[test]
fn requests_straddle_elements_and_stripe_units() {
    let (mut world, session) = World::attached();
    let data = pattern(1, 3 << 20);
    world.write(session, (1 << 20) - 5000, &data);
    // 5000 bytes, 2 MiB, and the rest of a third: 49 elements of four stripe units.
    assert_eq!(world.count("write"), 49);
    assert_eq!(world.read(session, (1 << 20) - 5000, 3 << 20), data);
    assert_eq!(world.read(session, (1 << 20) - 6000, 2000), [vec![0; 1000], data[..1000].to_vec()].concat());
}

#[test]
fn both_copies_serve_reads() {
    let (mut world, session) = World::attached();
    for _ in 0..20 {
        world.ask(Request::Read { session, offset: 0, length: 4096 });
    }
    let mut servers: Vec<u16> = world.to_servers.iter().map(|m| m.0.0).collect();
    servers.sort_unstable();
    assert_eq!(servers, [[1; 10], [4; 10]].concat());
}

#[test]
fn a_write_without_answer_keeps_its_number_on_the_next_connection() {
    let (mut world, session) = World::attached();
    let number = world.ask(Request::Write { session, offset: 0, data: Bytes::from(vec![1; 512]) });
    let (to, _, first) = world.to_servers.pop_front().unwrap();
    world.serve(to, 0, first);
    world.disconnect(to);
    assert!(world.replies.is_empty());
    world.connect(to);
    assert_eq!(world.wait(number), Ok(Response::Done));
    assert_eq!((world.count("write"), world.count("again")), (2, 1));
}

#[test]
fn stale_map_leads_to_new_hints_and_the_same_number_elsewhere() {
    let (mut world, session) = World::attached();
    let hints = world.count("hints");
    world.fail_over(ServerId(4));
    world.write(session, 0, b"hello");
    assert_eq!(world.count("hints"), hints + 1);
    assert_eq!(world.applied.keys().copied().collect::<Vec<_>>(), [1]);
    assert_eq!(world.read(session, 0, 5), b"hello");
}

/// It may be cut off from those that know more.
#[test]
fn who_told_nothing_new_is_not_asked_for_hints_again_at_once() {
    let (mut world, session) = World::attached();
    world.hinted.clear();
    world.refuse = [Refusal::NotReady; 12].into();
    world.write(session, 0, b"hello");
    assert!(world.refuse.is_empty() && world.hinted.len() == SERVERS as usize, "asked were {:?}", world.hinted);
}

#[test]
fn operations_for_a_lost_server_go_to_its_successor_when_hints_say_so() {
    let (mut world, session) = World::attached();
    world.disconnect(ServerId(4));
    let number = world.ask(Request::Write { session, offset: 0, data: Bytes::from(vec![1; 512]) });
    world.settle();
    assert!(world.replies.is_empty());
    world.fail_over(ServerId(4));
    assert_eq!(world.wait(number), Ok(Response::Done));
}

#[test]
fn reads_go_to_the_copy_that_is_connected() {
    let (mut world, session) = World::attached();
    world.write(session, 0, b"x");
    world.disconnect(ServerId(4));
    for _ in 0..5 {
        assert_eq!(world.read(session, 0, 1), b"x");
    }
}

#[test]
fn a_newer_need_in_a_reply_is_merged_and_fetches_hints_in_the_background() {
    let (mut world, session) = World::attached();
    world.sleep(Duration::from_secs(2));
    let hints = world.count("hints");
    world.hints.state_index = 30;
    world.hints.revision = 30;
    world.hints.vdisk.size = 2 * SIZE;
    world.write(session, 0, b"x");
    world.settle();
    assert_eq!(world.count("hints"), hints + 1);
    assert_eq!(world.client.size(session), Some(2 * SIZE));
    world.ask(Request::Read { session, offset: 0, length: 1 });
    let Body::Read(read) = &world.to_servers[0].2.body else { panic!() };
    assert_eq!(read.access.need.revision, 30);
}

#[test]
fn refusals_that_pass_are_tried_again_and_others_are_told() {
    let (mut world, session) = World::attached();
    world.refuse = [Refusal::NotReady, Refusal::TooMany, Refusal::NotReady].into();
    world.write(session, 0, b"x");
    for refusal in [Refusal::NoSpace, Refusal::BeyondEnd, Refusal::Malformed, Refusal::SessionEnded] {
        world.refuse = [refusal].into();
        let request = Request::Write { session, offset: 0, data: Bytes::from_static(b"y") };
        assert_eq!(world.run(request), Err(RequestError::Refused(refusal)));
    }
    assert_eq!(world.read(session, 0, 1), b"x");
}

#[test]
fn a_busy_secondary_sends_the_read_to_the_primary() {
    let (mut world, session) = World::attached();
    world.ask(Request::Read { session, offset: 0, length: 4096 });
    world.ask(Request::Read { session, offset: 0, length: 4096 });
    let at = world.to_servers.iter().position(|m| m.0 == ServerId(1)).unwrap();
    let (server, connection, message) = world.to_servers.remove(at).unwrap();
    world.refuse = [Refusal::Busy].into();
    world.to_servers.clear();
    world.serve(server, connection, message);
    let (from, _, message) = world.to_client.pop_front().unwrap();
    world.input(Input::Message { from, message });
    assert_eq!(world.to_servers[0].0, ServerId(4));
}

#[test]
fn a_rotten_copy_never_reaches_the_caller() {
    let (mut world, session) = World::attached();
    let data = pattern(3, 8192);
    world.write(session, 0, &data);
    world.rot = Some(ServerId(4));
    for _ in 0..4 {
        assert_eq!(world.read(session, 0, 8192), data);
    }
    world.fail_over(ServerId(1));
    let request = Request::Read { session, offset: 0, length: 4096 };
    assert_eq!(world.run(request), Err(RequestError::Refused(Refusal::BadCopy)));
}

#[test]
fn what_is_outside_of_the_disk_or_the_session_is_refused_at_once() {
    let (mut world, session) = World::attached();
    let beyond = Err(RequestError::Refused(Refusal::BeyondEnd));
    let read = |offset, length| Request::Read { session, offset, length };
    assert_eq!(world.run(read(SIZE - 1, 2)), beyond);
    assert_eq!(world.run(read(u64::MAX, 2)), beyond);
    assert_eq!(world.run(read(u64::MAX, u64::MAX)), beyond);
    assert_eq!(world.run(read(SIZE, 0)), Ok(Response::Data(vec![])));
    assert_eq!(world.run(read(SIZE - 1, 1)), Ok(Response::Data(vec![Bytes::from_static(&[0])])));
    let other = Request::Read { session: SessionId(1234), offset: 0, length: 1 };
    assert_eq!(world.run(other), Err(RequestError::NotAttached));
}

#[test]
fn disks_of_2_to_the_63_work_at_their_end() {
    let (mut world, session) = World::with(DISK_SIZE_MAX, None).attach();
    let offset = DISK_SIZE_MAX - 70_000;
    let data = pattern(4, 70_000);
    world.write(session, offset, &data);
    assert_eq!(world.read(session, offset, 70_000), data);
    let extents = Request::Extents { session, offset: 0, length: DISK_SIZE_MAX, than: None };
    let first = offset / 4096 * 4096;
    assert_eq!(world.run(extents), Ok(Response::Extents(vec![(first, false), (DISK_SIZE_MAX - first, true)])));
    let zero = Request::Zero { session, offset: 1, length: DISK_SIZE_MAX - 1, discard: false };
    assert_eq!(world.run(zero), Ok(Response::Done));
    assert_eq!(world.read(session, offset, 70_000), vec![0; 70_000]);
    assert!(world.count("map") < 20 && world.count("zero") < 20, "costs by what exists: {:?}", world.counts);
}

#[test]
fn the_longest_request_is_64_mib() {
    let (mut world, session) = World::with(1 << 30, None).attach();
    let data = Bytes::from(vec![7; REQUEST_LENGTH_MAX as usize]);
    assert_eq!(world.run(Request::Write { session, offset: 4096, data }), Ok(Response::Done));
    let read = |length| Request::Read { session, offset: 4096, length };
    let Ok(Response::Data(pieces)) = world.run(read(REQUEST_LENGTH_MAX)) else { panic!() };
    assert!(pieces.iter().all(|p| p.iter().all(|b| *b == 7)));
    let too_long = RequestError::TooLong { length: REQUEST_LENGTH_MAX + 1, max: REQUEST_LENGTH_MAX };
    assert_eq!(world.run(read(REQUEST_LENGTH_MAX + 1)), Err(too_long));
}

#[test]
fn memory_is_bounded_and_requests_wait_in_order() {
    let (mut world, session) = World::with(1 << 30, None).attach();
    let read = Request::Read { session, offset: 0, length: REQUEST_LENGTH_MAX };
    let numbers: Vec<_> = (0..10).map(|_| world.ask(read.clone())).collect();
    assert!(world.client.admitted <= CLIENT_BYTES_MAX);
    assert_eq!(world.client.waiting.len(), 7);
    assert!(world.to_servers.len() <= CLIENT_WINDOW * usize::from(SERVERS));
    for number in numbers {
        assert!(world.wait(number).is_ok());
    }
    assert_eq!(world.client.admitted, 0);
}

#[test]
fn discards_leave_partly_covered_blocks_alone_and_zeroes_are_exact() {
    let (mut world, session) = World::attached();
    let ones = vec![1; 16384];
    world.write(session, 0, &ones);
    let zero = |offset, length, discard| Request::Zero { session, offset, length, discard };
    assert_eq!(world.run(zero(100, 4000, true)), Ok(Response::Done));
    assert_eq!(world.read(session, 0, 16384), ones);
    assert_eq!(world.run(zero(100, 8192, true)), Ok(Response::Done));
    assert_eq!(world.read(session, 4000, 5000), [vec![1; 96], vec![0; 4096], vec![1; 808]].concat());
    assert_eq!(world.run(zero(16000, 200, false)), Ok(Response::Done));
    assert_eq!(world.read(session, 15999, 202), [vec![1], vec![0; 200], vec![1]].concat());
}

#[test]
fn walks_go_on_when_answers_are_partial_and_the_map_changes() {
    let (mut world, session) = World::with(1 << 40, None).attach();
    let mut prng = Prng::new(8);
    let elements: BTreeSet<u64> = (0..200).map(|_| prng.below(1 << 24)).collect();
    for element in &elements {
        world.elements.insert(*element, vec![5; ELEMENT_SIZE as usize]);
    }
    world.map_limit = 3;
    let extents = world.ask(Request::Extents { session, offset: 0, length: 1 << 40, than: None });
    for step in 0..40 {
        if let Some((server, connection, message)) = world.to_servers.pop_front() {
            world.serve(server, connection, message);
        }
        if let Some((from, _, message)) = world.to_client.pop_front() {
            world.input(Input::Message { from, message });
        }
        if step == 20 {
            world.fail_over(ServerId(2));
        }
        world.sleep_quietly(Duration::from_millis(5));
    }
    let Ok(Response::Extents(runs)) = world.wait(extents) else { panic!() };
    let mut at = 0;
    let mut seen = BTreeSet::new();
    for (length, allocated) in runs {
        if allocated {
            seen.extend(at / ELEMENT_SIZE..(at + length) / ELEMENT_SIZE);
        }
        at += length;
    }
    assert_eq!(at, 1 << 40);
    assert_eq!(seen, elements);
    let number = world.ask(Request::Zero { session, offset: 0, length: 1 << 40, discard: true });
    world.refuse = [Refusal::NotReady, Refusal::StaleMap].into();
    assert_eq!(world.wait(number), Ok(Response::Done));
    assert!(world.elements.values().all(|e| e.iter().all(|b| *b == 0)));
}

#[test]
fn long_extents_are_told_in_parts() {
    let (mut world, session) = World::with(1 << 40, None).attach();
    let count = 2 * EXTENT_ELEMENTS_MAX as u64;
    for element in 0..count {
        let mut bytes = vec![0; ELEMENT_SIZE as usize];
        bytes[0] = 1;
        world.elements.insert(element * 3, bytes);
    }
    let (mut offset, mut blocks, mut parts) = (0, 0, 0);
    while offset < 1 << 40 {
        let request = Request::Extents { session, offset, length: (1 << 40) - offset, than: None };
        let Ok(Response::Extents(runs)) = world.run(request) else { panic!() };
        blocks += runs.iter().filter(|r| r.1).map(|r| r.0 / 4096).sum::<u64>();
        offset += runs.iter().map(|r| r.0).sum::<u64>();
        parts += 1;
    }
    assert_eq!(blocks, count);
    assert!((2..5).contains(&parts), "{parts} parts");
}

#[test]
fn detach_waits_for_requests_in_flight() {
    let (mut world, session) = World::attached();
    let write = world.ask(Request::Write { session, offset: 0, data: Bytes::from_static(b"last") });
    let detach = world.ask(Request::Detach { session });
    assert!(!world.to_servers.iter().any(|m| matches!(m.2.body, Body::Admin(_))));
    let late = Request::Write { session, offset: 0, data: Bytes::from_static(b"late") };
    assert_eq!(world.run(late), Err(RequestError::NotAttached));
    assert_eq!(world.replies.remove(&write), Some(Ok(Response::Done)));
    assert_eq!(world.wait(detach), Ok(Response::Done));
    assert!(!world.sessions[&session]);
    assert_eq!(world.run(Request::Detach { session }), Err(RequestError::NotAttached));
}

#[test]
fn a_command_is_executed_once_though_the_connection_breaks() {
    let mut world = World::new();
    let command = Command::Noop;
    let number = world.ask(Request::Execute { command, deadline: Duration::from_secs(5) });
    let (to, connection, message) = world.to_servers.pop_front().unwrap();
    world.serve(to, connection, message);
    world.to_client.clear();
    world.disconnect(to);
    let Ok(Response::Admin(AdminResponse::Executed { index, .. })) = world.wait(number) else { panic!() };
    assert_eq!((index, world.hints.state_index), (11, 11));
}

#[test]
fn a_command_that_no_frame_holds_is_refused_at_once() {
    let mut world = World::new();
    let command = Command::AddServer { addresses: vec!["x".repeat(COMMAND_MAX)], token: 1 };
    let result = world.run(Request::Execute { command, deadline: Duration::from_secs(5) });
    let is_refusal =
        |e: &RequestError| matches!(e, RequestError::Admin(AdminError::Refused(CommandError::TooLong { .. })));
    assert!(result.as_ref().is_err_and(is_refusal) && world.to_servers.is_empty(), "{result:?}");
}

#[test]
fn a_call_to_one_server_goes_nowhere_else() {
    let mut world = World::new();
    world.disconnect(ServerId(3));
    let call = |deadline| Request::Call { to: Some(ServerId(3)), request: AdminRequest::ServerStatus, deadline };
    let result = world.run(call(Some(Duration::from_millis(300))));
    let Err(RequestError::Deadline { waiting_for, .. }) = result else { panic!("{result:?}") };
    assert_eq!(waiting_for, "s3 (not connected)");
    let number = world.ask(call(None));
    world.connect(ServerId(3));
    let Ok(Response::Admin(AdminResponse::ServerStatus(status))) = world.wait(number) else { panic!() };
    assert_eq!(status.server, ServerId(3));
}

#[test]
fn a_server_that_was_told_to_stop_answers_by_going() {
    let mut world = World::new();
    let request = AdminRequest::Shutdown;
    let number = world.ask(Request::Call { to: Some(ServerId(2)), request, deadline: None });
    world.disconnect(ServerId(2));
    assert_eq!(world.wait(number), Ok(Response::Admin(AdminResponse::ShuttingDown)));
}

#[test]
fn people_are_told_for_whom_a_disk_waits_at_10_seconds_and_then_each_minute() {
    let (mut world, session) = World::attached();
    world.disconnect(ServerId(4));
    let number = world.ask(Request::Write { session, offset: 0, data: Bytes::from_static(b"x") });
    world.sleep(Duration::from_secs(9));
    assert_eq!(world.warnings, [""; 0]);
    world.sleep(Duration::from_secs(112));
    assert_eq!(world.warnings.len(), 2);
    assert_eq!(world.warnings[0], "vol0: waits for s4 (not connected) since 10 s");
    world.connect(ServerId(4));
    assert_eq!(world.wait(number), Ok(Response::Done));
    world.sleep(Duration::from_secs(2));
    assert_eq!(world.warnings[2], "vol0: goes on");
    assert_eq!(world.client.next_timeout(), None, "an idle client does not wake up");
}

#[test]
fn a_deadline_ends_a_request_and_its_number() {
    let (mut world, session) = World::with(SIZE, Some(Duration::from_secs(3))).attach();
    world.disconnect(ServerId(4));
    let request = Request::Write { session, offset: 0, data: Bytes::from_static(b"x") };
    let result = world.run(request);
    let Err(RequestError::Deadline { waiting_for, .. }) = result else { panic!("{result:?}") };
    assert_eq!(waiting_for, "s4 (not connected)");
    world.connect(ServerId(4));
    world.write(session, 1 << 20, b"y");
    assert_eq!(world.applied.keys().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(world.finished_below, 2);
}

#[test]
fn a_hung_write_lets_only_so_many_others_pass() {
    let (mut world, session) = World::attached();
    world.disconnect(ServerId(4));
    let hung = world.ask(Request::Write { session, offset: 0, data: Bytes::from_static(b"x") });
    // All other slots go on until the numbers are too far apart.
    let data = Bytes::from_static(b"y");
    let other = |n: u64| Request::Write { session, offset: (1 << 20) * (1 + n % 3), data: data.clone() };
    let numbers: Vec<_> = (0..SESSION_NUMBERS_MAX as u64 + 10)
        .map(|n| {
            let number = world.ask(other(n));
            world.settle();
            number
        })
        .collect();
    let waits = numbers.iter().filter(|n| !world.replies.contains_key(n)).count();
    assert_eq!(waits, 11);
    world.connect(ServerId(4));
    assert_eq!(world.wait(hung), Ok(Response::Done));
    world.settle();
    assert!(numbers.iter().all(|n| world.replies.contains_key(n)));
}

#[test]
fn whatever_happens_on_the_way_each_change_is_applied_once_and_reads_are_right() {
    for seed in 0..40 {
        storm(seed);
    }
}

/// Lanes of requests that do not touch each other's bytes, over connections that break and servers
/// that refuse; compared with plain bytes.
fn storm(seed: u64) {
    const LANES: u64 = 4;
    const LANE: u64 = 3 << 20;
    let mut prng = Prng::new(seed);
    let (mut world, session) = World::attached();
    world.map_limit = 5;
    let mut model = vec![0u8; (LANES * LANE) as usize];
    let mut running: Vec<Option<(RequestNumber, Request)>> = vec![None; LANES as usize];
    for step in 0..1500 {
        let calm = step > 1300;
        match prng.below(12) {
            0..=3 if !calm => {
                let lane = prng.below(LANES);
                if running[lane as usize].is_none() {
                    let request = random_request(&mut prng, session, lane * LANE, LANE);
                    running[lane as usize] = Some((world.ask(request.clone()), request));
                }
            }
            4..=6 if !world.to_servers.is_empty() => {
                let at = prng.below(world.to_servers.len() as u64) as usize;
                let (server, connection, message) = world.to_servers.remove(at).unwrap();
                if world.up[&server] == Some(connection) {
                    if !calm && prng.chance(1, 10) {
                        world.refuse =
                            [*prng.pick(&[Refusal::NotReady, Refusal::StaleMap, Refusal::TooMany, Refusal::Busy])]
                                .into();
                    }
                    world.serve(server, connection, message);
                    world.refuse.clear();
                }
            }
            7..=9 if !world.to_client.is_empty() => {
                let at = prng.below(world.to_client.len() as u64) as usize;
                let (from, connection, message) = world.to_client.remove(at).unwrap();
                if world.up[&from] == Some(connection) {
                    world.input(Input::Message { from, message });
                }
            }
            10 if !calm && prng.chance(1, 4) => {
                let server = ServerId(prng.between(1, u64::from(SERVERS)) as u16);
                match world.up[&server] {
                    Some(_) => world.disconnect(server),
                    None => world.connect(server),
                }
                if prng.chance(1, 8) {
                    world.fail_over(server);
                }
            }
            _ => world.sleep_quietly(Duration::from_millis(prng.below(40))),
        }
        for lane in &mut running {
            if let Some((number, request)) = lane
                && let Some(result) = world.replies.remove(number)
            {
                judge(&mut model, request, result, seed);
                *lane = None;
            }
        }
    }
    for server in 1..=SERVERS {
        if world.up[&ServerId(server)].is_none() {
            world.connect(ServerId(server));
        }
    }
    for (number, request) in running.into_iter().flatten() {
        let result = world.wait(number);
        judge(&mut model, &request, result, seed);
    }
    let end = world.read(session, 0, LANES * LANE);
    assert!(end == model, "seed {seed}");
    assert_eq!(world.run(Request::Detach { session }), Ok(Response::Done));
}

fn random_request(prng: &mut Prng, session: SessionId, base: u64, lane: u64) -> Request {
    let length = match prng.below(3) {
        0 => prng.between(1, 10_000),
        1 => 4096 * prng.between(1, 40),
        _ => prng.between(1, lane),
    };
    let mut offset = base + prng.below(lane - length + 1);
    if prng.chance(1, 2) {
        offset = (offset / 4096 * 4096).max(base);
    }
    match prng.below(8) {
        0..=2 => Request::Read { session, offset, length },
        3..=5 => Request::Write { session, offset, data: pattern(prng.next_u64(), length as usize).into() },
        6 => Request::Zero { session, offset, length, discard: prng.chance(1, 2) },
        _ => Request::Extents { session, offset, length, than: None },
    }
}

fn judge(model: &mut [u8], request: &Request, result: Result<Response, RequestError>, seed: u64) {
    let range = |offset: &u64, length: u64| *offset as usize..(*offset + length) as usize;
    match (request, result) {
        (Request::Read { offset, length, .. }, Ok(Response::Data(data))) => {
            assert!(data.concat() == model[range(offset, *length)], "seed {seed}");
        }
        (Request::Write { offset, data, .. }, Ok(Response::Done)) => {
            model[range(offset, data.len() as u64)].copy_from_slice(data);
        }
        (Request::Zero { offset, length, discard, .. }, Ok(Response::Done)) => {
            let (from, to) = if *discard { whole_blocks(*offset, offset + length) } else { (*offset, offset + length) };
            model[from as usize..to as usize].fill(0);
        }
        (Request::Extents { offset, length, .. }, Ok(Response::Extents(runs))) => {
            assert_eq!(runs.iter().map(|r| r.0).sum::<u64>(), *length);
            let mut at = *offset as usize;
            for (length, allocated) in runs {
                let bytes = &model[at..at + length as usize];
                assert!(allocated || bytes.iter().all(|b| *b == 0), "a hole has data, seed {seed}");
                at += length as usize;
            }
        }
        (request, result) => panic!("{request:?} was answered {result:?}, seed {seed}"),
    }
}

impl World {
    /// Time passes for the client only.
    fn sleep_quietly(&mut self, time: Duration) {
        self.now += time;
        self.input(Input::Tick);
    }
}
