//! Management: calls to any server, commands executed once, attaching and detaching, fetching hints.
//!
//! ```text
//!   attach:  Hints by name --> Execute Attach --> HintsById, at least as new as the command --> Attached
//!   detach:  requests in flight end --> Execute Detach --> Done
//! ```
//!
//! A call that gets no answer is sent again, to another server: questions may be asked twice, and a
//! command carries its `CommandId`, so that it is executed once. A server that knows less than this
//! client ("there is no such disk", from one that has not heard of it yet) is asked again later.

use super::operations::backoff;
use super::session::{Refresh, hints_make_sense};
use super::*;
use crate::global_state::{CommandError, Outcome, check_length};
use crate::message::{Admin, AdminReply, CommandId, Hints};

/// Tags of calls; those of operations never have this bit.
const CALL_TAG: Tag = 1 << 63;
/// A call without an answer goes to another server after this, besides the time it may take there.
const CALL_PATIENCE: Duration = Duration::from_secs(2);

/// A call that is not answered for good.
#[derive(Debug)]
pub(super) struct Call {
    request: AdminRequest,
    purpose: Purpose,
    /// Only this server may answer.
    to: Option<ServerId>,
    state: CallState,
    /// The only timer that counts.
    timer: Instant,
    /// When the server's own deadline ends.
    until: Option<Instant>,
    tries: u32,
    since: Instant,
    warned: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallState {
    /// For a connection.
    Waits,
    /// For an answer.
    Sent(ServerId),
    /// For time to pass, after what this server answered.
    Pauses(ServerId),
}

/// Whom the answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Request(u32),
    Refresh(SessionId),
}

/// Requests that consist of calls.
#[derive(Debug)]
pub(super) enum Work {
    /// The answer is passed on as it is.
    Call,
    /// Likewise; the command has this number.
    Execute { number: u64 },
    /// A disk is looked up by name.
    AttachLookUp { mode: Attachment, holder: String, take_over: bool },
    /// The command is on its way.
    AttachExecute { number: u64, command: Command, hints: Box<Hints>, mode: Attachment },
    /// The session exists; hints as new as it are on their way.
    AttachLearn { session: SessionId, index: StateIndex, mode: Attachment },
    /// Requests of the session are still in flight.
    DetachWait { session: SessionId },
    /// The command is on its way.
    DetachExecute { session: SessionId, number: u64, command: Command },
    /// Hints of an attached disk.
    Refresh { session: SessionId },
}

impl Work {
    /// Number of the command that is open.
    fn command_number(&self) -> Option<u64> {
        match self {
            Work::Execute { number } | Work::AttachExecute { number, .. } | Work::DetachExecute { number, .. } => {
                Some(*number)
            }
            _ => None,
        }
    }
}

impl Client {
    // --------------------------------------------------------------------------------------------
    // Requests.

    fn manage(&mut self, number: RequestNumber, since: Instant, deadline: Option<Duration>, work: Work) -> u32 {
        let deadline = deadline.map(|d| since + d);
        let work = super::Work::Management(work);
        self.insert(Pending { number, session: None, deadline, cost: 0, open: 0, error: None, work })
    }

    pub(super) fn begin_call(
        &mut self,
        number: RequestNumber,
        to: Option<ServerId>,
        request: AdminRequest,
        deadline: Option<Duration>,
    ) {
        if let Some(error) = self.too_many_calls() {
            return self.answer(number, Err(error));
        }
        let index = self.manage(number, self.now, deadline, Work::Call);
        self.call(request, Purpose::Request(index), to);
    }

    pub(super) fn begin_execute(&mut self, number: RequestNumber, command: Command, deadline: Duration) {
        // No server would take a frame with it.
        if let Err(refused) = check_length(&command) {
            return self.answer(number, Err(RequestError::Admin(refused.into())));
        }
        let Some(command_number) = self.next_command(number) else { return };
        // The server says for whom it waits when its deadline ends; only its silence ends here.
        let patience = Some(deadline + CALL_PATIENCE);
        let index = self.manage(number, self.now, patience, Work::Execute { number: command_number });
        self.execute(index, command_number, command, deadline, true);
    }

    pub(super) fn begin_refresh(&mut self, number: RequestNumber, session: SessionId) {
        let Some(known) = self.sessions.get(&session) else {
            return self.answer(number, Err(RequestError::NotAttached));
        };
        let request = AdminRequest::HintsById { vdisk: known.vdisk };
        let index = self.manage(number, self.now, self.config.deadline, Work::Refresh { session });
        self.call(request, Purpose::Request(index), None);
    }

    pub(super) fn begin_attach(
        &mut self,
        number: RequestNumber,
        name: String,
        mode: Attachment,
        holder: String,
        take_over: bool,
    ) {
        if let Some(error) = self.too_many_calls() {
            return self.answer(number, Err(error));
        }
        let work = Work::AttachLookUp { mode, holder, take_over };
        let index = self.manage(number, self.now, self.config.deadline, work);
        self.call(AdminRequest::Hints { name }, Purpose::Request(index), None);
    }

    pub(super) fn begin_detach(
        &mut self,
        number: RequestNumber,
        session: SessionId,
        since: Instant,
    ) -> Result<(), RequestError> {
        let known = self.sessions.get_mut(&session).filter(|s| !s.detaching).ok_or(RequestError::NotAttached)?;
        known.detaching = true;
        self.manage(number, since, self.config.deadline, Work::DetachWait { session });
        self.detach_if_idle(session);
        Ok(())
    }

    /// The last request of a session that is to be detached has ended.
    pub(super) fn detach_if_idle(&mut self, session: SessionId) {
        if !self.sessions.get(&session).is_some_and(|s| s.detaching && s.open == 0) {
            return;
        }
        let waits =
            |p: &Pending| matches!(p.work, super::Work::Management(Work::DetachWait { session: s }) if s == session);
        let Some(index) = self.requests.iter().position(|p| p.as_ref().is_some_and(waits)) else { return };
        let index = index as u32;
        let request = self.request(index).number;
        let Some(number) = self.next_command(request) else {
            self.sessions.get_mut(&session).expect("it is being detached").detaching = false;
            return self.end_management(index);
        };
        let command = Command::Detach { session };
        *self.work(index) = Work::DetachExecute { session, number, command: command.clone() };
        self.execute(index, number, command, SETTLE_DEADLINE, true);
    }

    fn too_many_calls(&self) -> Option<RequestError> {
        (self.calls.len() >= CLIENT_REQUESTS_WAITING_MAX).then_some(RequestError::TooMany(self.calls.len()))
    }

    /// A number for a command; without one the request is answered with an error.
    fn next_command(&mut self, request: RequestNumber) -> Option<u64> {
        let number = self.commands.next();
        if number.is_none() {
            self.answer(request, Err(RequestError::TooMany(SESSION_NUMBERS_MAX)));
        }
        number
    }

    /// The same command, after a pause: it is not decided or not settled.
    fn execute_again(&mut self, from: ServerId, index: u32, number: u64, command: Command) {
        let tag = self.execute(index, number, command, SETTLE_DEADLINE, false);
        self.call_later(tag, from);
    }

    fn execute(&mut self, index: u32, number: u64, command: Command, deadline: Duration, now: bool) -> Tag {
        let finished_below = self.commands.finished_below();
        let id = CommandId { proposer: self.config.proposer, number, finished_below };
        let request = AdminRequest::Execute { id, command, deadline_millis: 0 };
        let tag = self.add_call(request, Purpose::Request(index), None, Some(self.now + deadline));
        if now {
            self.send_call(tag);
        }
        tag
    }

    fn work(&mut self, index: u32) -> &mut Work {
        match &mut self.request(index).work {
            super::Work::Management(work) => work,
            _ => unreachable!("only management requests make calls"),
        }
    }

    /// Answers a management request.
    fn end(&mut self, index: u32, result: Result<Response, RequestError>) {
        let number = self.request(index).number;
        self.answer(number, result);
        self.end_management(index);
    }

    /// Forgets a management request that is answered; its command is finished.
    fn end_management(&mut self, index: u32) {
        self.end_command(index);
        self.requests[index as usize] = None;
        self.requests_free.push(index);
    }

    fn end_command(&mut self, index: u32) {
        if let Some(number) = self.work(index).command_number() {
            self.commands.finish(number);
        }
    }

    /// A request has given up: its calls with it. For whom they waited.
    pub(super) fn drop_calls(&mut self, index: u32) -> Option<String> {
        let pending = self.requests[index as usize].as_ref()?;
        let super::Work::Management(work) = &pending.work else { return None };
        if let Work::DetachWait { session } | Work::DetachExecute { session, .. } = work {
            let session = *session;
            // It may be asked for again.
            self.sessions.get_mut(&session).expect("it is being detached").detaching = false;
        }
        self.end_command(index);
        let mine = |(tag, call): (&Tag, &Call)| (call.purpose == Purpose::Request(index)).then_some(*tag);
        let tags: Vec<Tag> = self.calls.iter().filter_map(mine).collect();
        let mut waiting_for = None;
        for tag in tags {
            let call = self.calls.remove(&tag).expect("its tag was there");
            waiting_for = Some(self.waits_for(&call));
        }
        waiting_for
    }

    // --------------------------------------------------------------------------------------------
    // Calls.

    fn call(&mut self, request: AdminRequest, purpose: Purpose, to: Option<ServerId>) -> Tag {
        let tag = self.add_call(request, purpose, to, None);
        self.send_call(tag);
        tag
    }

    fn add_call(
        &mut self,
        request: AdminRequest,
        purpose: Purpose,
        to: Option<ServerId>,
        until: Option<Instant>,
    ) -> Tag {
        self.calls_made += 1;
        let tag = CALL_TAG | self.calls_made;
        let (timer, since) = (self.now, self.now);
        let state = CallState::Waits;
        self.calls.insert(tag, Call { request, purpose, to, state, timer, until, tries: 0, since, warned: None });
        tag
    }

    /// Sends a call to the best server that is connected, if there is one.
    fn send_call(&mut self, tag: Tag) {
        let Some(call) = self.calls.get(&tag) else { return };
        let before = match call.state {
            CallState::Sent(server) | CallState::Pauses(server) => Some(server),
            CallState::Waits => None,
        };
        let Some(server) = self.server_for_call(call.to, before) else {
            if let Some(server) = call.to {
                self.dial(server);
            }
            self.calls.get_mut(&tag).expect("it is there").state = CallState::Waits;
            return;
        };
        let now = self.now;
        let call = self.calls.get_mut(&tag).expect("it is there");
        call.state = CallState::Sent(server);
        let mut patience = CALL_PATIENCE;
        if let AdminRequest::Execute { deadline_millis, .. } = &mut call.request {
            let left = call.until.map_or(SETTLE_DEADLINE, |until| until.since(now));
            *deadline_millis = u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(100);
            patience += Duration::from_millis(u64::from(*deadline_millis));
        }
        let request = call.request.clone();
        if call.to.is_none() {
            call.timer = now + patience;
            self.wake_at(now + patience, Timer::Call(tag));
        }
        self.send(server, Body::Admin(Admin { tag, request }));
    }

    /// The one that is asked for; else the one that answered last, but not the one that was tried
    /// before if there is another.
    fn server_for_call(&self, to: Option<ServerId>, before: Option<ServerId>) -> Option<ServerId> {
        let is_connected = |server: &ServerId| self.links.get(server).is_some_and(|l| l.connected.is_some());
        if to.is_some() {
            return to.filter(is_connected);
        }
        let answers = |server: &ServerId| self.links.get(server).is_some_and(|l| l.connected.is_some() && !l.silent);
        if let Some(last) = self.management.filter(answers)
            && Some(last) != before
            && before.is_none()
        {
            return Some(last);
        }
        let after = before.or(self.management);
        let next = self.connected().filter(answers).find(|server| after.is_none_or(|a| *server > a));
        next.or_else(|| self.connected().find(answers)).or_else(|| self.connected().next())
    }

    /// A connection is up: calls that wait for one go out.
    pub(super) fn send_calls_that_wait(&mut self, server: ServerId) {
        let waits = |c: &Call| c.state == CallState::Waits && c.to.is_none_or(|to| to == server);
        let tags: Vec<Tag> = self.calls.iter().filter(|(_, c)| waits(c)).map(|(tag, _)| *tag).collect();
        for tag in tags {
            self.send_call(tag);
        }
    }

    /// A connection is gone: its calls go elsewhere, or wait.
    pub(super) fn take_back_calls(&mut self, server: ServerId) {
        let sent = |c: &Call| c.state == CallState::Sent(server);
        let tags: Vec<Tag> = self.calls.iter().filter(|(_, c)| sent(c)).map(|(tag, _)| *tag).collect();
        for tag in tags {
            let call = &self.calls[&tag];
            match (&call.request, call.purpose) {
                // The server is gone, as it was asked to be; no other one may be asked in its place.
                (AdminRequest::Shutdown, Purpose::Request(index)) => {
                    self.calls.remove(&tag);
                    self.end(index, Ok(Response::Admin(AdminResponse::ShuttingDown)));
                }
                _ => self.send_call(tag),
            }
        }
    }

    /// No answer, or a pause is over.
    pub(super) fn on_call_timer(&mut self, tag: Tag) {
        let Some(call) = self.calls.get(&tag).filter(|c| c.timer <= self.now) else { return };
        match (&call.request, call.state) {
            (_, CallState::Waits) | (AdminRequest::Shutdown, CallState::Sent(_)) => {}
            _ => self.send_call(tag),
        }
    }

    /// The same again, elsewhere if possible, after a pause.
    fn call_later(&mut self, tag: Tag, from: ServerId) {
        let now = self.now;
        let call = self.calls.get_mut(&tag).expect("it was answered");
        call.tries += 1;
        call.state = CallState::Pauses(from);
        call.timer = now + backoff(call.tries, &mut self.prng);
        let timer = call.timer;
        self.wake_at(timer, Timer::Call(tag));
    }

    pub(super) fn on_admin_reply(&mut self, from: ServerId, state_index: StateIndex, reply: AdminReply) {
        let Some(call) = self.calls.get(&reply.tag).filter(|c| c.to.is_none_or(|to| to == from)) else { return };
        let knows_less = state_index < self.state_index;
        let again = match &reply.result {
            Err(AdminError::Starting(_) | AdminError::Busy(_)) => call.to.is_none(),
            Err(AdminError::NoSuchDisk(_) | AdminError::DiskGone(_)) => knows_less,
            Ok(AdminResponse::Hints(hints)) => !hints_make_sense(hints) || self.is_too_old(call.purpose, hints),
            _ => false,
        };
        if again {
            return self.call_later(reply.tag, from);
        }
        self.management = Some(from);
        let call = self.calls.remove(&reply.tag).expect("it was there");
        match call.purpose {
            Purpose::Refresh(session) => self.on_refreshed(from, session, reply.result),
            Purpose::Request(index) => self.on_answer(from, index, reply.result),
        }
    }

    /// True for hints of a server that has not yet heard of the session that they are for.
    fn is_too_old(&self, purpose: Purpose, hints: &Hints) -> bool {
        let Purpose::Request(request) = purpose else { return false };
        let pending = self.requests[request as usize].as_ref();
        matches!(pending.map(|p| &p.work), Some(super::Work::Management(Work::AttachLearn { index, .. }))
            if hints.state_index < *index)
    }

    /// A request of calls goes a step on.
    fn on_answer(&mut self, from: ServerId, index: u32, result: Result<AdminResponse, AdminError>) {
        let work = std::mem::replace(self.work(index), Work::Call);
        match work {
            Work::Call => self.end(index, result.map(Response::Admin).map_err(RequestError::from)),
            Work::Execute { .. } => {
                *self.work(index) = work;
                self.end(index, result.map(Response::Admin).map_err(RequestError::from));
            }
            Work::AttachLookUp { mode, holder, take_over } => match result {
                Ok(AdminResponse::Hints(hints)) => self.attach_execute(index, hints, mode, holder, take_over),
                other => self.end_unexpected(index, other),
            },
            Work::AttachExecute { number, command, hints, mode } => {
                self.on_attach_executed(from, index, number, command, hints, mode, result);
            }
            Work::AttachLearn { session, index: begun, mode } => match result {
                Ok(AdminResponse::Hints(hints)) => self.on_attach_learnt(index, session, begun, mode, &hints),
                other => self.end_unexpected(index, other),
            },
            Work::DetachExecute { session, number, command } => {
                self.on_detach_executed(from, index, session, number, command, result);
            }
            Work::Refresh { session } => match result {
                Ok(AdminResponse::Hints(hints)) => {
                    self.adopt(session, &hints);
                    let result = self.attached(session).ok_or(RequestError::NotAttached);
                    self.end(index, result);
                }
                other => self.end_unexpected(index, other),
            },
            Work::DetachWait { .. } => unreachable!("it has made no call"),
        }
    }

    /// An error, or an answer to another question (a server with a bug: told as not decided).
    fn end_unexpected(&mut self, index: u32, result: Result<AdminResponse, AdminError>) {
        let error = result.err().unwrap_or(AdminError::NotDecided { ring: Vec::new() });
        self.end(index, Err(error.into()));
    }

    // --------------------------------------------------------------------------------------------
    // Attach and detach.

    fn attach_execute(&mut self, index: u32, hints: Box<Hints>, mode: Attachment, holder: String, take_over: bool) {
        let request = self.request(index).number;
        let Some(number) = self.next_command(request) else {
            return self.end_management(index);
        };
        let command = Command::Attach { vdisk: hints.vdisk.id, mode, holder, take_over };
        *self.work(index) = Work::AttachExecute { number, command: command.clone(), hints, mode };
        self.execute(index, number, command, SETTLE_DEADLINE, true);
    }

    #[allow(clippy::too_many_arguments)]
    fn on_attach_executed(
        &mut self,
        from: ServerId,
        index: u32,
        number: u64,
        command: Command,
        hints: Box<Hints>,
        mode: Attachment,
        result: Result<AdminResponse, AdminError>,
    ) {
        let vdisk = hints.vdisk.id;
        let waits = self.unsettled(&hints.vdisk.name, &result);
        *self.work(index) = Work::AttachExecute { number, command: command.clone(), hints, mode };
        match result {
            // Who was fenced may still write where this is not known: it counts when it is settled (P5).
            _ if waits => self.execute_again(from, index, number, command),
            Ok(AdminResponse::Executed { index: begun, outcome: Outcome::Session(session), .. }) => {
                self.end_command(index);
                *self.work(index) = Work::AttachLearn { session, index: begun, mode };
                self.call(AdminRequest::HintsById { vdisk }, Purpose::Request(index), None);
            }
            other => self.end_unexpected(index, other),
        }
    }

    fn on_attach_learnt(&mut self, index: u32, session: SessionId, begun: StateIndex, mode: Attachment, hints: &Hints) {
        *self.work(index) = Work::AttachLearn { session, index: begun, mode };
        self.sessions.insert(session, Session::new(self.now, hints, mode, begun));
        self.learn_servers(session, hints);
        let result = self.attached(session).ok_or(RequestError::NotAttached);
        self.end(index, result);
    }

    fn attached(&self, session: SessionId) -> Option<Response> {
        let known = self.sessions.get(&session)?;
        Some(Response::Attached { session, vdisk: known.vdisk, size: known.size })
    }

    fn on_detach_executed(
        &mut self,
        from: ServerId,
        index: u32,
        session: SessionId,
        number: u64,
        command: Command,
        result: Result<AdminResponse, AdminError>,
    ) {
        *self.work(index) = Work::DetachExecute { session, number, command: command.clone() };
        match result {
            // The requests of this session are over, so nobody needs to wait for it to settle.
            Ok(AdminResponse::Executed { .. }) | Err(AdminError::Refused(CommandError::NoSuchSession(_))) => {
                self.forget_session(session);
                self.end(index, Ok(Response::Done));
            }
            Err(AdminError::NotDecided { .. }) => {
                let name = self.sessions[&session].name.clone();
                self.unsettled(&name, &result);
                self.execute_again(from, index, number, command);
            }
            other => {
                self.sessions.get_mut(&session).expect("it is being detached").detaching = false;
                self.end_unexpected(index, other);
            }
        }
    }

    fn forget_session(&mut self, session: SessionId) {
        let known = self.sessions.remove(&session).expect("it is being detached");
        debug_assert_eq!(known.open, 0);
        if let Some(tag) = known.refresh.call {
            self.calls.remove(&tag);
        }
    }

    /// True if a command has to be waited for; a person is told for whom.
    fn unsettled(&mut self, name: &str, result: &Result<AdminResponse, AdminError>) -> bool {
        let (what, servers) = match result {
            Ok(AdminResponse::Executed { unsettled, .. }) if !unsettled.is_empty() => ("to be heard by", unsettled),
            Err(AdminError::NotDecided { ring }) => ("to be decided by a majority of", ring),
            _ => return false,
        };
        let servers: Vec<String> = servers.iter().map(ServerId::to_string).collect();
        self.outputs.push_back(Output::Warning(format!("{name}: the command waits {what} {}", servers.join(", "))));
        true
    }

    // --------------------------------------------------------------------------------------------
    // Hints.

    /// Fetches the hints of a session in the background, soon.
    pub(super) fn refresh(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let refresh: &mut Refresh = &mut session.refresh;
        if refresh.call.is_some() || refresh.wanted {
            return;
        }
        if refresh.not_before > self.now {
            refresh.wanted = true;
            let at = refresh.not_before;
            return self.wake_at(at, Timer::Refresh(id));
        }
        if self.now.since(refresh.not_before) > RETRY_MAX {
            refresh.pause = RETRY_MIN;
        }
        let (vdisk, fruitless) = (session.vdisk, session.refresh.fruitless);
        let tag = self.add_call(AdminRequest::HintsById { vdisk }, Purpose::Refresh(id), None, None);
        if let Some(server) = fruitless {
            self.calls.get_mut(&tag).expect("just made").state = CallState::Pauses(server);
        }
        self.send_call(tag);
        let now = self.now;
        self.sessions.get_mut(&id).expect("it was there").refresh.asked(now, tag);
    }

    pub(super) fn on_refresh_timer(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id)
            && std::mem::take(&mut session.refresh.wanted)
        {
            self.refresh(id);
        }
    }

    /// Hints of every session with requests: a server went away.
    pub(super) fn refresh_busy_sessions(&mut self) {
        let busy: Vec<SessionId> = self.sessions.iter().filter(|(_, s)| s.open > 0).map(|(id, _)| *id).collect();
        for id in busy {
            self.refresh(id);
        }
    }

    fn on_refreshed(&mut self, from: ServerId, id: SessionId, result: Result<AdminResponse, AdminError>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.refresh.call = None;
        session.refresh.fruitless = Some(from);
        match result {
            Ok(AdminResponse::Hints(hints)) => self.adopt(id, &hints),
            Err(AdminError::DiskGone(_)) => {
                session.ended = true;
                self.wake_session(id);
            }
            _ => {}
        }
    }

    /// Takes hints over; operations that wait try again if something has changed.
    fn adopt(&mut self, id: SessionId, hints: &Hints) {
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.vdisk == hints.vdisk.id) else { return };
        let changed = session.adopt(hints);
        let behind = session.is_behind();
        if changed {
            session.refresh.pause = RETRY_MIN;
            session.refresh.fruitless = None;
        }
        self.learn_servers(id, hints);
        if changed {
            self.wake_session(id);
        }
        if behind {
            self.refresh(id);
        }
    }

    fn learn_servers(&mut self, id: SessionId, hints: &Hints) {
        for hint in &hints.servers {
            self.learn_addresses(hint.server, &hint.addresses);
        }
        for server in self.sessions[&id].servers() {
            self.links.entry(server).or_insert_with(|| Link::new(Vec::new()));
        }
    }

    // --------------------------------------------------------------------------------------------
    // People.

    fn waits_for(&self, call: &Call) -> String {
        match (call.state, call.to) {
            (CallState::Sent(server) | CallState::Pauses(server), _) => {
                format!("{server} (connected, but does not answer)")
            }
            (CallState::Waits, Some(server)) => format!("{server} (not connected)"),
            (CallState::Waits, None) => {
                let known: Vec<String> = self.links.keys().map(ServerId::to_string).collect();
                format!("any of {} (none is connected)", known.join(", "))
            }
        }
    }

    pub(super) fn warn_about_calls(&mut self) {
        let now = self.now;
        let due = |c: &Call| c.warned.map_or(now.since(c.since) >= WARNING_FIRST, |w| now.since(w) >= WARNING_AGAIN);
        let tags: Vec<Tag> = self.calls.iter().filter(|(_, c)| due(c)).map(|(tag, _)| *tag).collect();
        for tag in tags {
            let call = &self.calls[&tag];
            // Hints in the background: whoever waits for them is told of as an operation.
            if matches!(call.purpose, Purpose::Refresh(_)) {
                continue;
            }
            let seconds = now.since(call.since).as_secs();
            let text = format!("a call to the cluster waits for {} since {seconds} s", self.waits_for(call));
            self.outputs.push_back(Output::Warning(text));
            self.calls.get_mut(&tag).expect("its tag was there").warned = Some(now);
        }
    }
}
