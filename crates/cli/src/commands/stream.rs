//! `petal stream`: looks at backup streams, without a cluster.

use crate::output;
use anyhow::{Context, Result, bail};
use petal_stream::{Header, Kind, Mark, Place, Reader, StreamError, Summary};
use serde_json::{Value, json};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

// The crate of the stream knows nothing of the core; they speak of the same blocks.
const _: () = assert!(petal_stream::BLOCK_SIZE as u64 == petal::ids::BLOCK_SIZE);
const _: () = assert!(petal_stream::ELEMENT_SIZE as u64 == petal::ids::ELEMENT_SIZE);
const _: () = assert!(petal_stream::BLOCKS_PER_ELEMENT == petal::ids::BLOCKS_PER_ELEMENT);

/// Time between two lines about how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// `petal stream`
#[derive(clap::Subcommand)]
pub enum Command {
    /// Check that a backup stream is whole, down to the last bit
    #[command(after_help = "\
Examples:
  petal stream verify vol0-monday.petal
  petal stream verify vol0-monday.petal --json
  ssh backup cat vol0-monday.petal | petal stream verify -

Needs no cluster. Reads everything, and says which disk and which state of it the stream holds; of
an increment, on top of which state it goes. If the stream was cut or damaged, says at which byte
of it, and of the disk. Long ones tell on standard error every 10 seconds how far they are.

Exit code 1 if the stream is not whole.")]
    Verify {
        /// The stream; - is standard input
        #[arg(value_name = "FILE|-")]
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Does it.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Verify { file, json } => verify(&file, json),
    }
}

fn verify(path: &Path, json: bool) -> Result<()> {
    let (input, name) = open(path)?;
    let result = Reader::open(input).and_then(|reader| reader.drain(progress(&name)));
    match (&result, json) {
        (Ok(summary), true) => output::print_json(&summary_json(summary))?,
        (Ok(summary), false) => print_summary(summary),
        (Err(refused), true) => output::print_json(&refused_json(refused))?,
        (Err(_), false) => {}
    }
    match result {
        Ok(_) => Ok(()),
        Err(refused) => bail!("{name}: {refused}"),
    }
}

/// The stream, and what it is called in sentences.
fn open(path: &Path) -> Result<(Box<dyn Read>, String)> {
    if path == Path::new("-") {
        let input = std::io::stdin();
        if input.is_terminal() {
            bail!("standard input is a terminal; name a file, or send a stream through a pipe");
        }
        return Ok((Box::new(input.lock()), "standard input".into()));
    }
    let name = path.display().to_string();
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {name}"))?;
    Ok((Box::new(file), name))
}

/// Tells how far it is, now and then.
fn progress(name: &str) -> impl FnMut(&Mark) {
    let (name, mut told) = (name.to_string(), Instant::now());
    move |mark| {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let byte = |element: u64| (element + 1) * petal_stream::ELEMENT_SIZE as u64;
            let at = mark.last_element.map_or_else(String::new, |e| format!(", {} of the disk", output::size(byte(e))));
            eprintln!("{name}: good up to {}{at}", output::size(mark.offset));
        }
    }
}

fn print_summary(summary: &Summary) {
    let Summary { header, counts, marks, bytes, hash } = summary;
    let Header { disk, snapshot, size, stripe_unit, copies, .. } = header;
    match &header.kind {
        Kind::Full => println!("stream   {disk}@{snapshot}, everything"),
        Kind::Incremental { from_snapshot, .. } => {
            println!("stream   {disk}@{snapshot}, what changed since {disk}@{from_snapshot}");
        }
    }
    println!("state    {}", header.state());
    if let Some(parent) = header.parent() {
        println!("on top   {parent}");
    }
    println!("disk     {}, stripe unit {}, copies: {copies}", output::size(*size), output::size(*stripe_unit));
    println!("holds    {counts}");
    println!("bytes    {bytes} ({}), {marks} check marks", output::size(*bytes));
    println!("hash     {hash}");
    println!("The stream is whole.");
}

fn summary_json(summary: &Summary) -> Value {
    let Summary { header, counts, marks, bytes, hash } = summary;
    let point = |point: petal_stream::Point| json!({"lineage": point.lineage, "epoch": point.epoch});
    let from = match &header.kind {
        Kind::Full => Value::Null,
        Kind::Incremental { from, from_snapshot } => json!({"point": point(*from), "snapshot": from_snapshot}),
    };
    json!({
        "whole": true,
        "kind": if from.is_null() { "full" } else { "incremental" },
        "cluster": format!("{:032x}", header.cluster),
        "family": header.family,
        "disk": header.disk,
        "to": {"point": point(header.to), "snapshot": header.snapshot},
        "from": from,
        "size": header.size,
        "stripe_unit": header.stripe_unit,
        "copies": header.copies,
        "elements": counts.elements,
        "data_blocks": counts.data_blocks,
        "zero_blocks": counts.zero_blocks,
        "marks": marks,
        "bytes": bytes,
        "hash": hash.to_string(),
    })
}

fn refused_json(refused: &StreamError) -> Value {
    let after = match refused.place {
        Place::After(element) => Some(element),
        Place::Header | Place::BeforeFirst => None,
    };
    json!({
        "whole": false,
        "offset": refused.offset,
        "after_element": after,
        "fault": refused.fault.to_string(),
    })
}
