//! What a client knows of one server: whether a connection is up, what is outstanding there, how
//! fast it answers reads.

use crate::ids::{Incarnation, ServerId};
use crate::limits::CLIENT_WINDOW;
use std::collections::VecDeque;
use stdx::{Duration, Instant, Recent};

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
    /// Since when it cannot be reached, if that is so: no connection, or no answers.
    pub away_since: Option<Instant>,
    /// How long it takes for a read.
    pub reads: Recent,
}

/// A server that cannot be reached for so long is spoken to by way of another one: it is there for all others, or it
/// would be declared down in a moment.
const RELAY_AFTER: Duration = Duration::from_millis(300);

impl Link {
    pub fn new(addresses: Vec<String>) -> Link {
        Link {
            addresses,
            dialed: false,
            connected: None,
            in_flight: 0,
            queue: VecDeque::new(),
            silent: false,
            away_since: None,
            reads: Recent::default(),
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
    pub fn connected(&mut self, incarnation: Incarnation) {
        self.connected = Some(incarnation);
        self.away_since = None;
    }
    pub fn disconnected(&mut self, now: Instant) {
        self.connected = None;
        self.silent = false;
        self.away_since = Some(now);
        self.in_flight = 0;
        self.reads = Recent::default();
    }
    /// It has been out of reach for long.
    pub fn is_away(&self, now: Instant) -> bool {
        self.away_since.is_some_and(|since| now.since(since) >= RELAY_AFTER)
    }
    fn latency(&self) -> Duration {
        self.reads.smoothed()
    }
    /// It is slow beside a copy that takes `best`: by so much that its queue says nothing any more.
    pub fn is_slow(&self, best: Duration) -> bool {
        self.latency() > best * SLOW_TIMES + SLOW_SLACK
    }
}

/// Two latencies within this are the same: the choice falls to turns, so that both copies' caches and
/// disks work.
const LATENCY_SLACK: Duration = Duration::from_micros(100);

/// A server that takes this many times as long as another copy, and `SLOW_SLACK` more, is slow: it gets no reads but
/// probes, even while it has fewer operations outstanding (it always has, being avoided).
const SLOW_TIMES: u32 = 4;
/// What a busy disk may take longer than an idle one.
const SLOW_SLACK: Duration = Duration::from_millis(5);

/// One in so many choices goes to the copy that seems slower, so that it is seen when it is not any more.
const PROBE_EVERY: u64 = 64;

/// No read is hedged sooner: below, waiting costs less than asking twice.
const HEDGE_AFTER_MIN: Duration = Duration::from_millis(5);

/// Where a read goes: a connected server that answers, and is not slow, before others; then the fewest operations
/// outstanding, then the clearly lower latency, then turns (2.6). `turn` grows by one with each choice.
pub(super) fn choose_copy<'a>(
    copies: impl Iterator<Item = (ServerId, &'a Link)> + Clone,
    turn: u64,
) -> Option<ServerId> {
    let answering = copies.clone().filter(|(_, l)| l.connected.is_some() && !l.silent);
    let known = answering.map(|(_, l)| l.latency()).filter(|time| !time.is_zero());
    // Without a latency to compare with nobody is slow; and a probe looks at nobody's past.
    let probe = turn.is_multiple_of(PROBE_EVERY);
    let fastest = known.min().filter(|_| !probe);
    let mut best: Option<(ServerId, &Link)> = None;
    for (n, (server, link)) in copies.enumerate() {
        let better = match best {
            None => true,
            Some((_, other)) => is_better(link, other, fastest, probe).unwrap_or((turn + n as u64).is_multiple_of(2)),
        };
        if better {
            best = Some((server, link));
        }
    }
    best.map(|(server, _)| server)
}

/// `None` where both are alike.
fn is_better(new: &Link, old: &Link, fastest: Option<Duration>, probe: bool) -> Option<bool> {
    let is_slow = |l: &Link| fastest.is_some_and(|best| l.is_slow(best));
    let rank = |l: &Link| (l.connected.is_none(), l.silent, is_slow(l), l.outstanding());
    if rank(new) != rank(old) {
        return Some(rank(new) < rank(old));
    }
    let half_more = |time: Duration| time + time / 2 + LATENCY_SLACK;
    let slower = |a: &Link, b: &Link| !b.latency().is_zero() && a.latency() > half_more(b.latency());
    if slower(old, new) {
        return Some(!probe);
    }
    slower(new, old).then_some(probe)
}

/// How long a read may take before another copy is asked as well: what 95 of 100 reads take at the copy that answers
/// fastest, within bounds. Not at the one that was asked: a copy that has become slow would set its own time.
pub(super) fn hedge_after<'a>(copies: impl Iterator<Item = &'a Link>, longest: Duration) -> Duration {
    let p95 = copies.filter(|l| l.connected.is_some()).filter_map(|l| l.reads.p95()).min();
    p95.unwrap_or(longest).clamp(HEDGE_AFTER_MIN, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(connected: bool, in_flight: usize, micros: u64) -> Link {
        let mut link = Link::new(vec![]);
        link.connected = connected.then_some(Incarnation(1));
        link.in_flight = in_flight;
        for _ in 0..10 {
            link.reads.add(Duration::from_micros(micros));
        }
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
        assert_eq!(chosen(&link(true, 1, 5000), &link(true, 2, 200)), [128, 0]);
        assert_eq!(chosen(&link(false, 0, 200), &link(true, 5, 200)), [0, 128]);
    }

    #[test]
    fn the_slow_copy_is_avoided_but_probed() {
        assert_eq!(chosen(&link(true, 0, 9000), &link(true, 0, 200)), [2, 126]);
        assert_eq!(chosen(&link(true, 0, 200), &link(true, 0, 9000)), [126, 2]);
    }

    #[test]
    fn a_slow_server_is_avoided_though_it_has_less_to_do() {
        assert_eq!(chosen(&link(true, 0, 50_000), &link(true, 30, 200)), [2, 126]);
        assert_eq!(chosen(&link(true, 0, 50_000), &link(false, 0, 200)), [128, 0]);
    }

    #[test]
    fn a_read_is_hedged_after_what_the_fastest_copy_takes_within_bounds() {
        let after = |links: &[Link]| hedge_after(links.iter(), Duration::from_millis(150)).as_micros();
        assert_eq!(after(&[link(true, 0, 20_000), link(true, 0, 8000)]), 8000);
        assert_eq!(after(&[link(true, 0, 20_000), link(false, 0, 8000)]), 20_000);
        assert_eq!(after(&[link(true, 0, 100), link(true, 0, 100)]), 5000);
        assert_eq!(after(&[link(true, 0, 900_000)]), 150_000);
        assert_eq!(after(&[Link::new(vec![])]), 150_000);
    }
}
