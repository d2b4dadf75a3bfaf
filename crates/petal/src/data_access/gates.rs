//! Gates: on a disk that several clients may have attached, or that was snapshotted together with others, no write of a
//! new epoch is complete before everybody has settled the command that began the epoch (2.9, P6).
//!
//! Clients of such a disk may talk to each other elsewhere. One whose write got the new epoch could tell another one of
//! it, whose write then got the old one at a server that is behind, and so would be in a snapshot that lacks its
//! cause. So would a client of two disks: what it knows of one is no need of its messages for the other. While a gate is
//! closed writes go on, to every replica's disk; only their completion waits.
//!
//! What a settlement finds may be such writes, and it makes them equal to complete ones: so a slot that was settled
//! while a gate was closed shows nothing of the gate's disks, and takes nothing for done, before that opens.
//!
//! Every server has its own gates, whoever asked for the snapshot, because any may come to act. A server that is down
//! is not waited for; but then everyone left must have applied the command that says so, and refuses what the server
//! had sent.

use super::*;

/// The gates of a server.
#[derive(Debug, Default)]
pub struct Gates {
    closed: BTreeMap<StateIndex, Gate>,
}

#[derive(Debug)]
struct Gate {
    disks: BTreeSet<VdiskId>,
    /// These have not settled the index of the gate.
    waits: BTreeSet<ServerId>,
    /// These are not known to have applied this index, the last by which somebody is down.
    behind: (StateIndex, BTreeSet<ServerId>),
}

impl Gate {
    fn is_open(&self) -> bool {
        self.waits.is_empty() && self.behind.1.is_empty()
    }
}

impl Gates {
    /// The command at `index` began new epochs of these disks; these servers have to settle it.
    pub fn close(&mut self, index: StateIndex, disks: &[VdiskId], settlers: &[ServerId]) {
        let gate = Gate {
            disks: disks.iter().copied().collect(),
            waits: settlers.iter().copied().collect(),
            behind: (0, BTreeSet::new()),
        };
        self.closed.insert(index, gate);
    }

    /// The same for what concerns no disk: nothing is asked any more of what was closed before.
    pub fn close_again(&mut self, index: StateIndex, settlers: &[ServerId]) {
        self.closed.clear();
        self.close(index, &[], settlers);
    }

    /// True if no gate is closed.
    pub fn is_idle(&self) -> bool {
        self.closed.is_empty()
    }

    /// True if a write of a disk that got its epoch at this state index may be complete.
    pub fn admits(&self, disk: VdiskId, at: StateIndex) -> bool {
        self.closed.is_empty() || !self.closed.range(..=at).any(|(_, gate)| gate.disks.contains(&disk))
    }

    /// A server has settled an index. True if a gate has opened.
    pub fn on_settled(&mut self, server: ServerId, index: StateIndex) -> bool {
        if let Some(gate) = self.closed.get_mut(&index) {
            gate.waits.remove(&server);
        }
        self.open()
    }

    /// A server has applied an index. True if a gate has opened.
    pub fn on_applied(&mut self, server: ServerId, index: StateIndex) -> bool {
        if self.closed.is_empty() {
            return false;
        }
        for gate in self.closed.values_mut().filter(|g| g.behind.0 <= index) {
            gate.behind.1.remove(&server);
        }
        self.open()
    }

    /// These servers are down by the command `index`, and these are left. True if a gate has opened.
    pub fn on_downs(&mut self, index: StateIndex, downs: &[ServerId], left: &[ServerId]) -> bool {
        for gate in self.closed.values_mut() {
            if downs.iter().any(|down| gate.waits.contains(down) || gate.behind.1.contains(down)) {
                gate.waits.retain(|s| !downs.contains(s));
                gate.behind = (index, left.iter().copied().collect());
            }
        }
        self.open()
    }

    /// Indices that a server is to be asked to settle, because it is waited for: again when its connection is new, and
    /// when somebody is down, for those who are left may have nothing else to say to this server.
    pub fn unsettled_at(&self, server: ServerId) -> BTreeSet<StateIndex> {
        let settles = self.closed.iter().filter(|(_, gate)| gate.waits.contains(&server)).map(|(index, _)| *index);
        let applies = self.closed.values().filter(|gate| gate.behind.1.contains(&server)).map(|gate| gate.behind.0);
        settles.chain(applies).collect()
    }

    fn open(&mut self) -> bool {
        let before = self.closed.len();
        self.closed.retain(|_, gate| !gate.is_open());
        self.closed.len() < before
    }
}

impl DataAccess {
    /// True unless a gate is closed for it.
    pub(super) fn may_complete(&self, disk: VdiskId, at: StateIndex) -> bool {
        self.gates.admits(disk, at) || self.sabotage == Sabotage::NoGates
    }

    /// There is a lease again, or a gate has opened: what became stable meanwhile is complete now.
    pub fn complete_what_waited(&mut self, ctx: &mut Context) {
        if ctx.liveness.lease(ctx.now).is_none() {
            return;
        }
        for index in 0..self.slots.len() {
            let Some(acting) = self.slots[index].acting.as_ref() else { continue };
            let is_stable = |u: &crate::promise::Unfinished| u.waits.is_empty() && self.may_complete(u.disk, u.at);
            let stable = acting.unfinished.iter().filter(|(_, u)| is_stable(u)).map(|(sequence, _)| *sequence);
            for sequence in stable.collect::<Vec<_>>() {
                self.complete_write(ctx, index, sequence);
            }
        }
        let is_parked = |(_, op): &(&OpNumber, &Operation)| op.phase == Phase::Parked;
        let parked: BTreeSet<SlotIndex> = self.operations.iter().filter(is_parked).map(|(_, op)| op.slot).collect();
        for index in parked {
            if self.slots[index].acting.as_ref().is_some_and(|a| a.is_serving()) {
                self.unpark_operations(ctx, index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: VdiskId = VdiskId(5);
    const A: ServerId = ServerId(1);
    const B: ServerId = ServerId(2);
    const C: ServerId = ServerId(3);

    #[test]
    fn writes_of_the_new_epoch_wait_for_all_and_others_do_not() {
        let mut gates = Gates::default();
        gates.close(20, &[DISK], &[A, B]);
        assert!(gates.admits(DISK, 19), "of the old epoch");
        assert!(!gates.admits(DISK, 20));
        assert!(!gates.admits(DISK, 25));
        assert!(gates.admits(VdiskId(6), 25));
        assert!(!gates.on_settled(A, 20));
        assert!(!gates.on_settled(B, 21), "of another command");
        assert_eq!(gates.unsettled_at(B), [20].into());
        assert!(gates.on_settled(B, 20));
        assert!(gates.admits(DISK, 25));
    }

    #[test]
    fn who_is_down_is_not_waited_for_but_the_others_must_know_that() {
        let mut gates = Gates::default();
        gates.close(20, &[DISK], &[A, B, C]);
        gates.on_settled(A, 20);
        gates.on_settled(B, 20);
        assert!(!gates.on_downs(30, &[C], &[A, B]));
        assert_eq!(gates.unsettled_at(B), [30].into());
        assert!(!gates.on_applied(A, 30));
        assert!(!gates.on_applied(B, 29));
        assert!(gates.on_applied(B, 31));
        assert!(gates.admits(DISK, 40));
    }
}
