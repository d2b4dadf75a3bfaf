//! Requests of the client library that the operator makes.

use petal::client::Request;
use petal::global_state::Command;
use petal::ids::ServerId;
use petal::message::{AdminRequest, CommandId};

/// Executes a command.
pub fn execute(command: Command) -> Request {
    let id = CommandId { proposer: 0, number: 0, finished_below: 0 };
    Request::Admin(AdminRequest::Execute { id, command, deadline_millis: 10_000 })
}

/// Asks one server to stop; `None` while the client cannot address one server.
pub fn stop(_server: ServerId) -> Option<Request> {
    None
}
