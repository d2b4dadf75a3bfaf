//! Connections over real sockets: hello and its errors, order, hostile bytes, peers that stop.

use bytes::{Bytes, BytesMut};
use petal::ids::*;
use petal::message::*;
use petal_io::transport::*;
use petal_wire::*;
use std::collections::VecDeque;
use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const CLUSTER: ClusterId = ClusterId(0xc1);

fn server(id: u16, incarnation: u64) -> Hello {
    Hello::new(Some(CLUSTER), Role::Server { id: ServerId(id), incarnation: Incarnation(incarnation) })
}

fn client() -> Hello {
    Hello::new(Some(CLUSTER), Role::Client)
}

fn quick() -> Bounds {
    Bounds { hello_timeout: Duration::from_millis(300), stall_timeout: Duration::from_millis(500), ..Bounds::default() }
}

fn index(n: u64) -> Message {
    Message { state_index: n, body: Body::Index }
}

fn write(number: u64, data: Vec<Bytes>) -> Message {
    let data = Payload(data);
    let access = Access { tag: number, vdisk: VdiskId(1), session: SessionId(2), need: Need::default(), relay: None };
    let crcs = data.to_bytes().chunks(4096).map(stdx::checksum::crc32c).collect();
    Message {
        state_index: number,
        body: Body::Write(Write { access, number, finished_below: 0, element: 7, offset: 0, crcs, data }),
    }
}

/// A transport with what it has heard and not been asked for yet.
struct End {
    transport: Transport,
    events: VecDeque<Event>,
}

impl End {
    fn new(hello: Hello, bounds: Bounds) -> End {
        End { transport: Transport::new(hello, bounds), events: VecDeque::new() }
    }

    async fn listen(&self, address: &str) -> Listener {
        let mut listener = self.transport.bind(&address.parse().unwrap()).await.unwrap();
        listener.accept();
        listener
    }

    async fn next(&mut self) -> Event {
        self.next_within(Duration::from_secs(10)).await.expect("an event within ten seconds")
    }

    async fn next_within(&mut self, limit: Duration) -> Option<Event> {
        let end = tokio::time::Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            tokio::time::timeout_at(end, self.transport.ready()).await.ok()?;
            self.transport.take_events(&mut self.events);
        }
    }

    async fn connected(&mut self) -> ConnectionId {
        match self.next().await {
            Event::Connected { connection, .. } => connection,
            other => panic!("not connected: {other:?}"),
        }
    }

    async fn message(&mut self) -> Message {
        match self.next().await {
            Event::Message { message, .. } => message,
            other => panic!("not a message: {other:?}"),
        }
    }

    async fn closed(&mut self) -> Closed {
        match self.next().await {
            Event::Disconnected { reason, .. } => reason,
            other => panic!("not disconnected: {other:?}"),
        }
    }

    async fn dial_failed(&mut self) -> DialError {
        match self.next().await {
            Event::DialFailed { error, .. } => error,
            other => panic!("not a failed dial: {other:?}"),
        }
    }
}

fn in_runtime<F: Future<Output = ()> + 'static>(test: impl FnOnce(std::path::PathBuf, String) -> F + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/s", dir.path().display());
    let path = dir.path().to_path_buf();
    petal_io::run(async move { test(path, address).await }).unwrap();
}

#[test]
fn messages_arrive_whole_and_in_order_over_both_families() {
    for tcp in [false, true] {
        in_runtime(move |_dir, unix| async move {
            let address = if tcp { "127.0.0.1:0".to_string() } else { unix };
            let mut a = End::new(server(1, 1), Bounds::default());
            let listener = a.listen(&address).await;
            let mut b = End::new(client(), Bounds::default());
            b.transport.dial(ServerId(1), &[listener.address().to_string()], true);
            let to_a = b.connected().await;
            let to_b = a.connected().await;
            let mut sent = Vec::new();
            for n in 1..500u64 {
                // From nothing over small pieces to a whole element, in several pieces.
                let length = [1, 100, 600, 4096, 20_000, 65_536][n as usize % 6];
                let bytes: Bytes = (0..length).map(|i| (i as u64 * n) as u8).collect::<Vec<_>>().into();
                let middle = length / 3;
                let message = write(n, vec![bytes.slice(..middle), bytes.slice(middle..)]);
                sent.push((n, bytes));
                assert!(b.transport.send(to_a, message));
                assert!(b.transport.send(to_a, index(n)));
                if n % 7 == 0 {
                    b.transport.flush();
                    tokio::task::yield_now().await;
                }
            }
            b.transport.flush();
            for (n, bytes) in sent {
                let got = a.message().await;
                let Body::Write(write) = got.body else { panic!("{got:?}") };
                assert_eq!((write.number, write.data.to_bytes()), (n, bytes));
                assert_eq!(a.message().await, index(n));
            }
            a.transport.send(to_b, index(9));
            a.transport.flush();
            assert_eq!(b.message().await, index(9));
            b.transport.close(to_a);
            assert_eq!(b.closed().await, Closed::Asked);
            assert_eq!(a.closed().await, Closed::ByPeer);
            assert!(!a.transport.send(to_b, index(1)), "a message to a connection that is gone is dropped");
            b.connected().await;
        });
    }
}

#[test]
fn a_large_frame_is_received_in_one_piece() {
    in_runtime(|_dir, address| async move {
        let mut a = End::new(server(1, 1), Bounds::default());
        let _listener = a.listen(&address).await;
        let mut b = End::new(server(2, 1), Bounds::default());
        b.transport.dial(ServerId(1), &[address], true);
        let to_a = b.connected().await;
        a.connected().await;
        let state: Vec<u8> = (0..9_000_000u32).map(|n| (n >> 3) as u8).collect();
        let snapshot = Message { state_index: 4, body: Body::Snapshot(Snapshot { state }) };
        b.transport.send(to_a, snapshot.clone());
        b.transport.send(to_a, index(5));
        b.transport.flush();
        assert_eq!(a.message().await, snapshot);
        assert_eq!(a.message().await, index(5));
    });
}

#[test]
fn a_server_that_comes_later_is_reached_and_reached_again() {
    in_runtime(|_dir, address| async move {
        let mut b = End::new(client(), Bounds::default());
        b.transport.dial(ServerId(1), std::slice::from_ref(&address), true);
        assert_eq!(b.dial_failed().await, DialError::NobodyThere);
        for life in 1..4 {
            let mut a = End::new(server(1, life), Bounds::default());
            let listener = a.listen(&address).await;
            a.connected().await;
            let incarnation = loop {
                match b.next().await {
                    Event::Connected { peer, .. } => break peer.hello.role,
                    Event::DialFailed { .. } | Event::NobodyThere { .. } | Event::Disconnected { .. } => {}
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!(incarnation, Role::Server { id: ServerId(1), incarnation: Incarnation(life) });
            drop(listener);
            a.transport.shut_down();
        }
    });
}

/// Dials with a hello that does not fit, and returns what the dialler is told.
async fn refused(address: String, hello: Hello, dialled: u16) -> Reject {
    let mut b = End::new(hello, quick());
    b.transport.dial(ServerId(dialled), &[address], true);
    match b.dial_failed().await {
        DialError::Rejected(reject) | DialError::Refused(reject) => reject,
        other => panic!("not a reject: {other:?}"),
    }
}

#[test]
fn a_hello_that_does_not_fit_is_answered_with_code_and_sentence() {
    in_runtime(|_dir, address| async move {
        let a = End::new(server(1, 5), Bounds { clients_max: 0, ..Bounds::default() });
        let _listener = a.listen(&address).await;
        let stranger = Hello { cluster: Some(ClusterId(0xbad)), ..client() };
        let reject = refused(address.clone(), stranger, 1).await;
        assert_eq!(reject.code, RejectCode::WrongCluster);
        assert!(reject.sentence.contains("server s1 belongs to cluster 000000000000000000000000000000c1"), "{reject}");
        assert!(reject.sentence.contains("--cluster"));
        let old = Hello { version_min: 0, version_max: 0, ..client() };
        assert_eq!(refused(address.clone(), old, 1).await.code, RejectCode::VersionTooOld);
        let new = Hello { version_min: 7, version_max: 9, ..client() };
        assert_eq!(refused(address.clone(), new, 1).await.code, RejectCode::VersionTooNew);
        let reject = refused(address.clone(), client(), 3).await;
        assert_eq!(reject.code, RejectCode::WrongServer);
        assert!(reject.sentence.contains("s1 answers at this address, and s3 was expected"), "{reject}");
        let reject = refused(address.clone(), client(), 1).await;
        assert_eq!(reject.code, RejectCode::TooManyConnections);
        let twin = refused(address.clone(), server(1, 6), 1).await;
        assert!(twin.sentence.contains("two programs say that they are s1"), "{twin}");
        assert_eq!(a.transport.connection_count(), 0);
    });
}

#[test]
fn a_newer_connection_of_a_server_replaces_the_older_and_an_older_life_is_refused() {
    in_runtime(|_dir, address| async move {
        let mut a = End::new(server(1, 1), Bounds::default());
        let _listener = a.listen(&address).await;
        let first = End::new(server(2, 7), Bounds::default());
        first.transport.dial(ServerId(1), std::slice::from_ref(&address), true);
        a.connected().await;
        let mut second = End::new(server(2, 8), Bounds::default());
        second.transport.dial(ServerId(1), std::slice::from_ref(&address), true);
        assert_eq!(a.closed().await, Closed::Replaced);
        let now = a.connected().await;
        assert_eq!(
            a.transport.peer(now).unwrap().hello.role,
            Role::Server { id: ServerId(2), incarnation: Incarnation(8) }
        );
        // The first life dials again at once, and is told that it is over.
        let mut first = first;
        loop {
            match first.next().await {
                Event::DialFailed { error: DialError::Rejected(reject), .. } => {
                    assert_eq!(reject.code, RejectCode::StaleIncarnation);
                    break;
                }
                _ => continue,
            }
        }
        second.connected().await;
        assert!(a.next_within(Duration::from_millis(50)).await.is_none());
    });
}

fn raw(address: &str) -> UnixStream {
    let stream = UnixStream::connect(address.strip_prefix("unix:").unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// What the other side says until it closes the connection: the reject in it.
async fn last_words(mut stream: UnixStream) -> Option<Reject> {
    let bytes = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    });
    let mut buffer = BytesMut::from(&bytes.await.unwrap()[..]);
    loop {
        let limits = Limits::from_server(VERSION);
        let limits = if buffer.get(6) == Some(&1) { Limits::GREETING } else { limits };
        match decode(&mut buffer, &limits).unwrap() {
            Decoded::Frame(Frame::Reject(reject)) => return Some(reject),
            Decoded::Frame(_) => {}
            Decoded::Need(_) => return None,
        }
    }
}

fn hello_bytes() -> BytesMut {
    let mut bytes = BytesMut::new();
    encode_hello(&client(), &mut bytes);
    bytes
}

#[test]
fn hostile_bytes_end_their_connection_and_nothing_else() {
    in_runtime(|_dir, address| async move {
        let mut a = End::new(server(1, 1), quick());
        let _listener = a.listen(&address).await;
        let mut good = End::new(client(), Bounds::default());
        good.transport.dial(ServerId(1), std::slice::from_ref(&address), true);
        let to_a = good.connected().await;
        a.connected().await;

        // Before the hello.
        let mut http = raw(&address);
        http.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(last_words(http).await.unwrap().code, RejectCode::Malformed);
        let mut half = raw(&address);
        half.write_all(&hello_bytes()[..50]).unwrap();
        assert_eq!(last_words(half).await.unwrap().code, RejectCode::TooSlow);
        assert_eq!(last_words(raw(&address)).await.unwrap().code, RejectCode::TooSlow, "no byte at all");
        let mut early = raw(&address);
        let mut bytes = BytesMut::new();
        encode(&index(1), VERSION, &mut bytes).unwrap();
        early.write_all(&bytes).unwrap();
        assert_eq!(last_words(early).await.unwrap().code, RejectCode::Malformed);

        // Behind it: garbage, a second hello, a frame beyond a client's limit, half a frame.
        let mut oversize = BytesMut::new();
        let state = vec![0; 100_000];
        encode(&Message { state_index: 1, body: Body::Snapshot(Snapshot { state }) }, VERSION, &mut oversize).unwrap();
        let mut damaged = bytes.clone();
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        let half = &bytes[..20];
        for (what, code) in [
            (&b"garbage garbage garbage garbage garbage"[..], RejectCode::Malformed),
            (&hello_bytes()[..], RejectCode::Malformed),
            (&oversize[..40], RejectCode::Malformed),
            (&damaged[..], RejectCode::Malformed),
            (half, RejectCode::TooSlow),
        ] {
            let mut stream = raw(&address);
            stream.write_all(&hello_bytes()).unwrap();
            a.connected().await;
            stream.write_all(what).unwrap();
            assert_eq!(last_words(stream).await.unwrap().code, code);
            let reason = a.closed().await;
            assert!(matches!(reason, Closed::Bad(_) | Closed::HalfFrame), "{reason:?}");
        }

        // The good one never noticed.
        good.transport.send(to_a, index(3));
        good.transport.flush();
        assert_eq!(a.message().await, index(3));
    });
}

#[test]
fn a_peer_that_does_not_read_is_disconnected_by_time_and_by_amount() {
    in_runtime(|_dir, address| async move {
        let bounds = Bounds { client_queue_max: 4 << 20, ..quick() };
        let mut a = End::new(server(1, 1), bounds);
        let _listener = a.listen(&address).await;
        let mut stream = raw(&address);
        stream.write_all(&hello_bytes()).unwrap();
        let to_slow = a.connected().await;
        let data = Bytes::from(vec![7; 65_536]);
        for n in 1..60 {
            assert!(a.transport.send(to_slow, write(n, vec![data.clone()])));
        }
        a.transport.flush();
        assert!(matches!(a.closed().await, Closed::NotReading(waiting) if waiting > 0));

        let mut stream = raw(&address);
        stream.write_all(&hello_bytes()).unwrap();
        let to_slow = a.connected().await;
        let accepted = (1..1000).take_while(|n| a.transport.send(to_slow, write(*n, vec![data.clone()]))).count();
        assert!((60..70).contains(&accepted), "4 MiB are 64 elements, and {accepted} were taken");
        assert!(matches!(a.closed().await, Closed::NotReading(_)));
        assert_eq!(a.transport.connection_count(), 0);
    });
}

#[test]
fn a_slow_reader_gets_everything() {
    in_runtime(|_dir, address| async move {
        let mut a = End::new(server(1, 1), Bounds::default());
        let _listener = a.listen(&address).await;
        let mut stream = raw(&address);
        stream.write_all(&hello_bytes()).unwrap();
        let to_slow = a.connected().await;
        let data = Bytes::from((0..65_536u32).map(|n| (n % 253) as u8).collect::<Vec<_>>());
        for n in 1..=100 {
            a.transport.send(to_slow, write(n, vec![data.clone()]));
            if n % 10 == 0 {
                a.transport.flush();
            }
        }
        let reader = tokio::task::spawn_blocking(move || {
            let (mut buffer, mut piece, mut numbers) = (BytesMut::new(), [0; 5000], Vec::new());
            let mut limits = Limits::GREETING;
            while numbers.len() < 100 {
                let n = stream.read(&mut piece).unwrap();
                buffer.extend_from_slice(&piece[..n]);
                while let Decoded::Frame(frame) = decode(&mut buffer, &limits).unwrap() {
                    limits = Limits::from_server(VERSION);
                    let Frame::Message(Message { body: Body::Write(write), .. }) = frame else { continue };
                    assert_eq!(write.data.to_bytes(), data);
                    numbers.push(write.number);
                }
            }
            numbers
        });
        assert_eq!(reader.await.unwrap(), (1..=100).collect::<Vec<_>>());
    });
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn two_thousand_idle_connections_cost_little_and_disturb_nobody() {
    assert!(petal_io::raise_file_limit() > 4200, "the test needs 4,200 open files");
    in_runtime(|_dir, address| async move {
        let mut a = End::new(server(1, 1), Bounds::default());
        let _listener = a.listen(&address).await;
        let mut idle = Vec::new();
        let before = resident_kib();
        for n in 0..2000 {
            let mut stream = raw(&address);
            stream.write_all(&hello_bytes()).unwrap();
            idle.push(stream);
            if n % 50 == 49 {
                for _ in 0..50 {
                    a.connected().await;
                }
            }
        }
        // Everybody says something once, and then nothing any more.
        let mut bytes = BytesMut::new();
        let payload = encode(&write(1, vec![Bytes::from(vec![1; 4096])]), VERSION, &mut bytes).unwrap();
        bytes.extend_from_slice(&vec![1; payload]);
        for stream in &mut idle {
            stream.write_all(&bytes).unwrap();
        }
        for _ in 0..idle.len() {
            a.message().await;
        }
        let each = (resident_kib() - before) * 1024 / idle.len() as u64;
        assert!(each < 8192, "{each} bytes per idle connection");
        assert_eq!(a.transport.connection_count(), 2000);
        let mut b = End::new(client(), Bounds::default());
        b.transport.dial(ServerId(1), &[address], true);
        let to_a = b.connected().await;
        b.transport.send(to_a, index(8));
        b.transport.flush();
        a.connected().await;
        assert_eq!(a.message().await, index(8));
        drop(idle);
        for _ in 0..2000 {
            // Reset: they never read the server's hello.
            assert!(matches!(a.closed().await, Closed::ByPeer | Closed::Io(_)));
        }
    });
}

#[test]
fn an_address_in_use_is_an_error_and_a_dead_socket_file_is_not() {
    in_runtime(|dir, address| async move {
        let a = End::new(server(1, 1), Bounds::default());
        let parsed: Address = address.parse().unwrap();
        let first = a.transport.bind(&parsed).await.unwrap();
        assert!(matches!(a.transport.bind(&parsed).await, Err(ListenError::InUse { .. })));
        drop(first);
        let path = dir.join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(a.transport.bind(&parsed).await.unwrap());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(a.transport.bind(&parsed).await, Err(ListenError::NotASocket { .. })));
        let tcp = a.transport.bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = a.transport.bind(tcp.address()).await.unwrap_err();
        assert!(error.to_string().contains("in use: another program listens there"), "{error}");
    });
}

/// Processor time of this process so far.
fn cpu() -> Duration {
    let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(usage.tv_sec as u64, usage.tv_nsec as u32)
}

/// Not a test but a measurement: `cargo test --release -p petal-io --test transport -- --ignored --nocapture`.
/// Both ends, each on a thread of its own, as two processes would be.
#[test]
#[ignore = "a measurement"]
fn cpu_of_a_4k_request_and_its_answer() {
    for (what, tcp, depth) in [("unix", false, 1), ("unix", false, 32), ("tcp", true, 1), ("tcp", true, 32)] {
        const ROUNDS: u64 = 200_000;
        let dir = tempfile::tempdir().unwrap();
        let address = if tcp { "127.0.0.1:0".into() } else { format!("unix:{}/s", dir.path().display()) };
        let (tell, told) = std::sync::mpsc::channel();
        let server_side = std::thread::spawn(move || {
            petal_io::run(async move {
                let mut a = End::new(server(1, 1), Bounds::default());
                let listener = a.listen(&address).await;
                tell.send(listener.address().to_string()).unwrap();
                loop {
                    a.transport.ready().await;
                    a.transport.take_events(&mut a.events);
                    for event in a.events.drain(..) {
                        match event {
                            Event::Message { connection, message, .. } => {
                                let Body::Write(w) = message.body else { panic!() };
                                let need = Need::default();
                                let reply = WriteReply { tag: w.access.tag, need, result: Ok(()) };
                                a.transport.send(connection, Message { state_index: 1, body: Body::WriteReply(reply) });
                            }
                            Event::Disconnected { .. } => return,
                            _ => {}
                        }
                    }
                    a.transport.flush();
                }
            })
            .unwrap();
        });
        let address = told.recv().unwrap();
        petal_io::run(async move {
            let mut b = End::new(client(), Bounds::default());
            b.transport.dial(ServerId(1), &[address], true);
            let to_a = b.connected().await;
            let data = Bytes::from(vec![5; 4096]);
            let (mut sent, mut answered, before, began) = (0, 0, cpu(), std::time::Instant::now());
            while answered < ROUNDS {
                while sent < ROUNDS && sent - answered < depth {
                    sent += 1;
                    b.transport.send(to_a, write(sent, vec![data.clone()]));
                }
                b.transport.flush();
                b.transport.ready().await;
                b.transport.take_events(&mut b.events);
                answered += b.events.drain(..).count() as u64;
            }
            let (cpu, wall) = ((cpu() - before) / ROUNDS as u32, began.elapsed() / ROUNDS as u32);
            println!("{what} depth {depth}: {cpu:?} of processor, {wall:?} of time, each, both ends");
            b.transport.stop_dialling(ServerId(1));
        })
        .unwrap();
        server_side.join().unwrap();
    }
}
