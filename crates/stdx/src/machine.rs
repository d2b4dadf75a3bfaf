//! The one shape that every core has: a struct that is stepped.
//!
//! A driver (the real one in `petal-io`, the pretended one in `petal-sim`) hands in one input at a
//! time together with the time, drains the outputs, and carries them out. Everything that a core
//! learns, it learns through `handle`; everything it does, it does through `poll_output`. That is
//! what makes a bug that the simulator finds a bug of the shipped code.

use crate::Instant;

/// A stepped core.
///
/// The driver may hand in many inputs before it takes outputs: group commit and the merging of
/// messages fall out of that, because work that waits is put together when outputs are first asked
/// for.
pub trait Machine {
    /// What the world tells the core.
    type Input;
    /// What the core wants of the world.
    type Output;

    /// Handles one input. `now` must have been read *after* the input was received: a core that
    /// judges a lease with an older clock would serve what it may no longer serve
    /// (docs/petal.md, "why `now` is read late").
    fn handle(&mut self, now: Instant, input: Self::Input);

    /// The next thing that the world should do, until `None`.
    fn poll_output(&mut self) -> Option<Self::Output>;

    /// When the core wants a tick although nothing else happens.
    fn next_timeout(&self) -> Option<Instant>;

    /// Panics if the core's state contradicts itself. Cheap enough for every step of a simulation.
    fn check_invariants(&self);
}
