//! What the world has planned: a queue by time, and by order of planning within one moment.

use crate::disk::Ticket;
use crate::net::{ConnectionId, Node, Side};
use bytes::Bytes;
use petal::global_state::Attachment;
use petal::ids::{DiskId, Incarnation};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use stdx::{Duration, Instant};

/// Something that will happen.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node tries to connect to a server host.
    Dial {
        /// Who.
        node: Node,
        /// In which of its lives.
        life: u64,
        /// To which host.
        host: usize,
    },
    /// A server looks whether anybody is there on a host whose connection broke.
    Probe {
        /// Who.
        node: Node,
        /// In which of its lives.
        life: u64,
        /// Which host.
        host: usize,
    },
    /// An end learns that its connection is up.
    Up {
        /// Which.
        connection: ConnectionId,
        /// Which end.
        side: Side,
    },
    /// An end learns that its connection is gone.
    Closed {
        /// Which.
        connection: ConnectionId,
        /// Which end.
        side: Side,
    },
    /// A frame arrives.
    Deliver {
        /// Over which connection.
        connection: ConnectionId,
        /// At which end.
        side: Side,
        /// The frame.
        frame: Bytes,
        /// Its number among all frames ever sent.
        sent: u64,
    },
    /// A disk is done with a command.
    DiskDone {
        /// Host.
        host: usize,
        /// Disk of the host.
        disk: usize,
        /// In which life the command was given.
        life: u64,
        /// Which.
        ticket: Ticket,
    },
    /// A node takes up its inputs.
    Run {
        /// Who.
        node: Node,
        /// In which of its lives.
        life: u64,
    },
    /// A node wanted to be woken up.
    Tick {
        /// Who.
        node: Node,
        /// In which of its lives.
        life: u64,
        /// Which wake-up; older ones are void.
        generation: u64,
    },
    /// A dead host or client starts again.
    Start {
        /// Who.
        node: Node,
    },
    /// The next fault.
    Fault,
    /// What was waited for has happened a moment ago.
    Ambush {
        /// Who is killed: this host, or all.
        host: Option<usize>,
    },
    /// The same; what happens is that a connection breaks.
    Cut {
        /// Which.
        connection: ConnectionId,
    },
    /// A message of long ago arrives once more, over the connection that there is now.
    Ghost {
        /// Host that sent it.
        from: usize,
        /// Host that it was for.
        to: usize,
        /// The message.
        frame: Bytes,
    },
    /// A server that another one does not hear is cut off from all others.
    Oust {
        /// Its host.
        host: usize,
        /// In which of its lives.
        life: u64,
    },
    /// A server is stopped, and goes on later.
    Freeze {
        /// Its host.
        host: usize,
        /// For so long.
        time: Duration,
    },
    /// A client thinks of something to do.
    Think {
        /// Client host.
        client: usize,
        /// In which of its lives.
        life: u64,
    },
    /// A client tries to attach what somebody is just making.
    Eager {
        /// Client host.
        client: usize,
        /// Its name.
        name: String,
        /// How.
        mode: Attachment,
        /// How often it tries.
        tries: u32,
    },
    /// A server that died loses disks, as soon as the others do without them.
    Lose {
        /// Which.
        host: usize,
        /// The life that ended.
        life: Incarnation,
        /// How often it was looked.
        tries: u32,
    },
    /// Its disks are replaced, when the cluster knows of it.
    Replace {
        /// Which.
        host: usize,
        /// The disks that it will have.
        disks: Vec<DiskId>,
    },
    /// A dead host is declared down, if it is still dead.
    Bury {
        /// Host.
        host: usize,
        /// The life that ended.
        life: u64,
    },
    /// The world looks whether the next phase begins.
    Phase,
}

struct Planned {
    at: Instant,
    number: u64,
    event: Event,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Planned {}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// The queue.
#[derive(Default)]
pub struct Queue {
    heap: BinaryHeap<Reverse<Planned>>,
    next: u64,
}

impl Queue {
    /// Plans an event.
    pub fn plan(&mut self, at: Instant, event: Event) {
        self.next += 1;
        self.heap.push(Reverse(Planned { at, number: self.next, event }));
    }

    /// Takes the next one.
    pub fn next(&mut self) -> Option<(Instant, Event)> {
        self.heap.pop().map(|Reverse(planned)| (planned.at, planned.event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_the_order_of_planning() {
        let mut queue = Queue::default();
        queue.plan(Instant::from_nanos(5), Event::Fault);
        queue.plan(Instant::from_nanos(3), Event::Phase);
        queue.plan(Instant::from_nanos(5), Event::Phase);
        let order: Vec<String> =
            std::iter::from_fn(|| queue.next()).map(|(at, e)| format!("{} {e:?}", at.as_nanos())).collect();
        assert_eq!(order, ["3 Phase", "5 Fault", "5 Phase"]);
    }
}
