//! Whether a target may take a stream. The rules of import, without a cluster.
//!
//! ```text
//!            full               end               incremental, parent = newest         end
//!  empty ----------> begun(to) -----> newest(to) ----------------------------> begun(to) ----> newest(to)
//!                     |    ^                                                    |    ^
//!                     +----+ the same again: elements are written over          +----+
//! ```
//!
//! An import that was interrupted is repeated from the beginning, or with its elements skipped up to a check mark that
//! the target remembers: every element says what its blocks are, not what changes, so writing one twice is harmless.
//! Until the end mark, the target shows nothing newer than before. Only a stream to the same state may follow one that
//! was begun: blocks that the first had written already might not be in another.

use crate::header::{Header, StateId};

/// What a target holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// The newest state that was imported to its end.
    pub newest: Option<StateId>,
    /// The state that an import was to lead to which did not end.
    pub begun: Option<StateId>,
}

/// How a stream fits on a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It is what comes next.
    Begin,
    /// It was begun before: it is read from its beginning, and written from where the target knows that it came.
    Continue,
    /// The target has this state already: there is nothing to do.
    Present,
}

/// Why a stream does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A full stream over something.
    #[error("the stream is a full one of {stream}, and the target holds {newest}; import it as a new disk")]
    NotEmpty {
        /// Where the stream leads to.
        stream: StateId,
        /// What is there.
        newest: StateId,
    },
    /// An increment over nothing.
    #[error(
        "the stream holds only what changed since '{name}' ({parent}), which the target does not have; import that first"
    )]
    NoParent {
        /// What it starts from.
        parent: StateId,
        /// The snapshot's name then.
        name: String,
    },
    /// An increment over another state.
    #[error(
        "the stream holds what changed since '{name}' ({parent}), and the target's newest state is {newest}; import the stream that leads from there"
    )]
    WrongParent {
        /// What it starts from.
        parent: StateId,
        /// The snapshot's name then.
        name: String,
        /// What is there.
        newest: StateId,
    },
    /// Another import did not end.
    #[error(
        "an import to {begun} was begun in the target and did not end, and this stream leads to {stream}; repeat that import, or return the target to its newest state first"
    )]
    OtherBegun {
        /// Where the stream leads to.
        stream: StateId,
        /// Where the other one was to lead to.
        begun: StateId,
    },
}

impl Header {
    /// Whether, and how, the stream fits on a target.
    pub fn fit(&self, target: &Target) -> Result<Fit, Misfit> {
        let stream = self.state();
        if target.newest == Some(stream) && target.begun.is_none() {
            return Ok(Fit::Present);
        }
        match (self.parent_and_name(), target.newest) {
            (None, Some(newest)) => return Err(Misfit::NotEmpty { stream, newest }),
            (Some((parent, name)), None) => return Err(Misfit::NoParent { parent, name }),
            (Some((parent, name)), Some(newest)) if parent != newest => {
                return Err(Misfit::WrongParent { parent, name, newest });
            }
            _ => {}
        }
        match target.begun {
            None => Ok(Fit::Begin),
            Some(begun) if begun == stream => Ok(Fit::Continue),
            Some(begun) => Err(Misfit::OtherBegun { stream, begun }),
        }
    }

    fn parent_and_name(&self) -> Option<(StateId, String)> {
        match &self.kind {
            crate::Kind::Full => None,
            crate::Kind::Incremental { from_snapshot, .. } => self.parent().map(|p| (p, from_snapshot.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::sample;
    use crate::{Kind, Point};

    fn state(epoch: u32) -> StateId {
        StateId { point: Point { lineage: 1, epoch }, ..sample().state() }
    }

    fn step(from: u32, to: u32) -> Header {
        let kind = Kind::Incremental { from: state(from).point, from_snapshot: "before".into() };
        Header { kind, to: state(to).point, ..sample() }
    }

    #[test]
    fn a_chain_goes_on_from_its_newest_state_only() {
        let at = |epoch| Target { newest: Some(state(epoch)), begun: None };
        assert_eq!(sample().fit(&Target::default()), Ok(Fit::Begin));
        assert_eq!(step(4, 5).fit(&at(4)), Ok(Fit::Begin));
        assert_eq!(step(4, 5).fit(&at(5)), Ok(Fit::Present));
        assert_eq!(sample().fit(&at(4)), Ok(Fit::Present));
        assert!(matches!(step(4, 6).fit(&at(5)), Err(Misfit::WrongParent { .. })));
        assert!(matches!(step(5, 6).fit(&at(4)), Err(Misfit::WrongParent { .. })));
        assert!(matches!(step(4, 5).fit(&Target::default()), Err(Misfit::NoParent { .. })));
        assert!(matches!(sample().fit(&at(3)), Err(Misfit::NotEmpty { .. })));
    }

    #[test]
    fn the_same_numbers_of_another_cluster_or_family_are_another_state() {
        let parent = state(4);
        for newest in [StateId { cluster: 8, ..parent }, StateId { family: 13, ..parent }] {
            let target = Target { newest: Some(newest), begun: None };
            assert!(matches!(step(4, 5).fit(&target), Err(Misfit::WrongParent { .. })), "{newest}");
        }
    }

    #[test]
    fn what_was_begun_is_repeated_before_anything_else() {
        let begun = Target { newest: None, begun: Some(state(4)) };
        assert_eq!(sample().fit(&begun), Ok(Fit::Continue));
        let other = Header { to: state(5).point, ..sample() };
        assert!(matches!(other.fit(&begun), Err(Misfit::OtherBegun { .. })));
        let begun = Target { newest: Some(state(4)), begun: Some(state(6)) };
        assert_eq!(step(4, 6).fit(&begun), Ok(Fit::Continue));
        assert!(matches!(step(4, 5).fit(&begun), Err(Misfit::OtherBegun { .. })));
        assert!(matches!(sample().fit(&begun), Err(Misfit::NotEmpty { .. })), "its newest state is being written over");
    }
}
