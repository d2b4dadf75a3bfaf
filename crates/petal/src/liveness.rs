//! Liveness: who may act (2.5). A server serves reads and acknowledges writes only while it holds a
//! [`Lease`]; here is where one is asked for.
//!
//! Heartbeats, suspicion and take-over come with the handling of failures. Until then every running
//! server holds its lease always, which is right as long as no other server ever acts in its place:
//! nothing takes a slot away from a living primary yet.

use stdx::Instant;

/// Proof that the holder had a lease at the moment at which it was asked for. Reads and
/// acknowledgements take it as an argument, so that none can forget to ask.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    at: Instant,
}

impl Lease {
    /// When it was checked.
    pub fn checked_at(self) -> Instant {
        self.at
    }
}

/// The room.
#[derive(Debug, Default)]
pub struct Liveness {}

impl Liveness {
    /// The lease, if this server holds one at `now` (read after the request was received).
    pub fn lease(&self, now: Instant) -> Option<Lease> {
        Some(Lease { at: now })
    }
}
