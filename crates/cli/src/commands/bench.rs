//! `petal bench`: a load on a disk through the client library, without NBD in between.

use crate::connect::{self, Connection, Disk};
use crate::holder;
use crate::output;
use crate::place::Place;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use petal::global_state::Attachment;
use serde_json::json;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use stdx::Prng;

/// `petal bench`
#[derive(clap::Args, Clone)]
#[command(after_help = "\
Examples:
  petal disk create test 4GiB && petal bench test --write --depth 32
  petal bench test --read --block 64KiB --depth 8 --seconds 30 --json

Writes overwrite the disk. For figures that can be compared with other systems see docs/performance.md.")]
pub struct Arguments {
    /// The disk
    disk: String,
    /// Write random data to random places
    #[arg(long, conflicts_with = "read")]
    write: bool,
    /// Read from random places (default)
    #[arg(long)]
    read: bool,
    /// Bytes per request
    #[arg(long, default_value = "4KiB", value_parser = output::parse_size)]
    block: u64,
    /// Requests in flight
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: u32,
    /// For so long
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// One after the other from the beginning, instead of at random
    #[arg(long)]
    sequential: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Puts the load on.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    ensure!(arguments.block > 0 && arguments.block <= 32 << 20, "requests have 1 byte to 32 MiB");
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        let mode = if arguments.write { Attachment::Exclusive } else { Attachment::ReadOnly };
        let disk = connection.attach(&arguments.disk, mode, &holder::of_process("petal bench"), false).await?;
        ensure!(disk.size() >= arguments.block, "{} is smaller than one request", arguments.disk);
        let result = measure(&disk, &arguments).await;
        disk.detach().await?;
        report(&arguments, result?)
    })
}

/// What all tasks share.
struct Load {
    disk: Disk,
    arguments: Arguments,
    data: Bytes,
    end: Instant,
    prng: RefCell<Prng>,
    next: RefCell<u64>,
    latencies: RefCell<Histogram<u64>>,
}

async fn measure(disk: &Disk, arguments: &Arguments) -> Result<(Duration, Histogram<u64>)> {
    let start = Instant::now();
    let mut prng = Prng::new(u64::from(std::process::id()));
    let data: Vec<u8> = (0..arguments.block.div_ceil(8)).flat_map(|_| prng.next_u64().to_le_bytes()).collect();
    let load = Rc::new(Load {
        disk: disk.clone(),
        arguments: arguments.clone(),
        data: Bytes::from(data).slice(..arguments.block as usize),
        end: start + Duration::from_secs(arguments.seconds),
        prng: RefCell::new(prng),
        next: RefCell::new(0),
        latencies: RefCell::new(Histogram::new(3)?),
    });
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..arguments.depth {
        let load = load.clone();
        tasks.spawn_local(async move { load.work().await });
    }
    while let Some(result) = tasks.join_next().await {
        result??;
    }
    let elapsed = start.elapsed();
    let latencies = Rc::into_inner(load).context("a task is still at work")?.latencies.into_inner();
    Ok((elapsed, latencies))
}

impl Load {
    async fn work(&self) -> Result<()> {
        while Instant::now() < self.end {
            let offset = self.place();
            let begun = Instant::now();
            if self.arguments.write {
                self.disk.write(offset, self.data.clone()).await?;
            } else {
                self.disk.read(offset, self.arguments.block).await?;
            }
            self.latencies.borrow_mut().record(begun.elapsed().as_micros() as u64)?;
        }
        Ok(())
    }

    fn place(&self) -> u64 {
        let places = self.disk.size() / self.arguments.block;
        let place = if self.arguments.sequential {
            let mut next = self.next.borrow_mut();
            *next += 1;
            (*next - 1) % places
        } else {
            self.prng.borrow_mut().below(places)
        };
        place * self.arguments.block
    }
}

fn report(arguments: &Arguments, (elapsed, latencies): (Duration, Histogram<u64>)) -> Result<()> {
    let iops = latencies.len() as f64 / elapsed.as_secs_f64();
    let bytes_per_second = iops * arguments.block as f64;
    let at = |quantile: f64| latencies.value_at_quantile(quantile);
    let kind = if arguments.write { "write" } else { "read" };
    if arguments.json {
        return output::print_json(&json!({
            "disk": arguments.disk, "kind": kind, "block": arguments.block, "depth": arguments.depth,
            "requests": latencies.len(), "seconds": elapsed.as_secs_f64(), "iops": iops,
            "bytes_per_second": bytes_per_second,
            "latency_us": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999), "max": latencies.max()},
        }));
    }
    println!(
        "{iops:.0} {kind}s per second of {} ({}/s)",
        output::size(arguments.block),
        output::size(bytes_per_second as u64)
    );
    println!(
        "latency in us: p50 {}, p90 {}, p99 {}, p99.9 {}, max {}",
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        latencies.max()
    );
    Ok(())
}
