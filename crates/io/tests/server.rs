//! The driver of a server, with a machine of a few lines in the place of the core.

use petal::ids::*;
use petal::message::*;
use petal::server::{Input, Output, Peer};
use petal::store::{DiskCommand, DiskResult, OpId};
use petal_io::engine::{DiskEngine, NoDisks};
use petal_io::server::{Ended, ServerShell, ShellConfig, StartError, Stop};
use petal_io::transport::*;
use petal_wire::{Hello, Role};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use stdx::{Instant, Machine};

const CLUSTER: ClusterId = ClusterId(7);

/// Sends every `Settle` back, asks disk 0 for every `Learn`, stops at `Admin`, notes all inputs.
struct Echo {
    me: ServerId,
    outputs: VecDeque<Output>,
    log: Rc<RefCell<Vec<String>>>,
    /// Who waits for the disk.
    asked: VecDeque<(Peer, Message)>,
    tick_at: Option<Instant>,
}

impl Machine for Echo {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, now: Instant, input: Input) {
        let note = match input {
            Input::Connected { peer: Peer::Client(_), .. } => "client connected".to_string(),
            Input::Connected { peer, incarnation } => format!("{peer:?} connected {incarnation}"),
            Input::Disconnected { peer: Peer::Client(_) } => "client disconnected".to_string(),
            Input::Disconnected { peer } => format!("{peer:?} disconnected"),
            Input::Refused { server } => format!("{server} refuses"),
            Input::Message { from, message } => self.on_message(from, message),
            Input::Disk { op, result, .. } => {
                let (to, message) = self.asked.pop_front().expect("an answer for each question");
                self.outputs.push_back(Output::Send { to, message });
                format!("disk {op} {result:?}")
            }
            Input::Tick => {
                assert!(self.tick_at.take().unwrap() <= now);
                "tick".to_string()
            }
            Input::WallClock { .. } => return,
            Input::ShutDown => "told to stop".to_string(),
        };
        self.log.borrow_mut().push(note);
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.tick_at
    }

    fn check_invariants(&self) {}
}

impl Echo {
    fn on_message(&mut self, from: Peer, message: Message) -> String {
        match &message.body {
            Body::Learn(_) => {
                self.asked.push_back((from, message));
                let command = DiskCommand::Extend { to: 1 << 20, hurry: false };
                self.outputs.push_back(Output::Disk { disk: 0, op: 5, command });
                "asks disk".to_string()
            }
            Body::Admin(_) => {
                let reply = AdminReply { tag: 1, result: Ok(AdminResponse::ShuttingDown) };
                let message = Message { state_index: 0, body: Body::AdminReply(reply) };
                self.outputs.push_back(Output::Send { to: from, message });
                self.outputs.push_back(Output::Stopped);
                "stops".to_string()
            }
            Body::Settle(m) => {
                let index = m.index;
                self.outputs.push_back(Output::Send { to: from, message });
                format!("{} echoes {index}", self.me)
            }
            other => format!("{other:?}"),
        }
    }
}

/// Answers when it is flushed, and wakes.
#[derive(Default)]
struct SlowDisk {
    submitted: Vec<OpId>,
    done: Vec<OpId>,
    waker: Option<Waker>,
}

impl DiskEngine for SlowDisk {
    fn submit(&mut self, _disk: usize, op: OpId, _command: DiskCommand) {
        self.submitted.push(op);
    }
    fn flush(&mut self) {
        self.done.append(&mut self.submitted);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
    fn completions(&mut self, out: &mut Vec<(usize, OpId, DiskResult)>) {
        out.extend(self.done.drain(..).map(|op| (0, op, DiskResult::Extended(Ok(())))));
    }
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker = Some(cx.waker().clone());
        if self.done.is_empty() { Poll::Pending } else { Poll::Ready(()) }
    }
}

struct Started {
    log: Rc<RefCell<Vec<String>>>,
    ended: tokio::task::JoinHandle<Ended>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Started {
    async fn wait_for(&self, what: &str) {
        for _ in 0..2000 {
            if self.log.borrow().iter().any(|l| l.contains(what)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("'{what}' did not happen: {:?}", self.log.borrow());
    }
}

async fn start(id: u16, incarnation: u64, address: &str, first: Vec<Output>, tick: Option<Duration>) -> Started {
    let log = Rc::new(RefCell::new(Vec::new()));
    let echo = Echo {
        me: ServerId(id),
        outputs: first.into(),
        log: log.clone(),
        asked: VecDeque::new(),
        tick_at: tick.map(|t| petal_io::clock::now() + t),
    };
    let ready = log.clone();
    let config = ShellConfig {
        cluster: CLUSTER,
        server: ServerId(id),
        incarnation: Incarnation(incarnation),
        listen: vec![address.to_string()],
        bounds: Bounds::default(),
        on_ready: Box::new(move || ready.borrow_mut().push("ready".into())),
    };
    let shell = ServerShell::start(echo, SlowDisk::default(), config).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let ended = tokio::task::spawn_local(shell.run(async {
        let _ = stopped.await;
        Stop::AtOnce
    }));
    Started { log, ended, stop: Some(stop) }
}

fn dial(server: u16, address: &str) -> Output {
    Output::Dial { server: ServerId(server), addresses: vec![address.to_string()] }
}

fn message(body: Body) -> Message {
    Message { state_index: 1, body }
}

struct TestClient {
    transport: Transport,
    events: VecDeque<Event>,
}

impl TestClient {
    async fn connect(address: &str) -> (TestClient, ConnectionId) {
        let transport = Transport::new(Hello::new(Some(CLUSTER), Role::Client), Bounds::default());
        transport.dial(ServerId(1), &[address.to_string()], true);
        let mut client = TestClient { transport, events: VecDeque::new() };
        let connection = loop {
            if let Event::Connected { connection, .. } = client.next().await {
                break connection;
            }
        };
        (client, connection)
    }

    async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            tokio::time::timeout(Duration::from_secs(10), self.transport.ready()).await.expect("an event in time");
            self.transport.take_events(&mut self.events);
        }
    }

    async fn ask(&mut self, connection: ConnectionId, body: Body) -> Message {
        self.transport.send(connection, message(body));
        self.transport.flush();
        match self.next().await {
            Event::Message { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }
}

fn in_runtime<F: Future<Output = ()> + 'static>(test: impl FnOnce(Vec<String>) -> F + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let addresses = (0..4).map(|n| format!("unix:{}/s{n}", dir.path().display())).collect();
    petal_io::run(async move { test(addresses).await }).unwrap();
}

fn shutdown() -> Body {
    Body::Admin(Admin { tag: 1, request: AdminRequest::Shutdown })
}

#[test]
fn requests_disks_and_ticks_reach_the_machine_and_answers_come_back() {
    in_runtime(|at| async move {
        let server = start(1, 1, &at[1], vec![Output::Ready], Some(Duration::from_millis(30))).await;
        let (mut client, to) = TestClient::connect(&at[1]).await;
        let settle = Body::Settle(Settle { index: 9, asker: ServerId(1), settler: ServerId(2) });
        assert_eq!(client.ask(to, settle.clone()).await, message(settle));
        let learn = Body::Learn(Learn { from: 3 });
        assert_eq!(client.ask(to, learn.clone()).await, message(learn), "by way of the disk");
        server.wait_for("tick").await;
        // The reply leaves before the server does.
        let reply = client.ask(to, shutdown()).await;
        assert!(matches!(reply.body, Body::AdminReply(_)));
        assert_eq!(server.ended.await.unwrap(), Ended::Stopped);
        let log = server.log.borrow();
        assert_eq!(
            log.iter().filter(|l| *l != "tick").cloned().collect::<Vec<_>>(),
            ["ready", "client connected", "s1 echoes 9", "asks disk", "disk 5 Extended(Ok(()))", "stops"]
        );
    });
}

#[test]
fn servers_connect_once_per_pair_and_again_after_a_restart() {
    in_runtime(|at| async move {
        let all = |me: u16| (1..4u16).filter(|n| *n != me).map(|n| dial(n, &at[usize::from(n)])).collect::<Vec<_>>();
        let one = start(1, 1, &at[1], all(1), None).await;
        let two = start(2, 1, &at[2], all(2), None).await;
        let mut three = start(3, 1, &at[3], all(3), None).await;
        for (server, peers) in [(&one, [2, 3]), (&two, [1, 3]), (&three, [1, 2])] {
            for peer in peers {
                server.wait_for(&format!("Server(s{peer}) connected i1")).await;
            }
        }
        three.stop.take().unwrap().send(()).unwrap();
        assert_eq!(three.ended.await.unwrap(), Ended::Signalled);
        one.wait_for("Server(s3) disconnected").await;
        let _three = start(3, 2, &at[3], all(3), None).await;
        for server in [&one, &two] {
            server.wait_for("Server(s3) connected i2").await;
            let log = server.log.borrow();
            assert_eq!(
                log.iter().filter(|l| l.contains("s3")).cloned().collect::<Vec<_>>(),
                ["Server(s3) connected i1", "Server(s3) disconnected", "Server(s3) connected i2"]
            );
        }
    });
}

#[test]
fn nobody_is_let_in_before_the_incarnation_is_durable() {
    in_runtime(|at| async move {
        // A machine that has said nothing yet.
        let server = start(1, 1, &at[1], vec![], Some(Duration::from_millis(10))).await;
        server.wait_for("tick").await;
        let hello = Hello::new(Some(CLUSTER), Role::Client);
        let client = Transport::new(hello, Bounds { hello_timeout: Duration::from_millis(200), ..Bounds::default() });
        client.dial(ServerId(1), &[at[1].clone()], true);
        client.ready().await;
        let mut events = VecDeque::new();
        client.take_events(&mut events);
        assert!(matches!(events.pop_front(), Some(Event::DialFailed { error: DialError::Timeout, .. })));
        assert!(!server.log.borrow().iter().any(|l| l.contains("connected")));
    });
}

#[test]
fn a_fatal_core_ends_the_server_with_its_reason_and_frees_the_address() {
    in_runtime(|at| async move {
        let server = start(1, 1, &at[1], vec![Output::Fatal("disk 0 is gone".into())], None).await;
        assert_eq!(server.ended.await.unwrap(), Ended::Fatal("disk 0 is gone".into()));
        let again = start(1, 2, &at[1], vec![], None).await;
        drop(again);
    });
}

#[test]
fn a_taken_address_is_told_at_the_start() {
    in_runtime(|at| async move {
        let _server = start(1, 1, &at[1], vec![], None).await;
        let config = |listen: &str| ShellConfig {
            cluster: CLUSTER,
            server: ServerId(2),
            incarnation: Incarnation(1),
            listen: vec![listen.to_string()],
            bounds: Bounds::default(),
            on_ready: Box::new(|| ()),
        };
        let echo = || Echo {
            me: ServerId(2),
            outputs: VecDeque::new(),
            log: Rc::default(),
            asked: VecDeque::new(),
            tick_at: None,
        };
        let taken = ServerShell::start(echo(), NoDisks, config(&at[1])).await;
        assert!(matches!(taken, Err(StartError::Listen(ListenError::InUse { .. }))));
        let nonsense = ServerShell::start(echo(), NoDisks, config("nowhere")).await;
        assert!(matches!(nonsense, Err(StartError::Address(_))));
    });
}
