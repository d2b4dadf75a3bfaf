//! Connections: in order, each with its own delays, and breakable at any moment.
//!
//! What TCP gives is what this gives: bytes of one direction arrive in order or not at all, and
//! nothing relates one connection to another. A broken connection is noticed by its two ends at two
//! different moments; what would have arrived at an end after it noticed is lost. The world keeps the
//! events; this file decides when they happen.

use std::collections::BTreeMap;
use stdx::{Duration, Instant, Prng};

/// A place where a core runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Node {
    /// The server host of this index.
    Server(usize),
    /// The client host of this index.
    Client(usize),
}

/// One end of a connection: a node, and which of its lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EndPoint {
    /// The node.
    pub node: Node,
    /// Its life.
    pub life: u64,
}

/// Number of a connection.
pub type ConnectionId = u64;

/// Which end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Side {
    /// Who dialled.
    Dialler,
    /// Who accepted.
    Acceptor,
}

impl Side {
    /// The other end.
    pub fn other(self) -> Side {
        match self {
            Side::Dialler => Side::Acceptor,
            Side::Acceptor => Side::Dialler,
        }
    }
}

/// How long messages take.
#[derive(Clone, Copy, Debug)]
pub struct NetTimes {
    /// Fastest connection.
    pub min: Duration,
    /// Slowest connection.
    pub max: Duration,
    /// One message in so many takes ten times as long (and holds up those behind it).
    pub spike_one_in: u64,
}

struct End {
    at: EndPoint,
    /// It was told that the connection is up.
    up: bool,
    /// It knows that the connection is gone (or is gone itself).
    closed: bool,
    base: Duration,
    last_arrival: Instant,
    stalled_until: Instant,
}

struct Connection {
    ends: [End; 2],
    broken: bool,
}

/// All connections.
pub struct SimNet {
    prng: Prng,
    times: NetTimes,
    connections: BTreeMap<ConnectionId, Connection>,
    next: ConnectionId,
}

impl SimNet {
    /// No connections yet.
    pub fn new(times: NetTimes, prng: Prng) -> SimNet {
        SimNet { prng, times, connections: BTreeMap::new(), next: 1 }
    }

    /// A new connection, and when the acceptor and then the dialler learn that it is up.
    pub fn connect(&mut self, now: Instant, dialler: EndPoint, acceptor: EndPoint) -> (ConnectionId, [Instant; 2]) {
        let id = self.next;
        self.next += 1;
        let mut end = |at| End {
            at,
            up: false,
            closed: false,
            base: self.draw(),
            last_arrival: now,
            stalled_until: Instant::ZERO,
        };
        let ends = [end(dialler), end(acceptor)];
        self.connections.insert(id, Connection { ends, broken: false });
        let at_acceptor = self.arrival(now, id, Side::Acceptor);
        let at_dialler = self.arrival(at_acceptor, id, Side::Dialler);
        (id, [at_acceptor, at_dialler])
    }

    /// The connection is up at one end; false if it broke before.
    pub fn up(&mut self, id: ConnectionId, side: Side) -> bool {
        let end = self.end_mut(id, side);
        match end {
            Some(end) if !end.closed => {
                end.up = true;
                true
            }
            _ => false,
        }
    }

    /// When a message that leaves `from` now arrives at the other end; `None` if it will not.
    pub fn send(&mut self, now: Instant, id: ConnectionId, from: Side) -> Option<Instant> {
        let connection = self.connections.get(&id)?;
        let usable = !connection.broken && connection.ends[from as usize].up && !connection.ends[from as usize].closed;
        usable.then(|| self.arrival(now, id, from.other()))
    }

    /// Who receives what arrives at `side`; `None` if that end is gone.
    pub fn receiver(&self, id: ConnectionId, side: Side) -> Option<EndPoint> {
        let end = &self.connections.get(&id)?.ends[side as usize];
        (end.up && !end.closed).then_some(end.at)
    }

    /// The two ends, dialler first.
    pub fn ends(&self, id: ConnectionId) -> Option<[EndPoint; 2]> {
        self.connections.get(&id).map(|c| [c.ends[0].at, c.ends[1].at])
    }

    /// Breaks a connection: when each end that still thinks it alive will notice.
    pub fn break_connection(&mut self, now: Instant, id: ConnectionId) -> Vec<(Side, Instant)> {
        let mut notices = Vec::new();
        for side in [Side::Dialler, Side::Acceptor] {
            let delay = self.draw();
            let Some(connection) = self.connections.get_mut(&id) else { return notices };
            if !connection.broken && !connection.ends[side as usize].closed {
                notices.push((side, now + delay * 2));
            }
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.broken = true;
        }
        notices
    }

    /// An end notices, dies, or was replaced. True if it had been up.
    pub fn close_end(&mut self, id: ConnectionId, side: Side) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        let end = &mut connection.ends[side as usize];
        let was_up = end.up && !end.closed;
        end.closed = true;
        connection.broken = true;
        if connection.ends.iter().all(|e| e.closed) {
            self.connections.remove(&id);
        }
        was_up
    }

    /// Nothing arrives at that end before `until`, nor before what was said earlier.
    pub fn stall(&mut self, id: ConnectionId, side: Side, until: Instant) {
        if let Some(end) = self.end_mut(id, side) {
            end.stalled_until = end.stalled_until.max(until);
        }
    }

    /// True if nothing gets through in one of the directions.
    pub fn is_stalled(&self, id: ConnectionId, now: Instant) -> bool {
        self.connections.get(&id).is_some_and(|c| c.ends.iter().any(|e| e.stalled_until > now))
    }

    /// True if anything does not get through somewhere.
    pub fn is_anything_stalled(&self, now: Instant) -> bool {
        self.connections.values().any(|c| c.ends.iter().any(|e| e.stalled_until > now))
    }

    /// Connections that are not broken.
    pub fn alive(&self) -> Vec<ConnectionId> {
        self.connections.iter().filter(|(_, c)| !c.broken).map(|(id, _)| *id).collect()
    }

    /// Connections of a node's life, with its side of each.
    pub fn of(&self, at: EndPoint) -> Vec<(ConnectionId, Side)> {
        let side = |c: &Connection| match at {
            at if c.ends[0].at == at => Some(Side::Dialler),
            at if c.ends[1].at == at => Some(Side::Acceptor),
            _ => None,
        };
        self.connections.iter().filter_map(|(id, c)| side(c).map(|s| (*id, s))).collect()
    }

    /// No more stalls and spikes from now on. Returns the connections on which something is still held up: what
    /// follows it would be, too.
    pub fn heal(&mut self, now: Instant) -> Vec<ConnectionId> {
        self.times.spike_one_in = u64::MAX;
        let is_held_up = |c: &Connection| !c.broken && c.ends.iter().any(|e| e.stalled_until > now);
        let held_up = self.connections.iter().filter(|(_, c)| is_held_up(c)).map(|(id, _)| *id).collect();
        for connection in self.connections.values_mut() {
            for end in &mut connection.ends {
                end.stalled_until = Instant::ZERO;
            }
        }
        held_up
    }

    fn draw(&mut self) -> Duration {
        Duration::from_nanos(self.prng.between(self.times.min.as_nanos() as u64, self.times.max.as_nanos() as u64))
    }

    fn end_mut(&mut self, id: ConnectionId, side: Side) -> Option<&mut End> {
        self.connections.get_mut(&id).map(|c| &mut c.ends[side as usize])
    }

    fn arrival(&mut self, now: Instant, id: ConnectionId, to: Side) -> Instant {
        let jitter = self.prng.below(1000);
        let spike = self.prng.chance(1, self.times.spike_one_in.max(1));
        let end = self.end_mut(id, to).expect("the caller found the connection");
        let mut delay = end.base + end.base * (jitter as u32) / 2000;
        if spike {
            delay *= 10;
        }
        let at = (now + delay).max(end.last_arrival + Duration::from_nanos(1)).max(end.stalled_until);
        end.last_arrival = at;
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: EndPoint = EndPoint { node: Node::Server(0), life: 1 };
    const B: EndPoint = EndPoint { node: Node::Server(1), life: 4 };

    fn net(seed: u64) -> SimNet {
        let times = NetTimes { min: Duration::from_micros(50), max: Duration::from_millis(2), spike_one_in: 20 };
        SimNet::new(times, Prng::new(seed))
    }

    fn up(net: &mut SimNet) -> ConnectionId {
        let (id, [acceptor, dialler]) = net.connect(Instant::ZERO, A, B);
        assert!(acceptor < dialler);
        assert!(net.up(id, Side::Acceptor) && net.up(id, Side::Dialler));
        id
    }

    #[test]
    fn messages_of_one_direction_arrive_in_order() {
        let mut net = net(1);
        let id = up(&mut net);
        let mut last = Instant::ZERO;
        for i in 0..1000 {
            let at = net.send(Instant::from_nanos(i * 1000), id, Side::Dialler).unwrap();
            assert!(at > last);
            last = at;
        }
    }

    #[test]
    fn messages_of_two_connections_overtake_each_other() {
        let mut net = net(2);
        let (one, two) = (up(&mut net), up(&mut net));
        let overtaken = (0..100).filter(|i| {
            let now = Instant::from_nanos(i * 10_000_000);
            net.send(now, one, Side::Dialler) > net.send(now + Duration::from_nanos(10), two, Side::Dialler)
        });
        assert!((1..100).contains(&overtaken.count()));
    }

    #[test]
    fn a_broken_connection_carries_nothing_and_each_end_notices_for_itself() {
        let mut net = net(3);
        let id = up(&mut net);
        assert_eq!(net.receiver(id, Side::Acceptor), Some(B));
        let notices = net.break_connection(Instant::from_nanos(5), id);
        assert_eq!(notices.len(), 2);
        assert_eq!(net.send(Instant::from_nanos(6), id, Side::Dialler), None);
        assert_eq!(net.receiver(id, Side::Acceptor), Some(B), "what is in flight arrives until it is noticed");
        assert!(net.close_end(id, Side::Acceptor));
        assert_eq!(net.receiver(id, Side::Acceptor), None);
        assert!(!net.close_end(id, Side::Acceptor), "it is noticed once");
        assert!(net.close_end(id, Side::Dialler));
        assert!(net.ends(id).is_none());
    }

    #[test]
    fn nothing_arrives_over_a_stalled_connection() {
        let mut net = net(4);
        let id = up(&mut net);
        net.stall(id, Side::Acceptor, Instant::from_nanos(1_000_000_000));
        assert!(net.send(Instant::from_nanos(1), id, Side::Dialler).unwrap() >= Instant::from_nanos(1_000_000_000));
        assert!(net.send(Instant::from_nanos(1), id, Side::Acceptor).unwrap() < Instant::from_nanos(1_000_000_000));
    }
}
