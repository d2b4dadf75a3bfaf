//! Protocols that are broken on purpose must be caught: this is how the checkers are checked.
//!
//! Each test leaves out one rule, in clusters where its absence can show, and demands a complaint
//! within a bounded number of seeds; and that the same seed with the rule is without complaint, so
//! that it is really the rule that was missed.
//!
//! Two rules are there for what the rest of today's system cannot yet do, and are shown by faults that stand
//! for it (`differ`, `ghost`): see docs/testing.md, "Which rule is caught by what".

use petal::global_state::Attachment;
use petal::limits::LEASE;
use petal::sabotage::Sabotage;
use petal_sim::options::{FaultWeights, Overrides};
use petal_sim::run_seed;
use petal_sim::scenario::Scenario;
use petal_sim::trace::Keep;
use stdx::Duration;

fn must_be_caught(sabotage: Sabotage, seeds: u64, ground: Overrides) {
    must_be_caught_within(sabotage, 1..seeds + 1, ground);
}

/// For rules whose absence shows rarely: where it does.
fn must_be_caught_within(sabotage: Sabotage, seeds: std::ops::Range<u64>, ground: Overrides) {
    for seed in seeds.clone() {
        let broken = run_seed(seed, &Overrides { sabotage, ..ground.clone() }, Keep::Hash);
        if broken.complaints.iter().all(|c| is_unjudged(c)) {
            continue;
        }
        let whole = run_seed(seed, &ground, Keep::Hash);
        if !whole.complaints.is_empty() && whole.complaints.iter().all(|c| is_unjudged(c)) {
            continue;
        }
        assert!(whole.complaints.is_empty(), "seed {seed} complains with the rule, too: {:#?}", whole.complaints);
        println!("{} was caught by seed {seed}: {}", sabotage.name(), broken.complaints[0]);
        return;
    }
    panic!("{} was not caught in seeds {seeds:?}", sabotage.name());
}

/// Too many operations on one block at one time for an order to be found, or excluded: that says nothing.
fn is_unjudged(complaint: &str) -> bool {
    complaint.contains("could not be judged")
}

/// Two or three copies, crashes and lost connections.
fn replicated() -> Overrides {
    Overrides { servers: Some(3), copies: Some(2), crowded: true, ..Overrides::default() }
}

/// One copy: what the store loses nobody puts back.
fn alone() -> Overrides {
    Overrides { copies: Some(1), crowded: true, only_crashes: true, ..Overrides::default() }
}

/// Many operations at one time in one slot, and only the faults that matter to the rule.
fn busy(copies: usize, faults: FaultWeights) -> Overrides {
    let faults = Some(faults);
    Overrides { servers: Some(3), copies: Some(copies), crowded: true, busy: true, faults, ..Overrides::default() }
}

/// Busy, and whoever dies misses much and has it copied when it comes back.
fn recovering(faults: FaultWeights) -> Overrides {
    Overrides { recovering: true, ..busy(2, faults) }
}

fn often(ground: Overrides) -> Overrides {
    Overrides { fault_interval: Some(Duration::from_millis(50)), ..ground }
}

/// A proposal that a member is in sync is decided when it has died, missed much, and come back.
#[test]
fn in_sync_whenever_it_is_decided() {
    let faults = FaultWeights { crash_one: 1, late: 1, ..FaultWeights::NONE };
    must_be_caught(Sabotage::InSyncUnconditional, 150, recovering(faults));
}

/// A write is acknowledged while it is on its way to a member that is being declared in sync; then its primary dies.
#[test]
fn a_newcomer_that_does_not_count() {
    let faults = FaultWeights { crash_one: 1, lag: 3, ..FaultWeights::NONE };
    must_be_caught(Sabotage::NewcomerNotCounted, 120, recovering(faults));
}

/// The last copies are on their way to a member that is declared in sync; then their sender dies.
#[test]
fn in_sync_before_everything_sent_is_stable() {
    let faults = FaultWeights { crash_one: 1, lag: 3, ..FaultWeights::NONE };
    must_be_caught(Sabotage::InSyncWithSendsOutstanding, 120, recovering(faults));
}

/// A member that has got new writes, and not yet copies of old ones, dies again; by its watermark it has all.
#[test]
fn a_watermark_that_moves_while_out_of_sync() {
    let faults = FaultWeights { crash_one: 1, relapse: 3, ..FaultWeights::NONE };
    must_be_caught(Sabotage::WatermarkWhileOut, 120, recovering(faults));
}

/// A primary died with a write that nobody else has and nobody asks for again.
#[test]
fn recovery_from_the_survivors_list_only() {
    let faults = FaultWeights { strand: 1, crash_client: 1, ..FaultWeights::NONE };
    let ground = Overrides { operations: Some(500), ..often(recovering(faults)) };
    must_be_caught(Sabotage::SurvivorsListOnly, 150, ground);
}

/// The same: its version is the higher one.
#[test]
fn copies_of_newer_versions_only() {
    let faults = FaultWeights { strand: 1, crash_client: 1, ..FaultWeights::NONE };
    must_be_caught(Sabotage::CopyOnlyIfNewer, 150, often(recovering(faults)));
}

/// A member has what was discarded while it was away.
#[test]
fn a_deletion_without_a_version() {
    let faults = Some(FaultWeights { crash_one: 1, ..FaultWeights::NONE });
    let ground = Overrides { recovering: true, faults, ..replicated() };
    must_be_caught(Sabotage::DeletionWithoutVersion, 40, ground);
}

/// A client that has not heard that a server is out of sync asks it.
#[test]
fn reads_while_catching_up() {
    must_be_caught(Sabotage::ReadWhileCatchingUp, 150, recovering(FaultWeights { crash_one: 1, ..FaultWeights::NONE }));
}

/// Both replicas have a version of an element, with different blocks.
#[test]
fn settlement_that_compares_versions_only() {
    must_be_caught(Sabotage::SettleByVersion, 60, busy(2, FaultWeights { differ: 1, ..FaultWeights::NONE }));
}

/// The primary lost what the secondary has, gets it back without the request's id, and applies it once more when
/// its client asks again, after another client's write.
#[test]
fn request_ids_not_copied_with_the_blocks() {
    must_be_caught(Sabotage::IdsNotCopied, 60, busy(2, FaultWeights { strand: 1, ..FaultWeights::NONE }));
}

/// A write of an older term arrives when a newer one is settled and has gone on.
#[test]
fn no_promise() {
    let faults = FaultWeights { ghost: 1, crash_one: 1, ..FaultWeights::NONE };
    must_be_caught(Sabotage::NoPromise, 60, busy(2, faults));
}

/// What is resent over a new connection is taken for new, and acknowledged for what is still on its way.
#[test]
fn no_ordered_stream() {
    must_be_caught(Sabotage::NoOrderedStream, 120, busy(2, FaultWeights { cut: 1, ..FaultWeights::NONE }));
}

/// One secondary shows a write that another does not have yet.
#[test]
fn a_watermark_that_passes_unfinished_writes() {
    must_be_caught(Sabotage::WatermarkSkipsUnfinished, 120, busy(3, FaultWeights { hold: 1, ..FaultWeights::NONE }));
}

/// Some only read, and the run is long enough for leases to end: what they are shown by a server that nobody else hears
/// any more shows whether it may still answer.
fn reading(faults: FaultWeights) -> Overrides {
    Overrides { readers: true, ..busy(2, faults) }
}

/// A server that is cut off from all others is read by a client that has not heard of it.
#[test]
fn reads_without_a_lease() {
    let ground = reading(FaultWeights { isolate: 1, ..FaultWeights::NONE });
    must_be_caught_within(Sabotage::ReadWithoutLease, 75..135, ground);
}

/// A server is taken out, does not know it, and has a lease.
#[test]
fn serving_at_once_when_a_member_was_taken_out() {
    let ground = reading(FaultWeights { oust: 1, ..FaultWeights::NONE });
    must_be_caught_within(Sabotage::TakeOutWithoutWait, 165..230, ground);
}

/// A server was stopped, and others act in its place when it goes on.
#[test]
fn a_lease_that_is_judged_by_a_clock_that_was_read_before() {
    let ground = reading(FaultWeights { freeze: 1, ..FaultWeights::NONE });
    must_be_caught_within(Sabotage::LeaseByEarlierClock, 750..790, ground);
}

/// A disk is taken over; a server that has not heard of it acknowledges what the old holder asks.
#[test]
fn a_fence_that_returns_before_it_is_settled() {
    let faults = Some(FaultWeights { isolate: 1, ..FaultWeights::NONE });
    let ground = Overrides {
        servers: Some(3),
        copies: Some(1),
        readers: true,
        no_shrink: true,
        operations: Some(20_000),
        fault_interval: Some(Duration::from_millis(2500)),
        faults,
        ..Overrides::default()
    };
    must_be_caught_within(Sabotage::FenceBeforeSettled, 100..200, ground);
}

/// Suspicion moves who acts, and not the term.
#[test]
fn two_primaries_in_one_term() {
    let ground = reading(FaultWeights { isolate: 1, ..FaultWeights::NONE });
    must_be_caught(Sabotage::FirstNotSuspectedActs, 20, ground);
}

/// A server that has said goodbye need not be waited for: unless it goes on serving.
#[test]
fn serving_after_goodbye() {
    let ground = reading(FaultWeights { stop: 1, ..FaultWeights::NONE });
    must_be_caught(Sabotage::ServeAfterGoodbye, 20, ground);
}

#[test]
fn acknowledging_before_the_secondary_is_stable() {
    must_be_caught(Sabotage::AckBeforeSecondary, 150, replicated());
}

#[test]
fn no_settlement() {
    must_be_caught(Sabotage::NoSettlement, 150, replicated());
}

#[test]
fn forgetting_request_ids() {
    must_be_caught(Sabotage::ForgetIds, 150, replicated());
}

#[test]
fn serving_busy_elements() {
    must_be_caught(Sabotage::ServeBusy, 150, replicated());
}

#[test]
fn replay_that_drops_single_records() {
    must_be_caught(Sabotage::ReplayDropsRecords, 150, alone());
}

#[test]
fn no_chain_of_batches() {
    must_be_caught_within(Sabotage::NoChain, 330..380, alone());
}

#[test]
fn freed_blocks_reused_early() {
    let ground = Overrides { servers: Some(1), busy: true, full: true, ..alone() };
    must_be_caught(Sabotage::ReuseEarly, 100, ground);
}

/// Who left a slot goes on as it was, and its heir does not wait for it.
#[test]
fn who_left_a_slot_serves_on() {
    must_be_caught(Sabotage::LeaversServeOn, 10, Overrides { servers: Some(4), shifts: true, ..Overrides::default() });
}

#[test]
fn a_split_that_leaves_behind_what_is_newer_than_the_watermark() {
    let ground = Overrides { servers: Some(4), shifts: true, ..Overrides::default() };
    must_be_caught_within(Sabotage::SplitLosesChanges, 260..290, ground);
}

/// A disk absent for one boot, then back.
#[test]
fn a_server_without_one_of_its_disks() {
    let complaints = |sabotage| {
        let mut s = Scenario::new(1, &Overrides { sabotage, disks: Some(2), ..Overrides::default() });
        let disk = s.create("vol", 64);
        s.attach(0, "vol", Attachment::Exclusive);
        (0..64).for_each(|element| s.write(0, disk, element));
        s.crash(2);
        let is_taken = s.start_without_a_disk(2);
        assert_eq!(is_taken, sabotage == Sabotage::MissingDisk);
        if !is_taken {
            s.start(2);
            s.ready(2);
        }
        s.in_sync();
        s.read(0, disk, 0..64);
        s.finish()
    };
    assert_eq!(complaints(Sabotage::None), Vec::<String>::new());
    let found = complaints(Sabotage::MissingDisk);
    println!("{found:#?}");
    assert!(!found.is_empty());
}

/// A server that freezes is suspected, and is taken out of a slot by one that does not know that yet.
#[test]
fn a_take_out_that_cancels_what_a_suspicion_leads_to() {
    let goes_down = |sabotage| {
        let mut s = Scenario::new(1, &Overrides { sabotage, ..Overrides::default() });
        let disk = s.create("vol", 64);
        let element = (0..64).find(|e| s.hosts_of(disk, *e)[1] == 2).expect("it is second somewhere");
        s.freeze(2, Duration::from_secs(20));
        s.suspected(2);
        s.take_out(2, disk, element).expect("the other one is there");
        assert!(!s.is_down(2), "it was declared down before it was taken out");
        s.pass(LEASE * 3);
        s.is_down(2)
    };
    assert!(goes_down(Sabotage::None));
    assert!(!goes_down(Sabotage::DownCancelledByTakeOut));
}
