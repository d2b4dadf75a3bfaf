//! `petal history`: clients that write and read the same few blocks, and a record of what each of them
//! saw, for a checker of linearizability (docs/testing.md has the format).

use crate::connect::{self, Connection};
use crate::holder;
use crate::place::Place;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use petal::global_state::Attachment;
use petal_io::client::Disk;
use serde_json::json;
use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use stdx::Prng;

/// Bytes that one operation is about.
const BLOCK: u64 = 4096;

/// Places of the shared blocks: in eight groups 5 MiB apart. A slot is 1 MiB wide and its server is its number
/// modulo the count of servers, so five apart visits every server of a cluster of four; four apart would not.
const GROUPS: u64 = 8;
const APART: u64 = 5 << 20;

fn offset_of(block: u64) -> u64 {
    block % GROUPS * APART + block / GROUPS * BLOCK
}

/// `petal history`
#[derive(clap::Args, Clone)]
#[command(after_help = "\
Example:
  petal disk create judged 1GiB
  petal history judged --clients 4 --seconds 60 --out history.jsonl

Overwrites some blocks of the first 40 MiB. One line of JSON for each operation that was answered or left open:
  {\"client\":2,\"op\":\"write\",\"block\":5,\"value\":8589934599,\"invoke\":1200,\"return\":1830}
Times are in microseconds; `return` is null for an operation without an answer, which may have happened or not.
Values are written once, so a read tells which write it saw; 0 is a block of zeros.")]
pub struct Arguments {
    /// The disk
    disk: String,
    /// Clients, each with connections of its own
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    clients: u64,
    /// Operations that each client keeps in flight
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=16))]
    depth: u64,
    /// Blocks that they share
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=8192))]
    blocks: u64,
    /// For so long
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Where the record goes
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

struct Recorder {
    start: Instant,
    end: Instant,
    blocks: u64,
    file: RefCell<std::io::BufWriter<std::fs::File>>,
    operations: RefCell<(u64, u64)>,
}

/// Puts the load on, and writes the record.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let file =
        std::fs::File::create(&arguments.out).with_context(|| format!("cannot write {}", arguments.out.display()))?;
    let place = place.clone();
    connect::block_on(async move {
        let start = Instant::now();
        let recorder = Rc::new(Recorder {
            start,
            end: start + Duration::from_secs(arguments.seconds),
            blocks: arguments.blocks,
            file: RefCell::new(std::io::BufWriter::new(file)),
            operations: RefCell::new((0, 0)),
        });
        let mut disks = Vec::new();
        for _ in 0..arguments.clients {
            let connection = Connection::open(&place).await?;
            let holder = holder::of_process("petal history");
            disks.push(connection.attach(&arguments.disk, Attachment::Shared, &holder, false).await?);
        }
        let needed = GROUPS * APART;
        ensure!(disks[0].size() >= needed, "{} is smaller than {} MiB", arguments.disk, needed >> 20);
        // Whatever was there before is not in the record.
        for block in 0..arguments.blocks {
            disks[0].zero(offset_of(block), BLOCK).await?;
        }
        let mut tasks = tokio::task::JoinSet::new();
        for (client, disk) in (1..).zip(&disks) {
            for lane in 0..arguments.depth {
                let (recorder, disk) = (recorder.clone(), disk.clone());
                tasks.spawn_local(async move { recorder.work(client, lane, &disk).await });
            }
        }
        while let Some(result) = tasks.join_next().await {
            result??;
        }
        for disk in &disks {
            disk.detach().await?;
        }
        recorder.file.borrow_mut().flush()?;
        let (answered, open) = *recorder.operations.borrow();
        println!("{answered} operations were answered, {open} left open");
        Ok(())
    })
}

impl Recorder {
    fn now(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    async fn work(&self, client: u64, lane: u64, disk: &Disk) -> Result<()> {
        let mut prng = Prng::new(u64::from(std::process::id()) << 16 | client << 8 | lane);
        let mut written = 0;
        while Instant::now() < self.end {
            let block = prng.below(self.blocks);
            let invoke = self.now();
            if prng.chance(1, 2) {
                written += 1;
                let value = client << 48 | lane << 40 | written;
                let bytes: Vec<u8> = value.to_le_bytes().repeat(BLOCK as usize / 8);
                let done = disk.write(offset_of(block), Bytes::from(bytes)).await.is_ok();
                self.record(client, "write", block, value, invoke, done)?;
            } else if let Ok(pieces) = disk.read(offset_of(block), BLOCK).await {
                let bytes = pieces.concat();
                let value = u64::from_le_bytes(bytes[..8].try_into().expect("a block has eight bytes"));
                // A mixture of two writes is what no write ever wrote.
                let is_whole = bytes.chunks(8).all(|word| word == value.to_le_bytes());
                self.record(client, "read", block, if is_whole { value } else { u64::MAX - 1 }, invoke, true)?;
            }
        }
        Ok(())
    }

    fn record(&self, client: u64, op: &str, block: u64, value: u64, invoke: u64, done: bool) -> Result<()> {
        let end = done.then(|| self.now());
        let line = json!({"client": client, "op": op, "block": block, "value": value, "invoke": invoke, "return": end});
        let mut counts = self.operations.borrow_mut();
        if done {
            counts.0 += 1
        } else {
            counts.1 += 1
        }
        writeln!(self.file.borrow_mut(), "{line}").context("cannot write the record")
    }
}
