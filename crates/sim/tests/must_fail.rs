//! Protocols that are broken on purpose must be caught: this is how the checkers are checked.
//!
//! Each test leaves out one rule, in clusters where its absence can show, and demands a complaint
//! within a bounded number of seeds; and that the same seed with the rule is without complaint, so
//! that it is really the rule that was missed.
//!
//! Not here, because whole clusters have not shown them yet within a bounded number of seeds: see
//! docs/testing.md, "Rules whose absence is not caught yet". The store's own walks catch its five.

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
    must_be_caught(Sabotage::NoChain, 150, alone());
}

#[test]
fn freed_blocks_reused_early() {
    must_be_caught(Sabotage::ReuseEarly, 150, alone());
}
