//! A line that says how far long work is, and how long it will take yet; for people only.

use crate::output;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(500);

/// Work of a known number of bytes, or of something else.
pub struct Progress {
    what: String,
    /// What is counted; nothing where it is bytes.
    unit: &'static str,
    of: u64,
    began: Instant,
    told: Instant,
    is_shown: bool,
}

impl Progress {
    /// Begins; nothing is shown if nobody looks.
    pub fn begin(what: impl Into<String>, of: u64) -> Progress {
        Progress::begin_counted(what, of, "")
    }

    /// The same for work that is counted in something else than bytes.
    pub fn begin_counted(what: impl Into<String>, of: u64, unit: &'static str) -> Progress {
        let now = Instant::now();
        Progress { what: what.into(), unit, of, began: now, told: now, is_shown: std::io::stderr().is_terminal() }
    }

    /// So many bytes are done.
    pub fn at(&mut self, done: u64) {
        if !self.is_shown || self.told.elapsed() < EVERY {
            return;
        }
        self.told = Instant::now();
        let seconds = self.began.elapsed().as_secs_f64();
        let rate = done as f64 / seconds.max(0.001);
        let left = self.of.saturating_sub(done) as f64 / rate.max(1.0);
        let words = |n: u64| if self.unit.is_empty() { output::size(n) } else { format!("{n} {}", self.unit) };
        let (done, of, rate) = (words(done), words(self.of), words(rate as u64));
        let _ = write!(
            std::io::stderr(),
            "\r{}: {done} of {of}, {rate}/s, {} left \x1b[K",
            self.what,
            output::duration(left as u64)
        );
    }

    /// The line goes.
    pub fn end(self) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
