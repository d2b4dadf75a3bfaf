//! Judges a history of real processes: what `petal history` recorded, one JSON object for each operation.

use crate::checkers::linearizability::{Action, Operation, Verdict, check};
use crate::content::ZEROS;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::BufRead;

#[derive(Deserialize)]
struct Line {
    client: u64,
    op: String,
    block: u64,
    value: u64,
    invoke: u64,
    #[serde(rename = "return")]
    returned: Option<u64>,
}

/// What is wrong with a history; else how many operations on how many blocks were judged.
pub fn judge(lines: impl BufRead) -> Result<String, String> {
    let mut blocks: BTreeMap<u64, Vec<Operation>> = BTreeMap::new();
    let mut clients: Vec<u64> = Vec::new();
    for (number, line) in (1..).zip(lines.lines()) {
        let line = line.map_err(|e| format!("line {number}: {e}"))?;
        let line: Line = serde_json::from_str(&line).map_err(|e| format!("line {number}: {e}"))?;
        let action = match line.op.as_str() {
            "read" => Action::Read(line.value),
            "write" => Action::Write(line.value),
            other => return Err(format!("line {number}: there is no operation '{other}'")),
        };
        clients.push(line.client);
        blocks.entry(line.block).or_default().push(Operation {
            id: number,
            invoked: line.invoke,
            returned: line.returned.unwrap_or(u64::MAX),
            optional: line.returned.is_none(),
            action,
        });
    }
    let mut count = 0;
    for (block, operations) in &mut blocks {
        operations.sort_by_key(|o| o.invoked);
        count += operations.len();
        match check(operations, ZEROS) {
            Verdict::Linearizable => {}
            Verdict::TooHard => return Err(format!("block {block} could not be judged: too many operations at once")),
            Verdict::Violation { at, possible } => {
                let what = operations[at];
                return Err(format!(
                    "not linearizable: block {block}, line {}: {:?} cannot be explained; possible were {possible:?}",
                    what.id, what.action
                ));
            }
        }
    }
    clients.sort_unstable();
    clients.dedup();
    Ok(format!("linearizable: {count} operations of {} clients on {} blocks", clients.len(), blocks.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(op: &str, value: u64, invoke: u64, returned: &str) -> String {
        format!(
            "{{\"client\":1,\"op\":\"{op}\",\"block\":3,\"value\":{value},\"invoke\":{invoke},\"return\":{returned}}}\n"
        )
    }

    #[test]
    fn a_good_history_passes_and_a_stale_read_does_not() {
        let good = line("write", 7, 0, "10") + &line("read", 7, 11, "12") + &line("write", 8, 13, "null");
        assert!(judge(good.as_bytes()).is_ok_and(|said| said.contains("3 operations")));
        let stale = good + &line("read", 8, 20, "21") + &line("read", 7, 22, "23");
        assert!(judge(stale.as_bytes()).is_err_and(|why| why.contains("not linearizable")));
    }

    #[test]
    fn what_is_not_a_history_is_said_with_its_line() {
        assert!(judge("{}\n".as_bytes()).is_err_and(|why| why.contains("line 1")));
    }
}
