//! The log of a run: a hash of every event, and the events in words where somebody wants to read them.
//!
//! Two runs of one seed must have the same log. Comparing hashes of everything is cheap enough to be
//! always on; the list of hashes says where two runs part.

use stdx::Instant;

/// What to keep beside the hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Keep {
    /// Only the hash.
    #[default]
    Hash,
    /// The hash after every event, to find where two runs part.
    Steps,
    /// Print every event to standard output.
    Words,
}

/// The log.
pub struct Trace {
    hash: u64,
    events: u64,
    keep: Keep,
    steps: Vec<u64>,
}

impl Trace {
    /// An empty log.
    pub fn new(keep: Keep) -> Trace {
        Trace { hash: 0x0070_6574_616c, events: 0, keep, steps: Vec::new() }
    }

    /// An event: when, its kind and numbers, and words that are only made when they are printed.
    pub fn event(&mut self, now: Instant, numbers: &[u64], words: impl FnOnce() -> String) {
        self.events += 1;
        self.mix(now.as_nanos());
        for number in numbers {
            self.mix(*number);
        }
        match self.keep {
            Keep::Hash => {}
            Keep::Steps => self.steps.push(self.hash),
            Keep::Words => println!("{now:?} {}", words()),
        }
    }

    /// Words for the reader only.
    pub fn words(&self, now: Instant, words: impl FnOnce() -> String) {
        if self.keep == Keep::Words {
            println!("{now:?} {}", words());
        }
    }

    /// Hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Number of events so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The hash after each event, if kept.
    pub fn into_steps(self) -> Vec<u64> {
        self.steps
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.hash ^= self.hash >> 31;
    }
}
