//! Without faults everything that was asked is answered, in bounded virtual time; and where failures come one at a
//! time each operation within three leases.

use crate::ending::Phase;
use crate::host::{ClientHost, ServerHost};
use stdx::Duration;

/// Longest time that a phase without faults may take: 60 times the longest delay between two tries.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Longest time that an operation may take where failures come one at a time, and network and disks are fast. Where a link
/// between two servers is cut it takes a second until one of them is taken out of what they share, a lease until that holds, and
/// up to half a second until the client asks again.
pub const STANDS_MAX: Duration = Duration::from_secs(3);

/// Why a run that does not end does not, as far as can be seen from outside.
pub fn complaint(phase: Phase, waited: Duration, what: &str, servers: &[ServerHost], clients: &[ClientHost]) -> String {
    let servers = servers.iter().enumerate().map(|(host, s)| match &s.life {
        None => format!("host {host} is down"),
        Some(l) => {
            let index = l.server.state().map_or(0, |s| s.index);
            format!(
                "host {host} is {} at index {index}, {}",
                l.server.id(),
                if l.ready { "ready" } else { "not ready" }
            )
        }
    });
    let clients = clients.iter().enumerate().filter_map(|(i, c)| {
        let user = &c.life.as_ref()?.user;
        (!user.is_idle()).then(|| format!("client {i}: {}", user.waits_for()))
    });
    let all: Vec<String> = servers.chain(clients).collect();
    format!("no progress: {phase:?} has lasted {waited:?} without faults; {what}. {}", all.join(". "))
}
