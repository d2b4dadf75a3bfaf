//! How often each kind of fault, and each thing worth meeting, happened.
//!
//! A simulation that no longer injects what it says it injects still passes. So every kind has a
//! counter, and a run of many seeds in which one stayed at zero is itself a failure (design 5.1).

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Kind {
            $($(#[$doc])* $name,)*
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// The kind in words.
            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    /// A server was declared down.
    Down => "a server was declared down",
    /// A member that was being brought back got an element.
    CopiedBack => "an element was copied to a member that came back",
    /// A member had everything again.
    CaughtUp => "a member caught up",
    /// A bit of a block turned over.
    Rotten => "a block rotted",
    /// A block could not be read any more.
    Unreadable => "a block became unreadable",
    /// A server met one.
    BadMet => "a bad block was met",
    /// And repaired it.
    Repaired => "a bad block was repaired from another copy",
    /// A disk answered nothing for seconds.
    HungDisk => "a disk hung",
    /// A disk answered reads, and nothing else for seconds.
    HungWrites => "a disk read on and wrote nothing",
    /// A server took itself out of the way because of that.
    LeftHung => "a server whose disk hung took itself out of the way",
    /// A disk failed for good.
    FailedDisk => "a disk failed for good",
    /// Its server went down in order.
    LeftFailed => "a server whose disk failed went down",
    /// What a disk had answered was gone after a crash.
    Lied => "a disk lost what it had acknowledged",
    /// And whoever had been told so noticed.
    LieNoticed => "a primary noticed that a member's disk had lied, in a slot",
    /// One write failed.
    Stumble => "a disk failed one write",
    /// A round of scrub was finished (a server's last one, by number, counted at the end of each of its lives).
    Scrubbed => "a round of scrub ended",
    /// A block that was spoilt when nobody asked for anything any more.
    SpoiltAtRest => "a block went bad at rest, for the scrub to find",
    /// And the scrub found a bad block there.
    FoundByScrub => "the scrub found and repaired a bad block at rest",
    /// A server died while it was brought back.
    DiedCatchingUp => "a member that was being brought back died",
    /// The primary of a slot died while it brought somebody back.
    SourceDied => "a primary died while it brought a member back",
    /// What a member lacked last was held up, and its sender killed.
    Lag => "the last messages to a member that came back were late, and their sender died",
    /// An `InSync` came that was not true any more.
    Late => "a proposal to be in sync came too late",
    /// A server was cut off from other servers only.
    Sever => "a server was cut off from servers, not from clients",
    /// A server was cut off from other servers for longer than they wait.
    Isolate => "a server was cut off from servers until others acted in its place",
    /// A server was cut off when it was about to be taken out.
    Oust => "a server was cut off when it was about to be taken out",
    /// Data were damaged on their way to a replica.
    Damage => "data were damaged on their way",
    /// A client was cut off from one server.
    Estrange => "a client was cut off from a server that others reached",
    /// An operator changed the placement.
    Shift => "a server was drained or filled, or that was turned back",
    /// A server was found being replaced.
    StayedAway => "a server had stayed away, and was being replaced",
    /// Slots moved to other servers.
    Moved => "a slot moved to other servers",
    /// A server passed a client's message on to a server which that could not reach.
    Relayed => "a message was passed on for a client",
    /// A server was cut off, from one other node or from all, in one direction or both.
    Partition => "a server was partitioned from others",
    /// A server was stopped and went on later, as by SIGSTOP.
    Freeze => "a server was frozen",
    /// One server was killed.
    CrashOne => "one server crashed",
    /// Several servers, but not all, were killed at one moment.
    CrashSeveral => "several servers crashed at once",
    /// All servers were killed at one moment.
    CrashAll => "all servers crashed at once",
    /// A server was killed before it was ready.
    CrashInStart => "a server crashed while it started",
    /// A server was asked to stop, and did.
    Stop => "a server was stopped in order",
    /// Somebody was killed at a moment that was waited for.
    Ambush => "a crash was timed to a moment that matters",
    /// A connection was reset at a moment that was waited for.
    Cut => "a reset was timed to a moment that matters",
    /// A killed server started again.
    Restart => "a server started again",
    /// A server that had been declared down began a new life.
    NewLife => "a server declared down began a new life",
    /// A server was suspected.
    Suspected => "a server was suspected",
    /// A server was declared down.
    DeclaredDown => "a server was declared down",
    /// A server found that nobody listens where another one was.
    Refused => "a server refused connections",
    /// A disk write in flight at a crash is there afterwards.
    WriteKept => "an unanswered disk write was kept by a crash",
    /// A disk write in flight at a crash is gone.
    WriteLost => "an unanswered disk write was lost by a crash",
    /// Some sectors of a disk write in flight at a crash are there.
    WriteTorn => "an unanswered disk write was torn by a crash",
    /// A PMap transaction in flight at a crash is there.
    CommitKept => "an unanswered PMap commit was kept by a crash",
    /// A PMap transaction in flight at a crash is gone.
    CommitLost => "an unanswered PMap commit was lost by a crash",
    /// A growth of the disk file in flight at a crash is gone.
    ExtendLost => "an unanswered extension was lost by a crash",
    /// A disk answered commands in another order than they were given.
    DiskReordered => "a disk answered out of order",
    /// A disk became slow for a while.
    SlowDisk => "a disk was slow",
    /// A server's thread became slow for a while.
    SlowServer => "a server was slow",
    /// A connection was reset while both ends lived.
    Reset => "a connection was reset",
    /// A server came back without one of its disks.
    DiskReplaced => "a server lost one of its disks",
    /// A server came back with new disks only.
    ServerReplaced => "a server lost all of its disks",
    /// A connection delivered nothing for a while.
    Stall => "a connection stalled",
    /// A message was on a connection when it broke.
    MessageLost => "a message was lost with its connection",
    /// A message overtook one sent earlier to the same node over another connection.
    Overtaken => "a message overtook one of another connection",
    /// A new connection replaced one that its acceptor still thought alive.
    Replaced => "a connection replaced a half-dead one",
    /// A client died.
    ClientCrash => "a client crashed",
    /// An operation's client died, or its answer left open what became of it.
    Unfinished => "an operation was left unfinished",
    /// An operation was refused because a disk was full.
    NoSpace => "an operation was refused for lack of space",
    /// A client took a disk over from another.
    TakeOver => "a disk was taken over",
    /// An operation was refused because its session had been ended by somebody else.
    Fenced => "a fenced operation was refused",
    /// A learner joined.
    Joined => "a server joined",
    /// A disk was made.
    Created => "a disk was created",
    /// A disk got another name.
    Renamed => "a disk was renamed",
    /// A disk grew.
    Grown => "a disk grew",
    /// A disk shrank.
    Shrunk => "a disk shrank",
    /// A disk was deleted.
    Deleted => "a disk was deleted",
    /// A client gave a disk back.
    Detached => "a disk was detached",
    /// A write that does not begin and end at blocks.
    UnalignedWrite => "an unaligned write",
    /// A write that touches more than one element.
    StraddlingWrite => "a write across elements",
    /// A write far out in a huge disk.
    FarWrite => "a write beyond 2^40",
    /// Zeros were written.
    Zeroed => "a range was zeroed",
    /// A range was discarded.
    Discarded => "a range was discarded",
    /// Zeros over all of a disk.
    ZeroedAll => "a whole disk was zeroed or discarded",
    /// The extents of a range were asked for.
    Mapped => "extents were read",
    /// A snapshot of one disk.
    SnapshotMade => "a snapshot was made",
    /// Snapshots of several disks.
    SnapshotsAtOnce => "several disks were snapshotted at one instant",
    /// Where something was to be copied back.
    SnapshotInRecovery => "a snapshot was made while a member was out of sync",
    /// The disk went on in another epoch, so the command was refused.
    EpochOver => "a snapshot, clone or rollback was refused because its epoch was over",
    /// Somebody had a snapshot attached before the call that made it had returned.
    SnapshotEarly => "a snapshot was attached before its call had returned",
    /// A read of a snapshot.
    SnapshotRead => "a snapshot was read",
    /// A primary told others that they have all of a snapshot.
    Marked => "a replica was told that it can serve a snapshot",
    /// A disk was made of a snapshot.
    ClonedSnapshot => "a snapshot was cloned",
    /// A disk was made of a disk.
    ClonedDisk => "a disk was cloned as it was",
    /// A disk that began as a clone or was rolled back was written.
    CloneWritten => "a clone was written",
    /// A disk went back.
    RolledBack => "a disk was rolled back",
    /// And what it had held was kept.
    RollbackKept => "a rollback kept what there was as a snapshot",
    /// A snapshot was deleted.
    SnapshotDeleted => "a snapshot was deleted",
    /// What a clone stands on was deleted.
    ParentDeleted => "a parent of a clone was deleted",
    /// A deletion while something was to be copied back.
    DeletedInRecovery => "something was deleted while a member was out of sync",
    /// Somebody had it attached.
    RefusedInUse => "a deletion or rollback was refused because somebody had it attached",
    /// It was protected.
    RefusedProtected => "a deletion was refused because of protection",
    /// A snapshot got another name.
    RenamedSnapshot => "a snapshot was renamed",
    /// A snapshot was protected or released.
    Protected => "a snapshot was protected or released",
    /// A policy was set.
    PolicySet => "a policy was set",
    /// A clone was to need nothing of its parents any more.
    FlattenBegun => "a clone was to be flattened",
    /// And it came to its end.
    Flattened => "a clone was flattened",
    /// Somebody changed his mind.
    FlattenStopped => "flattening was stopped",
    /// Nothing is made of a clone meanwhile.
    RefusedFlattened => "a snapshot or clone was refused because its disk was being flattened",
    /// An operator ended somebody's session.
    Evicted => "a session was ended by an operator",
    /// A read returned what a write had written.
    ReadData => "a read returned data",
}

/// A number for each kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counters([u64; Kind::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Counters([0; Kind::ALL.len()])
    }
}

impl Counters {
    /// One more.
    pub fn count(&mut self, kind: Kind) {
        self.add(kind, 1);
    }

    /// `n` more.
    pub fn add(&mut self, kind: Kind, n: u64) {
        self.0[kind as usize] += n;
    }

    /// How often.
    pub fn get(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    /// Adds another run's numbers.
    pub fn merge(&mut self, other: &Counters) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    /// Kinds that never happened.
    pub fn never(&self) -> Vec<Kind> {
        Kind::ALL.iter().copied().filter(|k| self.get(*k) == 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_never_happened_is_named() {
        let mut counters = Counters::default();
        for kind in Kind::ALL {
            if *kind != Kind::Stall {
                counters.count(*kind);
            }
        }
        let mut sum = Counters::default();
        sum.merge(&counters);
        assert_eq!(sum.never(), vec![Kind::Stall]);
    }
}
