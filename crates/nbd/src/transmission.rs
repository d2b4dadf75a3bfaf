//! The loop of one connection, after the handshake: requests in, replies out, in any order.
//!
//! One round: poll the requests that were woken, start those that have come in, send all replies in
//! one system call, receive again. Nothing waits for a round to be full; rounds grow by themselves
//! when the machine is busy, because more has come in meanwhile.
//!
//! ```text
//!   Running ──DISC, end of stream, nonsense, shutdown──> Draining ──nothing in flight, all sent──> end
//!      └────────────── the socket fails ─────────────────────┘ (replies are dropped from then on)
//! ```
//!
//! Bounds: a request is begun only if its bytes fit beside those of the requests in flight and of the
//! replies that the client has not taken yet. Until then its bytes stay in the socket, and the client
//! feels it.

use crate::export::{Errno, Export, ExportError, Piece, Zeroing};
use crate::inbox::Inbox;
use crate::outbox::Outbox;
use crate::protocol::*;
use crate::room::{SMALL_MAX, Share};
use crate::server::Shared;
use crate::slots::{SLOTS_MAX, Slots};
use bytes::Bytes;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite};

/// Rounds before other tasks of the thread get their turn.
const ROUNDS_MAX: usize = 16;
/// Bytes that each reply is counted with, beside its data.
const REPLY_OVERHEAD: u64 = 64;

/// Why a connection is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client said so.
    Disconnected,
    /// The client hung up between requests.
    HungUp,
    /// The client hung up within a request.
    HalfRequest,
    /// A request did not begin as one.
    BadMagic,
    /// A payload too long to be worth skipping.
    TooLong,
    /// The server stops.
    ShuttingDown,
    /// The socket failed.
    Broken(io::ErrorKind),
}

/// What a request came to.
enum Outcome {
    Done,
    Data(Vec<Piece>),
    Extents(Vec<(u64, bool)>),
}

/// A request that has its result.
struct Completion {
    request: Request,
    result: Result<Outcome, ExportError>,
}

/// What to do next about what has come in.
enum Intake {
    /// At least so many bytes have to be there before it goes on.
    Wants(usize),
    /// No room for the next request, of so many bytes.
    Full(u64),
    /// No more requests are taken.
    Ended,
}

/// Carries out one request. Its future is what a slot holds.
async fn carry_out<E: Export>(export: Rc<E>, request: Request, data: Bytes) -> Completion {
    let Request { offset, length, .. } = request;
    let fua = request.has(command_flag::FUA);
    let result = match request.command {
        Command::Read => export.read(offset, length).await.map(Outcome::Data),
        Command::Write => export.write(offset, data, fua).await.map(|()| Outcome::Done),
        Command::Flush => export.flush().await.map(|()| Outcome::Done),
        Command::Trim => export.trim(offset, length, fua).await.map(|()| Outcome::Done),
        Command::Cache => export.cache(offset, length).await.map(|()| Outcome::Done),
        Command::WriteZeroes => {
            let (no_hole, fast_only) = (request.has(command_flag::NO_HOLE), request.has(command_flag::FAST_ZERO));
            export.zero(offset, length, Zeroing { no_hole, fast_only, fua }).await.map(|()| Outcome::Done)
        }
        Command::BlockStatus => export.extents(offset, length).await.map(Outcome::Extents),
        Command::Disconnect | Command::Unknown(_) => Ok(Outcome::Done),
    };
    Completion { request, result }
}

/// Runs a connection until it ends. When this returns, no request runs any more.
pub(crate) async fn transmit<E: Export, S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    stream: &mut S,
    inbox: Inbox,
    export: Rc<E>,
    mode: Mode,
    extents: bool,
) -> End {
    let start = |request, data| carry_out(export.clone(), request, data);
    let slots = Slots::new();
    let share = shared.room.share(slots.task_waker());
    let outbox = Outbox::default();
    let export = &*export;
    let _remembered = shared.closing.remember(slots.task_waker());
    let mut connection = Connection {
        shared,
        export,
        start,
        stream,
        mode,
        extents,
        inbox,
        slots,
        outbox,
        share,
        in_flight: 0,
        receiving: None,
        skipping: None,
        end: None,
        broken: false,
    };
    std::future::poll_fn(|cx| connection.poll(cx)).await
}

struct Connection<'a, E, S, F: Future, M> {
    shared: &'a Shared,
    export: &'a E,
    /// Makes the future of a request.
    start: M,
    stream: &'a mut S,
    mode: Mode,
    extents: bool,
    inbox: Inbox,
    slots: Slots<F>,
    outbox: Outbox,
    share: Share<'a>,
    /// Bytes of the requests that run.
    in_flight: u64,
    /// A write whose payload comes into a buffer of its own.
    receiving: Option<Request>,
    /// A refused write, whose payload is still to come.
    skipping: Option<(Request, ExportError)>,
    /// Set as soon as the connection drains.
    end: Option<End>,
    /// The socket failed: replies go nowhere.
    broken: bool,
}

impl<E, S, F, M> Connection<'_, E, S, F, M>
where
    E: Export,
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Completion>,
    M: Fn(Request, Bytes) -> F,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.slots.register(cx.waker());
        if self.shared.closing.is_begun() {
            self.end.get_or_insert(End::ShuttingDown);
        }
        for _ in 0..ROUNDS_MAX {
            self.finish_woken();
            let intake = self.take_requests();
            let sending = self.send(cx);
            self.share.set(self.in_flight + self.outbox.unsent());
            if let Some(end) = self.end {
                self.share.leave_queue();
                let drained = self.slots.busy() == 0 && (self.broken || sending.is_ready());
                return if drained { Poll::Ready(end) } else { Poll::Pending };
            }
            match intake {
                Intake::Wants(bytes) => ready!(self.receive(cx, bytes)),
                // What was sent may have made room; otherwise a slot or the socket will wake us.
                Intake::Full(cost) if sending.is_ready() && self.has_room(cost) => {}
                Intake::Full(_) | Intake::Ended => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn finish_woken(&mut self) {
        let (mode, outbox, in_flight) = (self.mode, &mut self.outbox, &mut self.in_flight);
        self.slots.poll_woken(|completion| {
            *in_flight -= completion.request.cost();
            reply(mode, outbox, completion);
        });
    }

    /// Starts requests until more bytes are needed or no more fit.
    fn take_requests(&mut self) -> Intake {
        let header = self.mode.header_length();
        loop {
            if self.end.is_some() {
                return Intake::Ended;
            }
            if !self.finish_payload() {
                return Intake::Wants(1);
            }
            let Some(bytes) = self.inbox.peek(header) else { return Intake::Wants(header) };
            let Some(request) = Request::parse(self.mode, bytes) else {
                self.end = Some(End::BadMagic);
                continue;
            };
            if request.command == Command::Disconnect {
                self.end = Some(End::Disconnected);
                continue;
            }
            let payload = request.payload_length(self.mode);
            if let Err(error) = self.check(&request) {
                if payload > PAYLOAD_SKIP_MAX {
                    self.end = Some(End::TooLong);
                } else if !self.has_room(0) {
                    return Intake::Full(0);
                } else {
                    self.inbox.skip(header as u64 + payload);
                    self.skipping = Some((request, error));
                }
                continue;
            }
            if !self.has_room(request.cost()) {
                return Intake::Full(request.cost());
            }
            // `check` has let nothing pass that has a payload and is no write of at most 32 MiB.
            let payload = payload as usize;
            if Inbox::is_long(payload) {
                self.in_flight += request.cost();
                self.inbox.begin_long(header, payload);
                self.receiving = Some(request);
                continue;
            }
            let Some(data) = self.inbox.message(header, payload) else { return Intake::Wants(header + payload) };
            self.in_flight += request.cost();
            self.begin(request, data);
        }
    }

    /// Goes on with a payload that is longer than what was received with its header; false if it is
    /// not yet complete.
    fn finish_payload(&mut self) -> bool {
        if let Some(request) = self.receiving {
            let Some(data) = self.inbox.take_long() else { return false };
            self.receiving = None;
            self.begin(request, data);
        }
        if self.skipping.is_some() && !self.inbox.skipped() {
            return false;
        }
        if let Some((request, error)) = self.skipping.take() {
            self.refuse(request, error);
        }
        true
    }

    /// Starts a request that is complete, and whose bytes are counted.
    fn begin(&mut self, request: Request, data: Bytes) {
        if let Some(completion) = self.slots.start((self.start)(request, data)) {
            self.in_flight -= request.cost();
            reply(self.mode, &mut self.outbox, completion);
        }
    }

    fn refuse(&mut self, request: Request, error: ExportError) {
        reply(self.mode, &mut self.outbox, Completion { request, result: Err(error) });
    }

    /// True if a request of that many bytes may begin; if not, what will make it so wakes the connection. A
    /// small one by itself is always let through, however much others hold.
    fn has_room(&self, cost: u64) -> bool {
        let held = self.in_flight + self.outbox.unsent();
        let config = &self.shared.config;
        let after = held + cost + REPLY_OVERHEAD;
        let is_alone = self.slots.busy() == 0 && held == 0;
        let fits_here = self.slots.busy() < config.requests_in_flight_max.min(SLOTS_MAX)
            && (is_alone || after <= config.bytes_in_flight_max);
        if !fits_here || (is_alone && cost <= SMALL_MAX) {
            self.share.leave_queue();
            return fits_here;
        }
        self.share.may_hold(after)
    }

    /// Judges a request by its header.
    fn check(&self, request: &Request) -> Result<(), ExportError> {
        use command_flag::*;
        let refuse = |errno, why: &str| Err(ExportError::new(errno, why));
        let known = match request.command {
            Command::Read => FUA | if self.mode == Mode::Simple { 0 } else { DF },
            Command::Write if self.mode == Mode::Extended => FUA | PAYLOAD_LEN,
            Command::WriteZeroes => FUA | NO_HOLE | FAST_ZERO,
            Command::BlockStatus => FUA | REQ_ONE,
            Command::Write | Command::Trim | Command::Cache | Command::Flush | Command::Disconnect => FUA,
            Command::Unknown(_) => return refuse(Errno::Invalid, "there is no such command"),
        };
        if request.flags & !known != 0 {
            return refuse(Errno::Invalid, "that command does not know one of these flags");
        }
        if request.command == Command::Flush {
            let plain = request.offset == 0 && request.length == 0;
            return if plain { Ok(()) } else { refuse(Errno::Invalid, "a flush has neither offset nor length") };
        }
        if request.length == 0 {
            return refuse(Errno::Invalid, "the length is 0");
        }
        if request.cost() > PAYLOAD_MAX {
            return refuse(Errno::Invalid, "the length is over 32 MiB");
        }
        if request.command == Command::BlockStatus && !self.extents {
            return refuse(Errno::Invalid, "base:allocation was not selected in the handshake");
        }
        let writes = matches!(request.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if writes && self.export.read_only() {
            return refuse(Errno::NotPermitted, "the export is read-only");
        }
        if request.offset.checked_add(request.length).is_none_or(|end| end > self.export.size()) {
            let grows = matches!(request.command, Command::Write | Command::WriteZeroes);
            let errno = if grows { Errno::NoSpace } else { Errno::Invalid };
            return refuse(errno, "the range goes beyond the end of the export");
        }
        Ok(())
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.broken {
            self.outbox.clear();
            return Poll::Ready(());
        }
        match self.outbox.poll_send(cx, self.stream) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(e)) => {
                self.broken = true;
                self.outbox.clear();
                self.end.get_or_insert(End::Broken(e.kind()));
                Poll::Ready(())
            }
        }
    }

    fn receive(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<()> {
        match self.inbox.poll_receive(cx, self.stream, wanted) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(0)) => {
                let between = self.inbox.is_empty() && self.skipping.is_none();
                self.end = Some(if between { End::HungUp } else { End::HalfRequest });
            }
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(e)) => {
                self.broken = true;
                self.end = Some(End::Broken(e.kind()));
            }
        }
        Poll::Ready(())
    }
}

/// Puts the reply to a request into the outbox.
fn reply(mode: Mode, outbox: &mut Outbox, completion: Completion) {
    let Completion { request, result } = completion;
    let result = match result {
        Ok(Outcome::Data(pieces)) => return reply_data(mode, outbox, &request, pieces),
        Ok(Outcome::Extents(extents)) => {
            let extents = tidy_extents(mode, &request, extents);
            if !extents.is_empty() {
                let chunk = Chunk { mode, request: &request, last: true };
                return outbox.text(|out| chunk.extents(out, &extents));
            }
            Err(ExportError::new(Errno::Io, "the export has no answer"))
        }
        Ok(Outcome::Done) => Ok(()),
        Err(error) => Err(error),
    };
    let chunk = Chunk { mode, request: &request, last: true };
    match (result, mode) {
        (Ok(()), Mode::Extended) => outbox.text(|out| chunk.none(out)),
        // Commands without data may be answered simply in structured mode too, in 16 bytes instead of 20.
        (Ok(()), _) => outbox.text(|out| out.extend_from_slice(&simple_header(request.cookie, 0))),
        (Err(error), Mode::Simple) => {
            outbox.text(|out| out.extend_from_slice(&simple_header(request.cookie, error.errno as u32)));
        }
        (Err(error), _) => outbox.text(|out| chunk.error(out, error.errno as u32, &error.reason)),
    }
}

fn reply_data(mode: Mode, outbox: &mut Outbox, request: &Request, pieces: Vec<Piece>) {
    if pieces.iter().map(Piece::length).sum::<u64>() != request.length {
        // Sent as it is, it would shift every later reply of the connection.
        let result = Err(ExportError::new(Errno::Io, "the export gave another number of bytes than was asked for"));
        return reply(mode, outbox, Completion { request: *request, result });
    }
    if mode == Mode::Simple {
        outbox.text(|out| out.extend_from_slice(&simple_header(request.cookie, 0)));
        return pieces.into_iter().for_each(|piece| put(outbox, piece));
    }
    let is_hole = |piece: &Piece| matches!(piece, Piece::Zero(_));
    if !pieces.iter().any(is_hole) {
        let chunk = Chunk { mode, request, last: true };
        outbox.text(|out| chunk.data(out, request.offset, request.length));
        return pieces.into_iter().for_each(|piece| put(outbox, piece));
    }
    let whole = request.has(command_flag::DF) && !pieces.iter().all(is_hole);
    let mut offset = request.offset;
    let end = request.offset + request.length;
    let mut pieces = pieces.into_iter().peekable();
    // A chunk for each run of pieces of one kind; a single one if the client must not get fragments.
    while offset < end {
        let hole = pieces.peek().is_some_and(is_hole);
        let mut run = Vec::new();
        while let Some(piece) = pieces.next_if(|piece| whole || is_hole(piece) == hole) {
            run.push(piece);
        }
        let length = run.iter().map(Piece::length).sum::<u64>();
        let chunk = Chunk { mode, request, last: offset + length == end };
        if hole && !whole {
            outbox.text(|out| chunk.hole(out, offset, length));
        } else {
            outbox.text(|out| chunk.data(out, offset, length));
            run.into_iter().for_each(|piece| put(outbox, piece));
        }
        offset += length;
    }
}

fn put(outbox: &mut Outbox, piece: Piece) {
    match piece {
        Piece::Data(bytes) => outbox.payload(bytes),
        Piece::Zero(length) => outbox.zeros(length),
    }
}
