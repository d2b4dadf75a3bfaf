//! What a large cluster costs (design 2.13): its global state, without servers. docs/performance.md is written by hand
//! from what it prints.

use crate::run::{cargo, root, show};
use anyhow::Result;
use std::process::Command;

/// How large.
#[derive(clap::Args)]
pub struct Arguments {
    /// Servers
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(4..=1024))]
    servers: u16,
    /// Disks
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    disks: u32,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    show(cargo().args(["build", "--release", "-p", "petal-sim", "--bin", "petal-scale"]))?;
    let mut scale = Command::new(root().join("target/release/petal-scale"));
    show(scale.args([arguments.servers.to_string(), arguments.disks.to_string()]))
}
