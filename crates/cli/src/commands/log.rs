//! `petal log`: what the cluster has decided lately, in words.

use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, ensure};
use petal::ids::ServerId;
use petal::message::LogLine;
use serde_json::{Value, json};

/// `petal log`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal log                  the last 40 commands, oldest first
  petal log -n 1000 --json
  petal log --server s2      as s2 knows them

A server keeps the last 1,024 commands in memory. A state index is the cluster's one clock: every command
counts, those that changed nothing too. Times are since the server that was asked knows them: one that was
away learnt later than others what had happened, and of what was before it started it tells none.")]
pub struct Arguments {
    /// How many at most
    #[arg(short = 'n', long, default_value_t = 40)]
    lines: usize,
    /// Ask this server
    #[arg(long, value_parser = output::parse_server)]
    server: Option<ServerId>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let (place, server) = (place.clone(), arguments.server);
    let mut lines = connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        let connection = match server {
            Some(asked) => {
                let state = connection.state().await?;
                let known = state.servers.contains_key(&asked);
                ensure!(known, "there is no server {asked}; `petal status` shows the servers");
                connection.to_all(&state).await?
            }
            None => connection,
        };
        connection.log(server).await
    })?;
    let lines = lines.split_off(lines.len().saturating_sub(arguments.lines));
    if arguments.json {
        let line = |l: &LogLine| json!({"index": l.index, "text": l.text, "refused": l.refused, "age_seconds": l.age_millis.map(|age| age as f64 / 1000.0)});
        return output::print_json(&Value::Array(lines.iter().map(line).collect()));
    }
    for same in lines.chunk_by(|a, b| a.text == b.text && a.refused == b.refused) {
        let LogLine { index, text, refused, age_millis } = &same[0];
        let why = refused.as_ref().map_or_else(String::new, |why| format!(" (no effect: {why})"));
        let times = if same.len() > 1 { format!(", {} times", same.len()) } else { String::new() };
        let age = age_millis.map_or_else(String::new, |age| format!("{} ago", output::duration(age / 1000)));
        println!("{index:>8}  {age:>16}  {text}{times}{why}");
    }
    Ok(())
}
