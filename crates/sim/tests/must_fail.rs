//! Protocols that are broken on purpose must be caught: this is how the checkers are checked.
//!
//! Each test leaves out one rule, in clusters where its absence can show, and demands a complaint
//! within a bounded number of seeds; and that the same seed with the rule is without complaint, so
//! that it is really the rule that was missed.

use petal::sabotage::Sabotage;
use petal_sim::options::Overrides;
use petal_sim::run_seed;
use petal_sim::trace::Keep;

fn must_be_caught(sabotage: Sabotage, seeds: u64, ground: Overrides) {
    for seed in 1..=seeds {
        let broken = run_seed(seed, &Overrides { sabotage, ..ground.clone() }, Keep::Hash);
        if broken.complaints.is_empty() {
            continue;
        }
        let whole = run_seed(seed, &ground, Keep::Hash);
        assert!(whole.complaints.is_empty(), "seed {seed} complains with the rule, too: {:#?}", whole.complaints);
        println!("{} was caught by seed {seed}: {}", sabotage.name(), broken.complaints[0]);
        return;
    }
    panic!("{} was not caught in {seeds} seeds", sabotage.name());
}

/// Two or three copies, crashes and lost connections.
fn replicated() -> Overrides {
    Overrides { servers: Some(3), copies: Some(2), crowded: true, ..Overrides::default() }
}

/// One copy: what the store loses nobody puts back.
fn alone() -> Overrides {
    Overrides { copies: Some(1), crowded: true, only_crashes: true, ..Overrides::default() }
}

#[test]
fn acknowledging_before_the_secondary_is_stable() {
    must_be_caught(Sabotage::AckBeforeSecondary, 300, replicated());
}

#[test]
fn no_settlement() {
    must_be_caught(Sabotage::NoSettlement, 100, replicated());
}

#[test]
fn settlement_by_version_only() {
    must_be_caught(Sabotage::SettleByVersion, 300, replicated());
}

#[test]
fn ids_not_copied_with_the_data() {
    must_be_caught(Sabotage::IdsNotCopied, 500, replicated());
}

#[test]
fn forgetting_request_ids() {
    must_be_caught(Sabotage::ForgetIds, 100, replicated());
}

#[test]
fn accepting_messages_of_older_terms_after_a_promise() {
    must_be_caught(Sabotage::NoPromise, 500, Overrides { copies: Some(3), ..replicated() });
}

#[test]
fn no_ordered_stream() {
    must_be_caught(Sabotage::NoOrderedStream, 300, replicated());
}

#[test]
fn serving_busy_elements() {
    must_be_caught(Sabotage::ServeBusy, 100, replicated());
}

#[test]
fn a_watermark_that_passes_unfinished_writes() {
    must_be_caught(Sabotage::WatermarkSkipsUnfinished, 300, replicated());
}

#[test]
fn deletions_without_a_version() {
    must_be_caught(Sabotage::DeletionWithoutVersion, 500, replicated());
}

#[test]
fn replay_that_drops_single_records() {
    must_be_caught(Sabotage::ReplayDropsRecords, 300, alone());
}

#[test]
fn batches_acknowledged_out_of_order() {
    must_be_caught(Sabotage::AckBatchesOutOfOrder, 100, alone());
}

#[test]
fn no_chain_of_batches() {
    must_be_caught(Sabotage::NoChain, 500, alone());
}

#[test]
fn freed_blocks_reused_early() {
    must_be_caught(Sabotage::ReuseEarly, 300, alone());
}

#[test]
fn no_open_record() {
    must_be_caught(Sabotage::NoOpenRecord, 500, alone());
}
