//! The library against pretended servers that speak the wire protocol over unix sockets: two servers,
//! one set of bytes.

use super::*;
use crate::transport::{Address, Bounds, ConnectionId, Event, Transport};
use petal::ids::*;
use petal::message::*;
use petal::store::BlockSum;
use petal::translator::gmap::slot_of_element;
use petal::translator::vdir::{Automatic, Family, Imported, Lineage, Policy, Vdisk};
use petal_wire::{Hello, Role};
use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::task::ready;
use stdx::checksum::crc32c;
use tokio::sync::watch;

const CLUSTER: ClusterId = ClusterId(0xc1);
const SLOTS: u32 = 4;
const SIZE: u64 = 1 << 30;

/// What all pretended servers know.
struct World {
    folder: tempfile::TempDir,
    elements: Mutex<BTreeMap<u64, Vec<u8>>>,
    applied: Mutex<BTreeMap<u64, u64>>,
    sessions: Mutex<BTreeMap<SessionId, bool>>,
    commands: Mutex<BTreeMap<CommandId, AdminResponse>>,
    index: AtomicU64,
    /// Answers to data messages wait while this is set.
    held_up: AtomicBool,
}

impl World {
    fn new() -> Arc<World> {
        Arc::new(World {
            folder: tempfile::tempdir().unwrap(),
            elements: Mutex::default(),
            applied: Mutex::default(),
            sessions: Mutex::default(),
            commands: Mutex::default(),
            index: AtomicU64::new(10),
            held_up: AtomicBool::new(false),
        })
    }

    fn address(&self, server: u16) -> String {
        format!("unix:{}/s{server}.sock", self.folder.path().display())
    }

    fn config(&self) -> Config {
        Config::new([self.address(1), self.address(2)])
    }

    fn hints(&self) -> Hints {
        let vdisk = Vdisk {
            id: VdiskId(5),
            name: "vol0".into(),
            size: SIZE,
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
        let server = |n: u32| ServerId((n % 2) as u16 + 1);
        let state_index = self.index.load(Ordering::SeqCst);
        Hints {
            state_index,
            vdisk,
            family: Family {
                id: FamilyId(5),
                gmap: GmapId(3),
                stripe_unit: 1 << 20,
                shift: 0,
                revision: 5,
                lineages: [(LineageId(1), Lineage { parent: None })].into(),
                next_lineage: LineageId(2),
            },
            revision: state_index,
            slots: (0..SLOTS).map(|n| SlotHint { term: 4, in_sync: vec![server(n), server(n + 1)] }).collect(),
            servers: (1..=2).map(|s| ServerHint { server: ServerId(s), addresses: vec![self.address(s)] }).collect(),
        }
    }

    fn acts(&self, server: u16, element: u64) -> bool {
        slot_of_element(element, 1 << 20, 0, SLOTS) % 2 == u32::from(server) - 1
    }

    fn need(&self) -> Need {
        Need { revision: self.index.load(Ordering::SeqCst), term: 4 }
    }

    fn admin(&self, request: AdminRequest) -> Result<AdminResponse, AdminError> {
        match request {
            AdminRequest::Hints { name } if name != "vol0" => Err(AdminError::NoSuchDisk(name)),
            AdminRequest::Hints { .. } | AdminRequest::HintsById { .. } => {
                Ok(AdminResponse::Hints(Box::new(self.hints())))
            }
            AdminRequest::Execute { id, command, .. } => {
                let mut commands = self.commands.lock().unwrap();
                let id = CommandId { finished_below: 0, ..id };
                let answer = commands.entry(id).or_insert_with(|| {
                    let index = self.index.fetch_add(1, Ordering::SeqCst) + 1;
                    let mut sessions = self.sessions.lock().unwrap();
                    let outcome = match command {
                        Command::Attach { .. } => {
                            sessions.insert(SessionId(index), true);
                            Outcome::Session(SessionId(index))
                        }
                        Command::Detach { session } => {
                            sessions.insert(session, false);
                            Outcome::Done
                        }
                        _ => Outcome::Done,
                    };
                    AdminResponse::Executed { index, outcome, unsettled: vec![] }
                });
                Ok(answer.clone())
            }
            _ => Ok(AdminResponse::State(vec![1, 2, 3])),
        }
    }

    fn read(&self, m: Read) -> Body {
        let elements = self.elements.lock().unwrap();
        let mut data = Vec::new();
        let sum = |block: u8| {
            let from = usize::from(block) * 4096;
            match elements.get(&m.element).map(|e| &e[from..from + 4096]) {
                Some(bytes) if bytes.iter().any(|b| *b != 0) => {
                    data.extend_from_slice(bytes);
                    BlockSum::Crc(crc32c(bytes))
                }
                _ => BlockSum::Zero,
            }
        };
        let sums = (m.first_block..m.first_block + m.blocks).map(sum).collect();
        let data = Bytes::from(data).into();
        Body::ReadReply(ReadReply { tag: m.access.tag, need: self.need(), result: Ok(sums), data })
    }

    fn change(&self, access: Access, number: u64, element: u64, apply: impl FnOnce(&mut [u8])) -> Body {
        *self.applied.lock().unwrap().entry(number).or_default() += 1;
        let mut elements = self.elements.lock().unwrap();
        apply(elements.entry(element).or_insert_with(|| vec![0; 65536]));
        Body::WriteReply(WriteReply { tag: access.tag, need: self.need(), result: Ok(()) })
    }

    fn map(&self, server: u16, m: Map) -> Body {
        let elements = self.elements.lock().unwrap();
        let mask = |bytes: &[u8]| {
            let bit = |(n, b): (usize, &[u8])| u16::from(b.iter().any(|b| *b != 0)) << n;
            bytes.chunks(4096).enumerate().map(bit).sum::<u16>()
        };
        let range = elements.range(m.first_element..m.end_element).filter(|(e, _)| self.acts(server, **e));
        let elements = range.map(|(e, bytes)| (*e, mask(bytes))).filter(|(_, mask)| *mask != 0).collect();
        let part = MapPart { elements, complete_below: m.end_element, not_here: vec![] };
        Body::MapReply(MapReply { tag: m.access.tag, result: Ok(part) })
    }

    fn serve(&self, server: u16, message: Message) -> Message {
        let body = match message.body {
            Body::Admin(m) => Body::AdminReply(AdminReply { tag: m.tag, result: self.admin(m.request) }),
            Body::Read(m) => self.read(m),
            Body::Write(m) => self.change(m.access, m.number, m.element, |bytes| {
                let data = m.data.to_bytes();
                bytes[m.offset as usize..m.offset as usize + data.len()].copy_from_slice(&data);
            }),
            Body::Zero(m) => self.change(m.access, m.number, m.element, |bytes| {
                bytes[m.offset as usize..(m.offset + m.length) as usize].fill(0);
            }),
            Body::Map(m) => self.map(server, m),
            other => panic!("a client sends no {other:?}"),
        };
        Message { state_index: self.index.load(Ordering::SeqCst), body }
    }
}

/// A running server; it stops when this is dropped.
struct Running {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn start(world: &Arc<World>, server: u16) -> Running {
    let (stop, stopped) = watch::channel(false);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let world = world.clone();
    let thread = std::thread::spawn(move || {
        crate::run(serve(world, server, stopped, ready)).unwrap();
    });
    is_ready.recv().unwrap();
    Running { stop, thread: Some(thread) }
}

async fn serve(world: Arc<World>, server: u16, mut stopped: watch::Receiver<bool>, ready: std::sync::mpsc::Sender<()>) {
    let role = Role::Server { id: ServerId(server), incarnation: Incarnation(1) };
    let transport = Transport::new(Hello::new(Some(CLUSTER), role), Bounds::default());
    let address: Address = world.address(server).parse().unwrap();
    let mut listener = transport.bind(&address).await.unwrap();
    listener.accept();
    ready.send(()).unwrap();
    let mut events = VecDeque::new();
    let mut held: Vec<(ConnectionId, Message)> = Vec::new();
    loop {
        tokio::select! {
            _ = stopped.changed() => return transport.shut_down(),
            _ = transport.ready() => {}
            _ = tokio::time::sleep(Duration::from_millis(5)), if !held.is_empty() => {}
        }
        transport.take_events(&mut events);
        if !world.held_up.load(Ordering::SeqCst) {
            for (connection, message) in held.drain(..) {
                transport.send(connection, world.serve(server, message));
            }
        }
        for event in events.drain(..) {
            if let Event::Message { connection, message, .. } = event {
                if world.held_up.load(Ordering::SeqCst) && !matches!(message.body, Body::Admin(_)) {
                    held.push((connection, message));
                } else {
                    transport.send(connection, world.serve(server, message));
                }
            }
        }
        transport.flush();
    }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut prng = stdx::Prng::new(seed);
    (0..length).map(|_| prng.next_u64() as u8).collect()
}

/// What every disk must do.
async fn exercise(client: &Client) {
    let disk = client.disk("vol0").holder("a test").attach(Attachment::Exclusive).await.unwrap();
    assert_eq!((disk.size(), disk.id(), disk.name()), (SIZE, VdiskId(5), "vol0"));
    let data = pattern(1, 5 << 20);
    disk.write(12345, data.clone()).await.unwrap();
    assert!(disk.read(12345, 5 << 20).await.unwrap().concat() == data);
    disk.zero(12345 + 100, 1 << 20).await.unwrap();
    let read = disk.read(12345, 5 << 20).await.unwrap().concat();
    assert!(read[..100] == data[..100] && read[100..100 + (1 << 20)].iter().all(|b| *b == 0));
    assert!(read[100 + (1 << 20)..] == data[100 + (1 << 20)..]);
    disk.discard(0, SIZE).await.unwrap();
    assert_eq!(disk.extents(0, SIZE).await.unwrap(), [Extent { length: SIZE, allocated: false }]);
    disk.write(8192, vec![1; 4096]).await.unwrap();
    let extents: Vec<_> = disk.extents(4096, 12288).await.unwrap().iter().map(|e| (e.length, e.allocated)).collect();
    assert_eq!(extents, [(4096, false), (4096, true), (4096, false)]);
    assert_eq!(disk.read(SIZE, 1).await, Err(RequestError::Refused(Refusal::BeyondEnd)));
    assert_eq!(disk.refresh().await, Ok(SIZE));
    disk.flush().await.unwrap();
    disk.detach().await.unwrap();
    assert_eq!(disk.read(0, 1).await, Err(RequestError::NotAttached));
}

#[test]
fn a_disk_works_from_a_thread_of_its_own_and_from_the_callers() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    let config = world.config();
    crate::run(async move {
        exercise(&Client::connect_here(config).await.unwrap()).await;
    })
    .unwrap();
    let config = world.config();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async move {
        let client = Client::connect(config).await.unwrap();
        // From whatever thread.
        tokio::spawn(async move { exercise(&client).await }).await.unwrap();
    });
    assert!(world.sessions.lock().unwrap().values().all(|open| !open));
}

#[test]
fn servers_are_found_through_one_address_with_a_wrong_guess_of_its_id() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    let config = Config::new([world.address(2)]);
    crate::run(async move {
        let client = Client::connect_here(config).await.unwrap();
        assert_eq!(client.connected(), [ServerId(2)]);
        exercise(&client).await;
        assert_eq!(client.connected(), [ServerId(1), ServerId(2)]);
    })
    .unwrap();
}

#[test]
fn two_addresses_of_one_server_make_one_connection() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    for addresses in [[2, 2], [2, 1]] {
        let config = Config::new(addresses.map(|s| world.address(s)));
        crate::run(async move {
            let client = Client::connect_here(config).await.unwrap();
            for _ in 0..3 {
                exercise(&client).await;
            }
            assert_eq!(client.connected(), [ServerId(1), ServerId(2)]);
        })
        .unwrap();
    }
}

#[test]
fn requests_wait_for_a_server_that_restarts() {
    let world = World::new();
    let mut first = Some(start(&world, 1));
    let _second = start(&world, 2);
    let config = world.config();
    let in_runtime = world.clone();
    crate::run(async move {
        let client = Client::connect_here(config).await.unwrap();
        let disk = client.disk("vol0").attach(Attachment::Exclusive).await.unwrap();
        drop(first.take());
        // Element 0 is of slot 0, in which s1 acts; it is down.
        let write = disk.write(0, pattern(7, 4096));
        let waits = tokio::time::timeout(Duration::from_millis(200), write).await;
        assert!(waits.is_err(), "the server is away");
        // Dropped, but not undone.
        first = Some(start(&in_runtime, 1));
        disk.write(4096, vec![1; 10]).await.unwrap();
        while in_runtime.applied.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(disk.read(0, 4096).await.unwrap().concat() == pattern(7, 4096));
        drop(first.take());
        // The other copy serves reads.
        assert!(disk.read(0, 4096).await.unwrap().concat() == pattern(7, 4096));
    })
    .unwrap();
}

#[test]
fn dropping_futures_loses_nothing_and_leaks_no_session() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    let config = world.config();
    let in_runtime = world.clone();
    crate::run(async move {
        let client = Client::connect_here(config).await.unwrap();
        let disk = client.disk("vol0").attach(Attachment::Shared).await.unwrap();
        in_runtime.held_up.store(true, Ordering::SeqCst);
        for n in 0..100u64 {
            let mut write = std::pin::pin!(disk.write(n << 16, pattern(n, 3000)));
            std::future::poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx).is_pending())).await;
        }
        // An attach whose caller goes away ends by itself.
        let attach = client.disk("vol0").attach(Attachment::Shared);
        let mut attach = Box::pin(attach);
        std::future::poll_fn(|cx| {
            let _ = ready!(Poll::Ready(attach.as_mut().poll(cx)));
            Poll::Ready(())
        })
        .await;
        drop(attach);
        in_runtime.held_up.store(false, Ordering::SeqCst);
        for n in 0..100u64 {
            while disk.read(n << 16, 3000).await.unwrap().concat() != pattern(n, 3000) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        drop(disk);
        drop(client);
    })
    .unwrap();
    // The runtime's end took the driver with it; sessions that a client on a thread drops are ended.
    let config = world.config();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let client = Client::connect(config).await.unwrap();
        let disk = client.disk("vol0").attach(Attachment::Shared).await.unwrap();
        let session = disk.session();
        drop((disk, client));
        while world.sessions.lock().unwrap()[&session] {
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    assert!(world.applied.lock().unwrap().values().all(|times| *times == 1));
}

#[test]
fn who_cannot_be_reached_is_named_with_the_reason() {
    let world = World::new();
    let mut config = world.config();
    config.connect_deadline = Some(Duration::from_millis(200));
    let error = crate::run(async { Client::connect_here(config).await.unwrap_err() }).unwrap().to_string();
    assert!(error.contains("s1.sock: nobody listens there: is the server running?"), "{error}");
    let none = crate::run(Client::connect_here(Config::new([""; 0]))).unwrap();
    assert!(matches!(none, Err(ConnectError::NoServers)));
    // What cannot pass is told at once.
    let _server = start(&world, 1);
    let mut config = Config::new([world.address(1)]);
    config.cluster = Some(ClusterId(7));
    let error = crate::run(async { Client::connect_here(config).await.unwrap_err() }).unwrap().to_string();
    assert!(error.contains("cluster"), "{error}");
}

#[test]
fn commands_and_calls_are_answered() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    let config = world.config();
    crate::run(async move {
        let client = Client::connect_here(config).await.unwrap();
        let done = client.execute(Command::Noop, Duration::from_secs(1)).await.unwrap();
        assert_eq!((done.index, done.outcome), (11, Outcome::Done));
        assert_eq!(client.admin(AdminRequest::State).await, Ok(AdminResponse::State(vec![1, 2, 3])));
        let call = client.call(Some(ServerId(9)), AdminRequest::State, Some(Duration::from_millis(50))).await;
        assert!(matches!(call, Err(RequestError::Deadline { .. })));
        let missing = client.disk("vol9").attach(Attachment::Exclusive).await.unwrap_err();
        assert_eq!(missing, RequestError::Admin(AdminError::NoSuchDisk("vol9".into())));
    })
    .unwrap();
}

/// Prints what an operation of 4 KiB costs the client's thread:
/// `cargo test --release -p petal-io what_an_operation_costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_an_operation_costs() {
    let world = World::new();
    let _servers = [start(&world, 1), start(&world, 2)];
    let config = world.config();
    crate::run(async move {
        let client = Client::connect_here(config).await.unwrap();
        let disk = client.disk("vol0").attach(Attachment::Exclusive).await.unwrap();
        disk.write(0, pattern(1, 16 << 20)).await.unwrap();
        for (what, depth) in [("write", 1), ("write", 32), ("read", 1), ("read", 32)] {
            const COUNT: u64 = 40_000;
            let cpu = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            let (before, began) = (cpu(), clock::now());
            let tasks: Vec<_> = (0..depth)
                .map(|task| {
                    let disk = disk.clone();
                    tokio::task::spawn_local(async move {
                        let data = Bytes::from(pattern(task, 4096));
                        let mut prng = stdx::Prng::new(task);
                        for _ in 0..COUNT / depth {
                            let offset = prng.below(4096) * 4096;
                            match what {
                                "write" => disk.write(offset, data.clone()).await.unwrap(),
                                _ => drop(disk.read(offset, 4096).await.unwrap()),
                            }
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let after = cpu();
            let nanos = (after.tv_sec - before.tv_sec) * 1_000_000_000 + after.tv_nsec - before.tv_nsec;
            let wall = clock::now().since(began).as_nanos() as u64 / COUNT;
            println!("{what} at depth {depth}: {} ns of CPU, {wall} ns of time each", nanos as u64 / COUNT);
        }
    })
    .unwrap();
}
