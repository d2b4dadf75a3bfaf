//! Every acknowledged write is readable at the end, unless an acknowledged or unfinished one came after.
//!
//! Linearizability says this too; this says it plainly, which helps whoever reads the report.

use super::linearizability::{Action, Operation};
use crate::content::{Value, ZEROS};
use crate::history::History;

/// Looks at the last read of every cell.
pub fn complaints(history: &History) -> Vec<String> {
    history
        .cells()
        .filter_map(|((vdisk, cell), operations)| {
            let (read, lost) = lost(operations)?;
            Some(format!(
                "acknowledged operation {lost} ({}) on {vdisk}, cell at {cell}, is lost: the last read, operation {}, saw {:?}",
                history.origin(lost),
                read.id, read.action
            ))
        })
        .collect()
}

/// The last read of a cell, and an acknowledged write before it that must have been seen instead of
/// what was.
fn lost(operations: &[Operation]) -> Option<(&Operation, u64)> {
    let is_read = |o: &&Operation| matches!(o.action, Action::Read(_));
    let last = operations.iter().filter(is_read).max_by_key(|o| o.invoked)?;
    let Action::Read(seen) = last.action else { return None };
    let writes = || operations.iter().filter(|o| matches!(o.action, Action::Write(_)) && o.invoked < last.returned);
    let acknowledged = || writes().filter(|o| !o.optional && o.returned < last.invoked);
    // Who wrote what was seen has the latest end among them; whatever begins after that end hides it.
    let value = |o: &Operation| match o.action {
        Action::Write(value) | Action::Read(value) => value,
    };
    let source = writes().filter(|o| value(o) == seen).map(|o| o.returned).max();
    let end = source.or((seen == ZEROS as Value).then_some(0))?;
    acknowledged().find(|o| o.invoked > end).map(|o| (last, o.id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Effect, End};
    use petal::ids::VdiskId;

    #[test]
    fn a_lost_acknowledged_write_is_named() {
        let disk = VdiskId(1);
        let mut h = History::default();
        let a = h.invoke(disk, None, Effect::Write, vec![(0, false), (4096, false)]);
        h.finish(a, End::Done);
        let b = h.invoke(disk, None, Effect::Write, vec![(0, false)]);
        h.finish(b, End::Done);
        let r = h.invoke(disk, None, Effect::Read, vec![]);
        h.saw(r, 0, b);
        h.saw(r, 4096, a);
        h.finish(r, End::Done);
        assert_eq!(complaints(&h), Vec::<String>::new());
        let r = h.invoke(disk, None, Effect::Read, vec![]);
        h.saw(r, 0, a);
        h.saw(r, 4096, ZEROS);
        h.finish(r, End::Done);
        assert_eq!(complaints(&h).len(), 2);
        assert!(complaints(&h)[0].contains("operation 2 "));
    }
}
