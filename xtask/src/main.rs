//! Development tasks, so that no shell script has to be trusted: `cargo xtask test` is everything that
//! CI runs; the others are its parts, and the benchmark.

mod bench;
mod bench_failures;
mod bench_reconfigure;
mod bench_scale;
mod bench_snapshots;
mod cluster;
mod e2e;
mod faulty_disk;
mod network;
mod packages;
mod run;
mod sim;
mod test;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development tasks of Petal", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that CI runs, cheapest first; ends with `N passed, N failed`
    Test(test::Arguments),
    /// Checks of the house: dependency directions, links, message table, file lengths, unsafe
    Tidy,
    /// The simulator, in release: whole clusters in one thread
    Sim(sim::Arguments),
    /// The speed of block jobs through NBD, beside the raw disk and other NBD servers
    Bench(bench::Arguments),
    /// What failures cost: throughput through an outage, and degraded over normal throughput
    BenchFailures(bench_failures::Arguments),
    /// What moving data costs: servers added, filled and drained again under load
    BenchReconfigure(bench_reconfigure::Arguments),
    /// What a cluster of many servers and disks costs: its global state
    BenchScale(bench_scale::Arguments),
    /// What snapshots cost: making one under load, having a thousand, deleting them
    BenchSnapshots(bench_snapshots::Arguments),
    /// Scenarios with real processes
    E2e(e2e::Arguments),
}

fn main() {
    let result = match Arguments::parse().task {
        Task::Test(arguments) => test::run(arguments),
        Task::Tidy => tidy::run(),
        Task::Sim(arguments) => sim::run(arguments),
        Task::Bench(arguments) => bench::run(arguments),
        Task::BenchFailures(arguments) => bench_failures::run(arguments),
        Task::BenchReconfigure(arguments) => bench_reconfigure::run(arguments),
        Task::BenchScale(arguments) => bench_scale::run(arguments),
        Task::BenchSnapshots(arguments) => bench_snapshots::run(arguments),
        Task::E2e(arguments) => e2e::run(arguments),
    };
    if let Err(error) = result {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
