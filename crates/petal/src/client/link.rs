//! What a client knows of one server: whether a connection is up, what is outstanding there, how
//! fast it answers reads.

use crate::ids::{Incarnation, ServerId};
use crate::limits::CLIENT_WINDOW;
use std::collections::VecDeque;
use stdx::Duration;

/// One server, from the client's side.
#[derive(Debug)]
pub(super) struct Link {
    /// Where to reach it, the best first; empty while unknown.
    pub addresses: Vec<String>,
    /// The driver was told to keep a connection.
    pub dialed: bool,
    /// Its life, while the connection is up.
    pub connected: Option<Incarnation>,
    /// Operations sent and not answered.
    pub in_flight: usize,
    /// Operations that wait for the window or the connection, in order.
    pub queue: VecDeque<u32>,
    /// It has not answered for a while, although the connection is up.
    pub silent: bool,
    /// Smoothed time of a read, in nanoseconds; zero = none yet.
    latency: u64,
}

impl Link {
    pub fn new(addresses: Vec<String>) -> Link {
        Link {
            addresses,
            dialed: false,
            connected: None,
            in_flight: 0,
            queue: VecDeque::new(),
            silent: false,
            latency: 0,
        }
    }
    /// True if an operation may be sent now.
    pub fn has_room(&self) -> bool {
        self.connected.is_some() && self.in_flight < CLIENT_WINDOW
    }
    /// Operations of this client that the server has, or will get.
    pub fn outstanding(&self) -> usize {
        self.in_flight + self.queue.len()
    }
    /// A read took so long.
    pub fn took(&mut self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.latency = if self.latency == 0 { time } else { self.latency - self.latency / 8 + time / 8 };
    }
    pub fn disconnected(&mut self) {
        self.connected = None;
        self.silent = false;
        self.in_flight = 0;
        self.latency = 0;
    }
}

/// Two latencies within this are the same: the choice falls to turns, so that both copies' caches and
/// disks work.
const LATENCY_SLACK: u64 = 100_000;

/// One in so many choices goes to the copy that seems slower, so that it is seen when it is not any more.
const PROBE_EVERY: u64 = 64;

/// Where a read goes: a connected server that answers before others, then the fewest operations outstanding, then
/// the clearly lower latency, then turns (2.6). `turn` grows by one with each choice.
pub(super) fn choose_copy<'a>(copies: impl Iterator<Item = (ServerId, &'a Link)>, turn: u64) -> Option<ServerId> {
    let mut best: Option<(ServerId, &Link)> = None;
    for (n, (server, link)) in copies.enumerate() {
        let better = match best {
            None => true,
            Some((_, other)) => is_better(link, other, turn.wrapping_add(n as u64)),
        };
        if better {
            best = Some((server, link));
        }
    }
    best.map(|(server, _)| server)
}

fn is_better(new: &Link, old: &Link, turn: u64) -> bool {
    let rank = |l: &Link| (l.connected.is_none(), l.silent, l.outstanding());
    if rank(new) != rank(old) {
        return rank(new) < rank(old);
    }
    let slower = |a: &Link, b: &Link| b.latency != 0 && a.latency > b.latency + b.latency / 2 + LATENCY_SLACK;
    let probe = turn.is_multiple_of(PROBE_EVERY);
    if slower(old, new) {
        return !probe;
    }
    if slower(new, old) {
        return probe;
    }
    turn.is_multiple_of(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(connected: bool, in_flight: usize, micros: u64) -> Link {
        let mut link = Link::new(vec![]);
        link.connected = connected.then_some(Incarnation(1));
        link.in_flight = in_flight;
        link.took(Duration::from_micros(micros));
        link
    }

    fn chosen(a: &Link, b: &Link) -> [usize; 2] {
        let mut counts = [0; 2];
        for turn in 0..128 {
            let server = choose_copy([(ServerId(0), a), (ServerId(1), b)].into_iter(), turn).unwrap();
            counts[usize::from(server.0)] += 1;
        }
        counts
    }

    #[test]
    fn equal_copies_take_turns() {
        assert_eq!(chosen(&link(true, 3, 200), &link(true, 3, 240)), [64, 64]);
    }

    #[test]
    fn fewer_outstanding_beats_latency_and_a_connection_beats_both() {
        assert_eq!(chosen(&link(true, 1, 9000), &link(true, 2, 200)), [128, 0]);
        assert_eq!(chosen(&link(false, 0, 200), &link(true, 5, 200)), [0, 128]);
    }

    #[test]
    fn the_slow_copy_is_avoided_but_probed() {
        assert_eq!(chosen(&link(true, 0, 9000), &link(true, 0, 200)), [2, 126]);
        assert_eq!(chosen(&link(true, 0, 200), &link(true, 0, 9000)), [126, 2]);
    }
}
