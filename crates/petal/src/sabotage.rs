//! Deliberately broken protocols, so that the checkers are themselves checked (docs/testing.md).
//!
//! A checker that never complained proves little. Each name here leaves out one rule for which a
//! counterexample is known; the simulator's `must_fail` tests run clusters with it and demand a
//! complaint within a bounded number of seeds. The rule is left out at the one place where it is
//! kept, by asking `sabotage == Sabotage::Name` there, and nowhere else.
//!
//! A real server runs with [`Sabotage::None`]: no configuration file, flag or message can set
//! another value.

/// Which rule is left out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Sabotage {
    /// None: the protocol as it is meant.
    #[default]
    None,

    // ---- data access: streams, promise, settlement
    /// The primary acknowledges when its own store has the write, before every in-sync secondary
    /// told that it is stable there (without I5).
    AckBeforeSecondary,
    /// A new term begins to number and serve as soon as the promises are in: what the promises list
    /// is thrown away, no element is made equal (without I7).
    NoSettlement,
    /// Settlement compares versions only: elements of equal version count as equal, and nothing is
    /// copied although their blocks differ.
    SettleByVersion,
    /// Settlement copies blocks, but leaves at each replica the request ids that it had (without the
    /// second half of I6).
    IdsNotCopied,
    /// A replica that has promised a term goes on to take in the streams of older terms, from whomever.
    NoPromise,
    /// A replica stores what arrives, whatever its number, and acknowledges by counting: what comes twice,
    /// a gap in a stream and an older stream are not noticed.
    NoOrderedStream,
    /// A secondary serves elements whose version is above its watermark without asking the primary,
    /// and the primary serves blocks with unfinished writes.
    ServeBusy,
    /// The watermark does not stop at the oldest unfinished write: whenever one is complete it moves to the
    /// newest that has a version.
    WatermarkSkipsUnfinished,
    /// A request that was applied is applied again when it is sent again (without I6).
    ForgetIds,

    /// Whoever is no member of a slot any more serves reads of it until its lease ends, and who acts there now does not
    /// wait for that.
    LeaversServeOn,
    /// A family that gets a GMap of its own leaves behind what was newer than the watermark (2.8).
    SplitLosesChanges,

    // ---- liveness
    /// Reads are served without a lease.
    ReadWithoutLease,
    /// `ServerDown` is not tied to the suspicion that was waited for: who was suspected once, and heard
    /// again, is declared down as soon as it is suspected the next time (counterexample F3).
    DownWithoutSuspectIndex,
    /// The lease is judged by a clock that was read before the request was received: the process may have been
    /// stopped in between. (The clock is read by whoever drives the core, so the rule is left out there.)
    LeaseByEarlierClock,
    /// The first in-sync member that is *not suspected* acts, in the same term, without the promises of those who are.
    FirstNotSuspectedActs,
    /// Who says goodbye goes on serving until it ends.
    ServeAfterGoodbye,
    /// What names a suspected server after its suspicion, as a `TakeOut` does, keeps it from being declared down for that
    /// (counterexample R4).
    DownCancelledByTakeOut,
    /// A ring member grants by what it has applied: an accepted `Suspect` that it does not know to be decided
    /// forbids nothing (counterexample F2).
    GrantByAppliedLog,

    /// A server that was started without one of its disks says that it has them all: what was there reads as zeros.
    MissingDisk,

    // ---- recovery
    /// `InSync` has its effect whatever the term and the incarnation that it was proposed for (without I4): the
    /// leader appends it with those of the present moment.
    InSyncUnconditional,
    /// Writes do not wait for a member that is proposed to be in sync.
    NewcomerNotCounted,
    /// A member is proposed to be in sync before it has told that everything sent to it is stable there.
    InSyncWithSendsOutstanding,
    /// An element is not copied to a member whose version of it is not lower.
    CopyOnlyIfNewer,
    /// Of an element of which nothing but zeros is left nothing is copied, as if its entry were gone with its blocks
    /// (counterexample R3).
    DeletionWithoutVersion,
    /// What a member has above its watermark is not asked: only what its primary knows to be newer is copied.
    SurvivorsListOnly,
    /// A member that is not in sync serves reads of what it has.
    ReadWhileCatchingUp,
    /// A member that is not in sync takes its primary's watermark for its own.
    WatermarkWhileOut,
    /// A slot is served at once in the term that took a member out, though that one may not know it and still
    /// have a lease.
    TakeOutWithoutWait,

    // ---- management
    /// A call that narrows what data messages may do returns when its command is applied where it was asked for.
    FenceBeforeSettled,

    // ---- snapshots
    /// A secondary serves a snapshot without knowing that everything that was written before has come.
    SnapshotWithoutMark,
    /// Writes of a new epoch of a shared disk are complete before everybody has settled the snapshot.
    NoGates,
    /// A copy of an element brings only the newest row of each lineage.
    NewestEpochOnly,
    /// A clone that is flattened is cut off from its parents without rows of its own.
    FlattenWithoutRows,
    /// A row that a write has made counts for a clone that is flattened before the write is complete.
    FlattenCountsUnfinished,

    // ---- the store
    /// Replay drops single records whose data does not match its CRC, wherever they are, and goes on
    /// behind them.
    ReplayDropsRecords,
    /// A batch is acknowledged when it is durable itself, though an earlier one is not.
    AckBatchesOutOfOrder,
    /// Replay takes a batch for the next one by its number and its own checksum alone: the hash of the
    /// batch before is not compared.
    NoChain,
    /// A freed block may be used again at once, before the batch that freed it is known durable.
    ReuseEarly,
    /// A start allocates and appends without first making a batch durable that records where the
    /// journal ended.
    NoOpenRecord,
}

impl Sabotage {
    /// Every rule that can be left out.
    pub const ALL: [Sabotage; 39] = [
        Sabotage::AckBeforeSecondary,
        Sabotage::NoSettlement,
        Sabotage::SettleByVersion,
        Sabotage::IdsNotCopied,
        Sabotage::NoPromise,
        Sabotage::NoOrderedStream,
        Sabotage::ServeBusy,
        Sabotage::WatermarkSkipsUnfinished,
        Sabotage::ForgetIds,
        Sabotage::ReadWithoutLease,
        Sabotage::DownWithoutSuspectIndex,
        Sabotage::DownCancelledByTakeOut,
        Sabotage::GrantByAppliedLog,
        Sabotage::LeaseByEarlierClock,
        Sabotage::FirstNotSuspectedActs,
        Sabotage::ServeAfterGoodbye,
        Sabotage::MissingDisk,
        Sabotage::InSyncUnconditional,
        Sabotage::NewcomerNotCounted,
        Sabotage::InSyncWithSendsOutstanding,
        Sabotage::CopyOnlyIfNewer,
        Sabotage::DeletionWithoutVersion,
        Sabotage::SurvivorsListOnly,
        Sabotage::ReadWhileCatchingUp,
        Sabotage::WatermarkWhileOut,
        Sabotage::TakeOutWithoutWait,
        Sabotage::FenceBeforeSettled,
        Sabotage::SnapshotWithoutMark,
        Sabotage::NoGates,
        Sabotage::LeaversServeOn,
        Sabotage::SplitLosesChanges,
        Sabotage::NewestEpochOnly,
        Sabotage::FlattenWithoutRows,
        Sabotage::FlattenCountsUnfinished,
        Sabotage::ReplayDropsRecords,
        Sabotage::AckBatchesOutOfOrder,
        Sabotage::NoChain,
        Sabotage::ReuseEarly,
        Sabotage::NoOpenRecord,
    ];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Sabotage::None => "none",
            Sabotage::AckBeforeSecondary => "ack-before-secondary",
            Sabotage::NoSettlement => "no-settlement",
            Sabotage::SettleByVersion => "settle-by-version",
            Sabotage::IdsNotCopied => "ids-not-copied",
            Sabotage::NoPromise => "no-promise",
            Sabotage::NoOrderedStream => "no-ordered-stream",
            Sabotage::ServeBusy => "serve-busy",
            Sabotage::WatermarkSkipsUnfinished => "watermark-skips-unfinished",
            Sabotage::ForgetIds => "forget-ids",
            Sabotage::ReadWithoutLease => "read-without-lease",
            Sabotage::DownWithoutSuspectIndex => "down-without-suspect-index",
            Sabotage::DownCancelledByTakeOut => "down-cancelled-by-take-out",
            Sabotage::GrantByAppliedLog => "grant-by-applied-log",
            Sabotage::LeaseByEarlierClock => "lease-by-earlier-clock",
            Sabotage::FirstNotSuspectedActs => "first-not-suspected-acts",
            Sabotage::ServeAfterGoodbye => "serve-after-goodbye",
            Sabotage::MissingDisk => "missing-disk",
            Sabotage::InSyncUnconditional => "in-sync-unconditional",
            Sabotage::NewcomerNotCounted => "newcomer-not-counted",
            Sabotage::InSyncWithSendsOutstanding => "in-sync-with-sends-outstanding",
            Sabotage::CopyOnlyIfNewer => "copy-only-if-newer",
            Sabotage::DeletionWithoutVersion => "deletion-without-version",
            Sabotage::SurvivorsListOnly => "survivors-list-only",
            Sabotage::ReadWhileCatchingUp => "read-while-catching-up",
            Sabotage::WatermarkWhileOut => "watermark-while-out",
            Sabotage::TakeOutWithoutWait => "take-out-without-wait",
            Sabotage::FenceBeforeSettled => "fence-before-settled",
            Sabotage::SnapshotWithoutMark => "snapshot-without-mark",
            Sabotage::NoGates => "no-gates",
            Sabotage::LeaversServeOn => "leavers-serve-on",
            Sabotage::SplitLosesChanges => "split-loses-changes",
            Sabotage::NewestEpochOnly => "newest-epoch-only",
            Sabotage::FlattenWithoutRows => "flatten-without-rows",
            Sabotage::FlattenCountsUnfinished => "flatten-counts-unfinished",
            Sabotage::ReplayDropsRecords => "replay-drops-records",
            Sabotage::AckBatchesOutOfOrder => "ack-batches-out-of-order",
            Sabotage::NoChain => "no-chain",
            Sabotage::ReuseEarly => "reuse-early",
            Sabotage::NoOpenRecord => "no-open-record",
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<Sabotage> {
        std::iter::once(Sabotage::None).chain(Sabotage::ALL).find(|s| s.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sabotage_is_found_by_its_name() {
        assert_eq!(Sabotage::from_name("none"), Some(Sabotage::None));
        for sabotage in Sabotage::ALL {
            assert_eq!(Sabotage::from_name(sabotage.name()), Some(sabotage));
        }
        assert_eq!(Sabotage::from_name("sleep"), None);
    }
}
