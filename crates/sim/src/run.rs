//! One seed, or many.

use crate::counters::{Counters, Kind};
use crate::options::{Options, Overrides};
use crate::panics;
use crate::trace::{Keep, Trace};
use crate::world::World;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use stdx::{Duration, Instant, Prng};

/// What came of one seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What was drawn from it.
    pub options: Options,
    /// Hash of the log of all events.
    pub log_hash: u64,
    /// The hash after each event, if asked for.
    pub steps: Vec<u64>,
    /// Number of events.
    pub events: u64,
    /// Virtual time at the end.
    pub ended_at: Instant,
    /// Acknowledged operations.
    pub operations: u64,
    /// The longest time that one operation of a client took.
    pub longest: Duration,
    /// What must not be.
    pub complaints: Vec<String>,
    /// How often each kind of fault happened.
    pub counters: Counters,
}

/// What came of many seeds.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// Acknowledged operations.
    pub operations: u64,
    /// Events.
    pub events: u64,
    /// How often each kind of fault happened.
    pub counters: Counters,
    /// Reports with complaints, by seed.
    pub bad: Vec<Report>,
}

/// Runs one seed.
pub fn run_seed(seed: u64, overrides: &Overrides, keep: Keep) -> Report {
    let mut prng = Prng::new(seed);
    let options = Options::draw(&mut prng, overrides);
    if keep == Keep::Words {
        println!("seed {seed}: {options:#?}");
    }
    let mut world = World::new(options.clone(), prng, Trace::new(keep));
    let outcome = panics::catch(|| {
        world.run();
        world.check_history();
    });
    if let Err(panic) = outcome {
        world.complain(format!("panic: {panic}"));
    }
    Report {
        seed,
        options,
        log_hash: world.trace.hash(),
        events: world.trace.events(),
        ended_at: world.now,
        operations: world.history.finished(),
        longest: world.longest,
        complaints: std::mem::take(&mut world.complaints),
        counters: world.counters.clone(),
        steps: world.trace.into_steps(),
    }
}

/// Runs a seed twice: `None` if both runs were the same, else at which event they part.
pub fn compare_runs(seed: u64, overrides: &Overrides) -> Option<u64> {
    let (one, two) = (run_seed(seed, overrides, Keep::Steps), run_seed(seed, overrides, Keep::Steps));
    if one.log_hash == two.log_hash && one.counters == two.counters && one.complaints == two.complaints {
        return None;
    }
    let same = one.steps.iter().zip(&two.steps).take_while(|(a, b)| a == b).count();
    Some(same as u64)
}

/// Runs seeds `first..first + count` on so many threads; `each` is called with every report, in order
/// of finishing. Stops early at `bad_max` seeds with complaints.
pub fn run_many(
    first: u64,
    count: u64,
    threads: usize,
    bad_max: usize,
    overrides: &Overrides,
    each: impl Fn(&Report) + Sync,
) -> Summary {
    let next = AtomicU64::new(first);
    let summary = Mutex::new(Summary::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || summary.lock().expect("no panic holds it").bad.len() >= bad_max {
                        break;
                    }
                    let report = run_seed(seed, overrides, Keep::Hash);
                    each(&report);
                    summary.lock().expect("no panic holds it").add(report);
                }
            });
        }
    });
    let mut summary = summary.into_inner().expect("no panic holds it");
    summary.bad.sort_by_key(|r| r.seed);
    summary
}

impl Summary {
    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.operations += report.operations;
        self.events += report.events;
        self.counters.merge(&report.counters);
        if !report.complaints.is_empty() {
            self.bad.push(report);
        }
    }

    /// Kinds of faults that no seed met.
    pub fn never(&self) -> Vec<Kind> {
        self.counters.never()
    }
}
