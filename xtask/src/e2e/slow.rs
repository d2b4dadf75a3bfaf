//! Fail-slow: a server that is alive and slow. It keeps its lease and its copies; reads go elsewhere.

use super::failures::{pid_of, server_status};
use crate::cluster::Cluster;
use crate::run::{command, read};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

/// Of each tenth of a second the slow server runs a fifth: too little to be of use, too much to be suspected.
const STOPPED: Duration = Duration::from_millis(80);
const RUNS: Duration = Duration::from_millis(20);

pub fn gets_few_reads(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = format!("--uri={}", cluster.nbd_uri("vol0")?);
    let fio = |more: &[&str]| {
        let mut fio = command("fio");
        fio.args(["--name=load", "--ioengine=nbd", "--size=256m", "--output-format=json", &uri]).args(more);
        fio
    };
    read(&mut fio(&["--rw=write", "--bs=1m", "--iodepth=4"]))?;
    let reads = || -> Result<Vec<u64>> {
        let of = |server: &str| server_status(cluster, server)?["counters"]["reads"].as_u64().context("no counter");
        ["s1", "s2", "s3", "s4"].into_iter().map(of).collect()
    };
    let before = reads()?;
    let mut load = fio(&["--rw=randread", "--bs=4k", "--iodepth=4", "--time_based", "--runtime=5"]);
    let load = load.stdout(std::process::Stdio::piped()).spawn()?;
    let pid = pid_of(cluster, "s4")?.to_string();
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        for (signal, time) in [("-STOP", STOPPED), ("-CONT", RUNS)] {
            read(command("kill").args([signal, &pid]))?;
            std::thread::sleep(time);
        }
    }
    let said = load.wait_with_output()?;
    ensure!(said.status.success(), "fio ended with {}", said.status);
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
    let took = |place: &str| json["jobs"][0]["read"]["clat_ns"]["percentile"][place].as_f64().unwrap_or(0.0) / 1e6;
    let served: Vec<u64> = reads()?.iter().zip(&before).map(|(now, before)| now - before).collect();
    let (p50, p99) = (took("50.000000"), took("99.000000"));
    println!("reads by s1 to s4, which is slow: {served:?}; 50 of 100 took {p50:.1} ms, 99 of 100 {p99:.1} ms");
    let others = served[..3].iter().sum::<u64>() / 3;
    ensure!(served[3] < others / 2, "a slow server was asked for {} reads, the others for {others} each", served[3]);
    let log = read(cluster.petal().arg("log"))?;
    ensure!(!log.contains("is suspected"), "it is slow, and it is there:\n{log}");
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}
