//! Requests of the client library that the operator makes.

use petal::client::Request;
use petal::global_state::Command;
use petal::ids::ServerId;
use petal::message::AdminRequest;
use stdx::Duration;

/// Executes a command.
pub fn execute(command: Command) -> Request {
    Request::Execute { command, deadline: Duration::from_secs(10) }
}

/// Asks one server to stop.
pub fn stop(server: ServerId) -> Request {
    Request::Call { to: Some(server), request: AdminRequest::Shutdown, deadline: Some(Duration::from_secs(1)) }
}
