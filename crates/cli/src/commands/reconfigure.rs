//! `petal reconfigure status | pause | resume | abort`: data that move from server to server (2.8).
//!
//! Drained and filled servers are said by `petal server`; the ring's leader moves. This tells how far it is, by what rate,
//! and what it waits for ([`petal::mover::waits_for`]). The rate is read from the servers' logs: slots that moved within
//! the last minute.

use super::placement::{Held, copy_size, held};
use super::status::logs;
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, ensure};
use petal::global_state::{Command as Change, CommandError, Reconfiguration, State};
use petal::ids::{GmapId, ServerId, SlotId, StateIndex};
use petal::message::LogLine;
use petal::mover::{Wait, waits_for};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The present rate is that of so many milliseconds.
const RATE_OF: u64 = 60_000;
/// Characters of the bar.
const BAR: u64 = 30;

/// What is asked of data that move.
#[derive(clap::Subcommand)]
#[command(after_help = "\
`petal server drain`, `fill` and `add` begin it; it goes on by itself, whoever leads the ring.")]
pub enum Command {
    /// How far it is, how long it will take yet, and what it waits for
    Status {
        /// Again every second, until nothing moves
        #[arg(long)]
        watch: bool,
        /// Print JSON (with --watch one object a line)
        #[arg(long)]
        json: bool,
    },
    /// Begin to move nothing more; what is being copied is finished
    Pause,
    /// Go on
    Resume,
    /// Turn back; slots that moved already stay where they are
    Abort,
}

/// Does it.
pub fn run(place: &Place, command: Command) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        match command {
            Command::Status { watch, json } => status(&connection, watch, json).await,
            Command::Pause => pause(&connection, true).await,
            Command::Resume => pause(&connection, false).await,
            Command::Abort => abort(&connection).await,
        }
    })
}

// ------------------------------------------------------------------------------------------------
// What the state alone tells (`petal status`, `petal server list`).

/// One sentence for each map that moves or is to move.
pub fn sentences(state: &State) -> Vec<String> {
    let maps = state.reconfigurations.keys().chain(&state.replan);
    let maps: std::collections::BTreeSet<GmapId> = maps.copied().collect();
    let sentence = |gmap: &GmapId| {
        let waits: Vec<String> =
            waits_for(state, *gmap).iter().filter(|w| !is_usual(w)).map(|w| why(state, w, None)).collect();
        let waits = if waits.is_empty() { String::new() } else { format!(": {}", waits.join("; ")) };
        match state.reconfigurations.get(gmap) {
            None => format!("Data of {gmap} is to be moved{waits}."),
            Some(under_way) => {
                let (moved, fenced, all) = counts(under_way);
                let back = if under_way.turns_back { ", turning back" } else { "" };
                format!("Moving data of {gmap}: {moved} of {all} slots, {fenced} under way{back}{waits}.")
            }
        }
    };
    maps.iter().map(sentence).collect()
}

/// The same for programs.
pub fn json(state: &State) -> Value {
    let all = state.reconfigurations.iter().map(|(gmap, r)| {
        json!({
            "map": gmap.to_string(),
            "slots": r.moved as usize + r.moves.len(),
            "moved": r.moved,
            "under_way": r.fenced.len(),
            "left": r.moves.len() - r.fenced.len(),
            "paused": r.paused,
            "turns_back": r.turns_back,
            "waits": waits_for(state, *gmap).iter().map(|w| wait_json(state, w)).collect::<Vec<_>>(),
        })
    });
    json!({ "moving": all.collect::<Vec<_>>(), "to_plan": state.replan.len() })
}

/// Slots that moved, are fenced, and all.
fn counts(under_way: &Reconfiguration) -> (u64, u64, u64) {
    let moved = u64::from(under_way.moved);
    (moved, under_way.fenced.len() as u64, moved + under_way.moves.len() as u64)
}

/// What every move waits for.
fn is_usual(wait: &Wait) -> bool {
    matches!(wait, Wait::Copying(..))
}

fn names(servers: &[ServerId]) -> String {
    servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn slots(count: usize) -> String {
    crate::redundancy::slots(count as u64)
}

fn is_down(state: &State, server: ServerId) -> bool {
    state.servers.get(&server).is_none_or(|s| s.down)
}

/// What it waits for, and what to do about it. Known of servers: what they hold.
fn why(state: &State, wait: &Wait, held: Option<&BTreeMap<ServerId, Held>>) -> String {
    let is_full = |server: &ServerId| held.and_then(|all| all.get(server)).is_some_and(|h| h.is_full);
    match wait {
        Wait::ToPlan(away) => {
            format!("it begins when {} answers; start what is down, or drain what does not come back", names(away))
        }
        Wait::Paused => "paused (`petal reconfigure resume`)".into(),
        Wait::Target(server, count) if is_down(state, *server) => {
            format!("waits for {server}, which is down and is to have {}; start it, or drain it", slots(*count))
        }
        Wait::Target(server, count) => {
            format!("waits for {server}, which is suspected and is to have {}", slots(*count))
        }
        Wait::Source(count, have) => format!("waits for {}, which alone have {}", names(have), slots(*count)),
        Wait::Copying(server, count) if is_full(server) => {
            let count = slots(*count);
            format!("{server} is full, and {count} are to be copied there; make room, or `petal reconfigure abort`")
        }
        Wait::Copying(server, count) => format!("{} being copied to {server}", slots(*count)),
    }
}

fn wait_json(state: &State, wait: &Wait) -> Value {
    let (kind, servers, slots) = match wait {
        Wait::ToPlan(away) => ("servers_away", away.clone(), None),
        Wait::Paused => ("paused", Vec::new(), None),
        Wait::Target(server, slots) if is_down(state, *server) => ("target_down", vec![*server], Some(*slots)),
        Wait::Target(server, slots) => ("target_suspected", vec![*server], Some(*slots)),
        Wait::Source(slots, have) => ("source_away", have.clone(), Some(*slots)),
        Wait::Copying(server, slots) => ("copying", vec![*server], Some(*slots)),
    };
    json!({ "why": kind, "servers": servers.iter().map(ToString::to_string).collect::<Vec<_>>(), "slots": slots })
}

// ------------------------------------------------------------------------------------------------
// What it takes the servers to tell.

/// What is known of all that moves.
struct Report {
    state: State,
    held: BTreeMap<ServerId, Held>,
    rates: Rates,
}

/// Slots that moved lately: index of the command, its age in milliseconds, what the log says of it.
#[derive(Default)]
struct Rates(BTreeMap<StateIndex, (u64, String)>);

impl Rates {
    /// Of the logs of several servers: who was there the longest knows how long ago it was.
    fn of(logs: &[Vec<LogLine>]) -> Rates {
        let mut lines = BTreeMap::<StateIndex, (u64, String)>::new();
        for line in logs.iter().flatten().filter(|line| line.refused.is_none()) {
            let Some(age) = line.age_millis else { continue };
            let known = lines.entry(line.index).or_insert_with(|| (age, line.text.clone()));
            known.0 = known.0.max(age);
        }
        Rates(lines)
    }

    /// Slots of a map that moved in a second, lately; `None` if none did.
    fn slots_per_second(&self, gmap: GmapId, begun: StateIndex) -> Option<f64> {
        let moved = |text: &str| -> Option<u64> {
            text.strip_suffix(&format!(" of {gmap} moved"))?.split(' ').next()?.parse().ok()
        };
        let lately = self.0.range(begun..).filter(|(_, (age, _))| *age <= RATE_OF);
        let count: u64 = lately.filter_map(|(_, (_, text))| moved(text)).sum();
        let time = self.0.get(&begun).map_or(RATE_OF, |(age, _)| (*age).min(RATE_OF));
        (count > 0).then(|| count as f64 * 1000.0 / time.max(1) as f64)
    }
}

/// How long what moves will take yet, and its bytes.
struct Left {
    bytes: u64,
    slots_per_second: Option<f64>,
    seconds: Option<u64>,
}

impl Report {
    async fn of(connection: &Connection) -> Result<Report> {
        let state = connection.state().await?;
        if state.reconfigurations.is_empty() && state.replan.is_empty() {
            return Ok(Report { state, held: BTreeMap::new(), rates: Rates::default() });
        }
        let held = held(connection, &state).await?;
        let there = held.iter().filter(|(_, h)| h.capacity > 0).map(|(id, _)| *id);
        let logs = logs(&connection.to_all(&state).await?, there).await;
        Ok(Report { rates: Rates::of(&logs), held, state })
    }

    fn is_over(&self) -> bool {
        self.state.reconfigurations.is_empty() && self.state.replan.is_empty()
    }

    fn left(&self, gmap: GmapId, under_way: &Reconfiguration) -> Left {
        let copies = |(number, target): (&u32, &Vec<ServerId>)| {
            let slot = self.state.slot(SlotId { gmap, slot: *number })?;
            let to_copy = target.iter().filter(|s| !slot.member(**s).is_some_and(|m| m.in_sync)).count() as u64;
            Some(to_copy * copy_size(&slot.in_sync().collect::<Vec<_>>(), &self.held))
        };
        let bytes = under_way.moves.iter().filter_map(copies).sum();
        let rate = self.rates.slots_per_second(gmap, under_way.begun).filter(|_| !under_way.paused);
        let seconds = rate.map(|rate| (under_way.moves.len() as f64 / rate).ceil() as u64);
        Left { bytes, slots_per_second: rate, seconds: seconds.filter(|_| !under_way.turns_back) }
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (gmap, under_way) in &self.state.reconfigurations {
            let (moved, fenced, all) = counts(under_way);
            let Left { bytes, seconds, .. } = self.left(*gmap, under_way);
            let back = if under_way.turns_back { ", turning back" } else { "" };
            lines.push(format!("Moving data of {gmap}: {}{back}", bar(moved, all)));
            let time = seconds.map_or_else(String::new, |s| format!(", {}", output::duration(s)));
            lines.push(format!(
                "  {moved} of {all} slots moved, {fenced} fenced, {} to begin; left: about {}{time}",
                all - moved - fenced,
                output::size(bytes)
            ));
            let waits = waits_for(&self.state, *gmap);
            lines.extend(waits.iter().map(|w| format!("  {}", why(&self.state, w, Some(&self.held)))));
        }
        for gmap in self.state.replan.iter().filter(|g| !self.state.reconfigurations.contains_key(g)) {
            let waits = waits_for(&self.state, *gmap);
            let waits: Vec<String> = waits.iter().map(|w| why(&self.state, w, None)).collect();
            let waits = if waits.is_empty() { "it is being planned".into() } else { waits.join("; ") };
            lines.push(format!("Data of {gmap} is to be moved: {waits}."));
        }
        if lines.is_empty() {
            lines.push("Nothing is to be moved.".into());
            lines.extend(self.turned_back());
        }
        lines
    }

    /// Drained servers that hold something although nothing moves.
    fn turned_back(&self) -> Vec<String> {
        let holds = |server: ServerId| self.state.slots_of_server(server).count();
        let drained = self.state.servers.iter().filter(|(_, s)| s.drained).map(|(id, _)| (*id, holds(*id)));
        let left = drained.filter(|(_, count)| *count > 0);
        let sentence = |(server, count)| {
            let count = slots(count);
            format!(
                "{server} was to be drained and holds {count}: `petal server drain {server}` goes on, `fill` undoes it."
            )
        };
        left.map(sentence).collect()
    }

    fn json(&self) -> Value {
        let mut value = json(&self.state);
        for (one, (gmap, under_way)) in
            value["moving"].as_array_mut().into_iter().flatten().zip(&self.state.reconfigurations)
        {
            let left = self.left(*gmap, under_way);
            one["bytes_left"] = left.bytes.into();
            one["slots_per_second"] = left.slots_per_second.into();
            one["seconds_left"] = left.seconds.into();
            for wait in one["waits"].as_array_mut().into_iter().flatten() {
                let full = self.held.iter().filter(|(_, h)| h.is_full).map(|(id, _)| id.to_string());
                if wait["why"] == "copying" && full.into_iter().any(|s| wait["servers"][0] == s.as_str()) {
                    wait["why"] = "target_full".into();
                }
            }
        }
        value["waits_to_plan"] = self
            .state
            .replan
            .iter()
            .filter(|g| !self.state.reconfigurations.contains_key(g))
            .flat_map(|g| waits_for(&self.state, *g))
            .map(|w| wait_json(&self.state, &w))
            .collect();
        value
    }
}

/// Bytes in a second that move at present, if anything does.
pub(super) async fn bytes_per_second(connection: &Connection) -> Result<Option<f64>> {
    let report = Report::of(connection).await?;
    let rate = |(gmap, under_way): (&GmapId, &Reconfiguration)| {
        let left = report.left(*gmap, under_way);
        Some(left.slots_per_second? * left.bytes as f64 / under_way.moves.len() as f64)
    };
    let all: f64 = report.state.reconfigurations.iter().filter_map(rate).sum();
    Ok((all > 0.0).then_some(all))
}

fn bar(done: u64, of: u64) -> String {
    let full = (done * BAR).checked_div(of).unwrap_or(BAR);
    let percent = (done * 100).checked_div(of).unwrap_or(100);
    format!("[{}{}] {percent} %", "#".repeat(full as usize), ".".repeat((BAR - full) as usize))
}

async fn status(connection: &Connection, watch: bool, json: bool) -> Result<()> {
    let redraws = watch && !json && std::io::stdout().is_terminal();
    let mut drawn = 0;
    loop {
        let report = Report::of(connection).await?;
        if json {
            let value = report.json();
            if watch { println!("{value}") } else { output::print_json(&value)? }
        } else {
            if redraws && drawn > 0 {
                let _ = write!(std::io::stdout(), "\x1b[{drawn}A\x1b[J");
            }
            let lines = report.lines();
            drawn = lines.len();
            lines.iter().for_each(|line| println!("{line}"));
        }
        if !watch || report.is_over() {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

// ------------------------------------------------------------------------------------------------
// Orders.

/// Gives the order about all that is under way. What ended meanwhile needs none.
async fn order(connection: &Connection, state: &State, make: impl Fn(GmapId) -> Change) -> Result<()> {
    ensure!(
        !state.reconfigurations.is_empty(),
        "nothing is under way; `petal reconfigure status` shows what is to come"
    );
    for gmap in state.reconfigurations.keys().copied() {
        match connection.execute(make(gmap)).await {
            Err(error) if connect::refusal(&error) == Some(&CommandError::Overtaken) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

async fn pause(connection: &Connection, paused: bool) -> Result<()> {
    let state = connection.state().await?;
    order(connection, &state, |gmap| Change::PauseReconfiguration { gmap, paused }).await
}

async fn abort(connection: &Connection) -> Result<()> {
    let state = connection.state().await?;
    order(connection, &state, |gmap| Change::AbortReconfiguration { gmap }).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(index: StateIndex, age: Option<u64>, command: &Change) -> LogLine {
        LogLine { index, text: command.to_string(), refused: None, age_millis: age }
    }

    #[test]
    fn the_rate_is_that_of_the_slots_that_moved_in_the_last_minute() {
        let gmap = GmapId(3);
        let moved = |count: u32| Change::Moved { gmap, slots: (0..count).map(|n| (n, 5)).collect() };
        let begun = Change::Reconfigure { gmap, planned_from: 3, moves: Vec::new(), more: false };
        let other = Change::Moved { gmap: GmapId(4), slots: vec![(1, 5)] };
        let first = vec![line(10, Some(90_000), &begun), line(11, Some(80_000), &moved(40)), line(12, None, &moved(5))];
        let second =
            vec![line(12, Some(30_000), &moved(5)), line(13, Some(9_000), &moved(1)), line(14, Some(1), &other)];
        let rates = Rates::of(&[first, second]);
        assert_eq!(rates.slots_per_second(gmap, 10), Some(0.1), "6 in 60 s");
        let rates = Rates::of(&[vec![line(10, Some(2_000), &begun), line(12, Some(1_000), &moved(5))]]);
        assert_eq!(rates.slots_per_second(gmap, 10), Some(2.5), "it began 2 s ago");
        assert_eq!(rates.slots_per_second(gmap, 13), None, "of an earlier one");
        let refused = LogLine { refused: Some("overtaken".into()), ..line(12, Some(1_000), &moved(5)) };
        assert_eq!(Rates::of(&[vec![refused]]).slots_per_second(gmap, 10), None);
    }

    #[test]
    fn a_bar_is_as_long_whatever_is_done() {
        assert_eq!(bar(0, 7), format!("[{}] 0 %", ".".repeat(30)));
        assert_eq!(bar(1, 3), format!("[{}{}] 33 %", "#".repeat(10), ".".repeat(20)));
        assert_eq!(bar(7, 7), format!("[{}] 100 %", "#".repeat(30)));
    }
}
