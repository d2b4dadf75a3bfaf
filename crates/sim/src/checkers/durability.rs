//! Every acknowledged write is readable at the end, unless an acknowledged or unfinished one came after.
//!
//! Linearizability says this too; this says it plainly, which helps whoever reads the report.

use super::linearizability::{Action, Operation};
use crate::content::Value;
use crate::history::History;

/// Looks at the last read of a cell, which held `initial` at first, if that is known; `place` is whose cell it is.
pub fn complaint(
    history: &History,
    (place, cell): (&dyn std::fmt::Display, u64),
    operations: &[Operation],
    initial: Option<Value>,
) -> Option<String> {
    let (read, lost) = lost(operations, initial)?;
    Some(format!(
        "acknowledged operation {lost} ({}) on {place}, cell at {cell}, is lost: the last read, operation {}, saw {:?}",
        history.origin(lost),
        read.id,
        read.action
    ))
}

/// The last read of a cell, and an acknowledged write before it that must have been seen instead of
/// what was.
fn lost(operations: &[Operation], initial: Option<Value>) -> Option<(&Operation, u64)> {
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
    let end = source.or((initial == Some(seen)).then_some(0))?;
    acknowledged().find(|o| o.invoked > end).map(|o| (last, o.id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::ZEROS;
    use crate::history::Target;
    use crate::history::{Effect, End};
    use petal::ids::VdiskId;

    #[test]
    fn a_lost_acknowledged_write_is_named() {
        let disk = Target::of(VdiskId(1), None);
        let mut h = History::default();
        let a = h.invoke(disk, Effect::Write, vec![(0, false), (4096, false)]);
        h.finish(a, End::Done);
        let b = h.invoke(disk, Effect::Write, vec![(0, false)]);
        h.finish(b, End::Done);
        let r = h.invoke(disk, Effect::Read, vec![]);
        h.saw(r, 0, b);
        h.saw(r, 4096, a);
        h.finish(r, End::Done);
        let complaints = |h: &History| -> Vec<String> {
            h.cells().filter_map(|((shown, cell), o)| complaint(h, (shown, *cell), o, Some(ZEROS))).collect()
        };
        assert_eq!(complaints(&h), Vec::<String>::new());
        let r = h.invoke(disk, Effect::Read, vec![]);
        h.saw(r, 0, a);
        h.saw(r, 4096, ZEROS);
        h.finish(r, End::Done);
        assert_eq!(complaints(&h).len(), 2);
        assert!(complaints(&h)[0].contains("operation 2 "));
    }
}
