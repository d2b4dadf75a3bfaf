//! `petal scrub`: every server reads every block that it stores, now, and repairs what is bad.
//!
//! The servers do it; this command only asks and watches. So it may be ended at any time, and asked again to watch.

use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Context, Result, bail};
use petal::ids::ServerId;
use petal::message::{ScrubOrder, ScrubRound, ScrubStatus};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How long a server may take to answer. (It may just be starting.)
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// A server that does not answer for so long is not waited for.
const AWAY_LIMIT: Duration = Duration::from_secs(30);

/// `petal scrub`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal scrub                  all servers read everything now; waits, and shows how far they are
  petal scrub --server s2      only this one
  petal scrub --no-wait        only begin it; `petal status` shows how far it is
  petal scrub --slow           what was begun goes on at the pace of the background

A round reads each block of a server's disks against its checksum; what is bad is fetched from another copy and
written to another place. It gives way to clients. In the background there is a round every two weeks
(`scrub_hours` in a server's config file); this begins one at once, from the beginning.
Ctrl-C ends the watching, not the round. A round that goes on already is joined.

Exit code 1 if a bad block could not be repaired, or a server could not be asked.")]
pub struct Arguments {
    /// Only this server (again for more)
    #[arg(long, value_parser = output::parse_server)]
    server: Vec<ServerId>,
    /// Do not wait for the end
    #[arg(long)]
    no_wait: bool,
    /// Let the present rounds go on at the pace of the background
    #[arg(long, conflicts_with = "no_wait")]
    slow: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move { scrub(&place, &arguments).await })
}

async fn scrub(place: &Place, arguments: &Arguments) -> Result<()> {
    let connection = Connection::open(place).await?;
    let state = connection.state().await?;
    if let Some(unknown) = arguments.server.iter().find(|s| !state.servers.contains_key(s)) {
        bail!("there is no server {unknown}; `petal status` shows the servers");
    }
    let connection = connection.to_all(&state).await?;
    let wanted = |s: &ServerId| arguments.server.is_empty() || arguments.server.contains(s);
    let order = if arguments.slow { ScrubOrder::Slow } else { ScrubOrder::Begin };
    let mut rounds = BTreeMap::new();
    let mut failed = Vec::new();
    for server in state.servers.keys().copied().filter(wanted) {
        match connection.scrub(server, order, ANSWER_LIMIT).await {
            Ok(status) => {
                rounds.insert(server, Watched::of(status));
            }
            // The others begin all the same.
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    if !arguments.no_wait && !arguments.slow {
        watch(&connection, &mut rounds, !arguments.json).await?;
    }
    tell(&rounds, arguments)?;
    let left: u64 = rounds.values().map(|w| w.round.bad - w.round.repaired).sum();
    let away = rounds.iter().filter_map(|(server, w)| Some(format!("{server}: {}", w.lost.as_ref()?)));
    failed.extend(away);
    if left > 0 {
        failed.push(format!("{left} bad blocks could not be repaired: no good copy answered; see `petal status`"));
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// A server's round that is waited for.
struct Watched {
    round: ScrubRound,
    is_full: bool,
    /// Seconds that it takes in the background.
    period: u64,
    /// Why it is not waited for any more.
    lost: Option<String>,
    began: Instant,
    answered: Instant,
    /// Elements that had been looked at when the watching began.
    first: u64,
}

impl Watched {
    fn of(status: ScrubStatus) -> Watched {
        let now = Instant::now();
        let round = status.present.or(status.last).unwrap_or_default();
        let (is_full, period) = (status.is_full, status.period_seconds);
        Watched { first: round.elements, is_full, period, lost: None, began: now, answered: now, round }
    }

    fn is_over(&self) -> bool {
        self.round.ended.is_some() || self.lost.is_some()
    }

    fn follow(&mut self, status: ScrubStatus) {
        self.answered = Instant::now();
        let number = self.round.number;
        let found = [status.present, status.last].into_iter().flatten().find(|r| r.number == number);
        match found {
            Some(round) => self.round = round,
            None => self.lost = Some("it has begun a new round since; ask again".into()),
        }
    }

    /// Seconds left at the rate so far.
    fn left(&self) -> Option<u64> {
        let done = self.round.elements.checked_sub(self.first).filter(|n| *n > 0)?;
        let to_do = self.round.of.saturating_sub(self.round.elements);
        Some((self.began.elapsed().as_secs_f64() * to_do as f64 / done as f64) as u64)
    }
}

/// Until all are over.
async fn watch(connection: &Connection, rounds: &mut BTreeMap<ServerId, Watched>, show: bool) -> Result<()> {
    let show = show && std::io::stderr().is_terminal();
    while rounds.values().any(|w| !w.is_over()) {
        tokio::time::sleep(LOOK_EVERY).await;
        for (server, watched) in rounds.iter_mut().filter(|(_, w)| !w.is_over()) {
            match connection.scrub(*server, ScrubOrder::Tell, ANSWER_LIMIT).await {
                Ok(status) => watched.follow(status),
                // It may be starting again, and goes on then.
                Err(error) if watched.answered.elapsed() > AWAY_LIMIT => watched.lost = Some(format!("{error:#}")),
                Err(_) => {}
            }
        }
        if show {
            let sum = |f: fn(&ScrubRound) -> u64| rounds.values().map(|w| f(&w.round)).sum::<u64>();
            let left = rounds.values().filter(|w| !w.is_over()).filter_map(Watched::left).max();
            let left = left.map_or_else(String::new, |s| format!(", about {} left", output::duration(s)));
            let percent = percent(sum(|r| r.elements.min(r.of)), sum(|r| r.of));
            let bad = sum(|r| r.bad);
            let mut out = std::io::stderr().lock();
            write!(out, "\r\x1b[K{percent} %{left}, {bad} bad blocks (Ctrl-C ends the watching, not the round)")
                .and_then(|()| out.flush())
                .context("cannot write to the terminal")?;
        }
    }
    if show {
        eprint!("\r\x1b[K");
    }
    Ok(())
}

fn percent(done: u64, of: u64) -> u64 {
    (done.min(of) * 100).checked_div(of).unwrap_or(100)
}

fn tell(rounds: &BTreeMap<ServerId, Watched>, arguments: &Arguments) -> Result<()> {
    if arguments.json {
        let server = |(server, w): (&ServerId, &Watched)| {
            let mut value = round_json(&w.round);
            value["server"] = server.to_string().into();
            value["seconds_left"] = w.left().filter(|_| !w.is_over()).into();
            value
        };
        return output::print_json(&Value::Array(rounds.iter().map(server).collect()));
    }
    for (server, w) in rounds {
        let ScrubRound { blocks, bad, repaired, elements, of, number, .. } = w.round;
        if w.round.ended.is_some() {
            println!("{server}: {blocks} blocks read, {bad} bad, {repaired} repaired");
        } else if number == 0 {
            println!("{server}: no round goes on");
        } else {
            let pace = match (arguments.slow || !w.is_full, w.period) {
                (false, _) => "at full rate".into(),
                (true, 0) => "stands still (scrub_hours is 0)".into(),
                (true, period) => format!("in the background, {} for a round", output::duration(period)),
            };
            println!("{server}: round {number}: {} %, {pace}", percent(elements, of));
        }
    }
    Ok(())
}

/// A round for programs.
pub fn round_json(round: &ScrubRound) -> Value {
    json!({
        "round": round.number, "began": round.began, "ended": round.ended, "elements": round.elements,
        "of": round.of, "blocks": round.blocks, "bad": round.bad, "repaired": round.repaired,
    })
}

/// A server's scrub for programs.
pub fn json(status: &ScrubStatus) -> Value {
    json!({
        "present": status.present.as_ref().map(round_json),
        "at_full_rate": status.is_full,
        "last": status.last.as_ref().map(round_json),
        "period_seconds": status.period_seconds,
    })
}

/// All servers' scrubs in one or two sentences.
pub fn sentences<'a>(all: impl Iterator<Item = (ServerId, &'a ScrubStatus)>, now: u64) -> Vec<String> {
    let all: Vec<(ServerId, &ScrubStatus)> = all.collect();
    let mut lines = Vec::new();
    if all.is_empty() {
        return lines;
    }
    let ended = all.iter().map(|(server, s)| (s.last.as_ref().and_then(|r| r.ended), *server));
    let mut line = match ended.min() {
        Some((Some(ended), server)) if all.len() > 1 => {
            format!("Scrub: last ended {} ago, {server}'s", output::duration(now.saturating_sub(ended)))
        }
        Some((Some(ended), _)) => format!("Scrub: last ended {} ago", output::duration(now.saturating_sub(ended))),
        _ => "Scrub: not everything has been read once yet".into(),
    };
    let present: Vec<&ScrubRound> = all.iter().filter_map(|(_, s)| s.present.as_ref()).collect();
    if !present.is_empty() {
        let done = present.iter().map(|r| r.elements.min(r.of)).sum();
        let percent = percent(done, present.iter().map(|r| r.of).sum());
        let full = if all.iter().any(|(_, s)| s.is_full) { " at full rate" } else { "" };
        line += &format!("; the present rounds are at {percent} %{full}");
    }
    lines.push(line + ".");
    for (server, status) in all {
        for (which, round) in [("the present", &status.present), ("the last", &status.last)] {
            let Some(ScrubRound { bad, repaired, .. }) = round.as_ref().filter(|r| r.bad > 0) else { continue };
            lines.push(format!("  {server} met {bad} bad blocks in {which} round, and repaired {repaired}."));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(last: Option<(u64, u64, u64)>, present: Option<(u64, u64)>) -> ScrubStatus {
        let last = last.map(|(ended, bad, repaired)| ScrubRound {
            number: 1,
            ended: Some(ended),
            bad,
            repaired,
            ..ScrubRound::default()
        });
        let present = present.map(|(elements, of)| ScrubRound { number: 2, elements, of, ..ScrubRound::default() });
        ScrubStatus { present, is_full: false, last, period_seconds: 1_209_600 }
    }

    #[test]
    fn the_oldest_last_round_is_told_and_what_was_bad() {
        let (a, b) = (status(Some((100, 0, 0)), Some((10, 40))), status(Some((40, 3, 2)), None));
        let told = sentences([(ServerId(1), &a), (ServerId(2), &b)].into_iter(), 100 + 3600);
        assert_eq!(told[0], "Scrub: last ended 1 h 1 min ago, s2's; the present rounds are at 25 %.");
        assert_eq!(told[1], "  s2 met 3 bad blocks in the last round, and repaired 2.");
        let told = sentences([(ServerId(1), &status(None, Some((0, 0)))), (ServerId(2), &b)].into_iter(), 100);
        assert_eq!(told[0], "Scrub: not everything has been read once yet; the present rounds are at 100 %.");
    }
}
