//! Failures: servers killed, frozen, stopped and cut off under load. fio judges what it reads against what it
//! wrote; `petal verify` compares the copies afterwards. No timings are judged but by generous bounds.

use crate::cluster::{Cluster, kill9};
use crate::run::{command, nbdsh, read};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::process::Child;
use std::time::{Duration, Instant};

/// How long a cluster may take until every slot has all its copies again.
const FULL_LIMIT: Duration = Duration::from_secs(30);
/// How long a load may take that had to wait for a failover.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

pub fn one_server_killed(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    survives(cluster, |cluster| kill9(pid_of(cluster, "s4")?))
}

pub fn ring_leader_killed(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    survives(cluster, |cluster| {
        let leader = leader(cluster)?;
        kill9(pid_of(cluster, &leader)?)?;
        Cluster::wait_for("another server leads the ring", Duration::from_secs(10), || {
            self::leader(cluster).is_ok_and(|l| l != leader)
        })?;
        // The ring decides again.
        read(cluster.petal().args(["disk", "create", "later", "1GiB"])).map(|_| ())
    })
}

pub fn planned_stop(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    survives(cluster, |cluster| {
        // Twice: a learner, and whoever leads the ring. A stop that hands over needs no suspicion.
        for server in ["s4".to_string(), leader(cluster)?] {
            read(cluster.petal().args(["what-if", "--down", &server]))?;
            read(cluster.petal().args(["down", &server]))?;
            let log = read(cluster.petal().arg("log"))?;
            ensure!(log.contains(&format!("{server} stops as planned")), "no goodbye of {server}:\n{log}");
            ensure!(!log.contains(&format!("{server} is suspected")), "{server} was suspected:\n{log}");
            cluster.up(&[])?;
            full_again(cluster)?;
        }
        read(cluster.petal().args(["down", "s2"])).map(|_| ())
    })
}

pub fn frozen_past_its_lease(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    let old = "[h.pwrite(b'o' * 65536, i << 20) for i in range(64)]";
    read(nbdsh().args(["-u", &uri, "-c", old]))?;
    let pid = pid_of(cluster, "s2")?;
    let life = incarnation(cluster, "s2")?;
    signal(pid, "STOP")?;
    let written = read(nbdsh().args(["-u", &uri, "-c", "[h.pwrite(b'n' * 65536, i << 20) for i in range(64)]"]));
    let down = declared_down(cluster, "s2");
    signal(pid, "CONT")?;
    written?;
    down?;
    // Nothing of what it held while it slept is to be seen, at once or later.
    let new = "assert all(h.pread(65536, i << 20) == b'n' * 65536 for i in range(64)), 'something stale'";
    for _ in 0..5 {
        read(nbdsh().args(["-u", &uri, "-c", new]))?;
    }
    full_again(cluster)?;
    ensure!(pid_of(cluster, "s2")? == pid, "it goes on in the same process");
    ensure!(incarnation(cluster, "s2")? > life, "it must have begun a new life");
    read(nbdsh().args(["-u", &uri, "-c", new]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// A learner, a ring member and the ring's leader lose everything, one after the other, under load; then one disk is
/// damaged where nothing but the disk itself can tell. Whatever they had is copied back.
pub fn lost_disks_made_anew(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    read(nbdsh().args(["-u", &uri, "-c", "[h.pwrite(b'a' * 65536, i << 20) for i in range(256)]"]))?;
    survives(cluster, |cluster| {
        let leader = leader(cluster)?;
        let member = ["s1", "s2", "s3"].into_iter().find(|s| *s != leader).context("a ring of three")?;
        for server in ["s4", member, &leader] {
            let disk = cluster.data().join(server).join("disk1");
            kill9(pid_of(cluster, server)?)?;
            declared_down(cluster, server)?;
            std::fs::remove_file(&disk)?;
            let refusal = cluster.petal().args(["up", "--detach"]).output()?;
            ensure!(!refusal.status.success(), "{server} must not start without its disk");
            let done = read(cluster.petal().args(["rejoin", server]))?;
            ensure!(done.contains("128 slots"), "it says what comes back: {done}");
            cluster.up(&[])?;
            full_again(cluster)?;
        }
        let log = read(cluster.petal().args(["log", "-n", "1000", "--server", "s4"]))?;
        ensure!(log.contains("the ring begins a new configuration"), "nothing of the ring in the log:\n{log}");
        Ok(())
    })?;
    // (The load has written over the first 64 MiB.)
    let check = "assert all(h.pread(65536, i << 20) == b'a' * 65536 for i in range(64, 256)), 'a write is lost'";
    cluster.up(&[])?;
    // The tree of the PMap store is gone, and says so.
    let disk = cluster.data().join("s3/disk1");
    let superblock = read(cluster.petal().args(["inspect", "superblock", "--json"]).arg(&disk))?;
    let superblock: Value = serde_json::from_str(&superblock)?;
    let pmap = superblock["regions"][1]["offset"].as_u64().context("a PMap region")?;
    kill9(pid_of(cluster, "s3")?)?;
    declared_down(cluster, "s3")?;
    let file = std::fs::OpenOptions::new().write(true).open(&disk)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xa5; 1 << 20], pmap)?;
    drop(file);
    let refusal = cluster.petal().args(["up", "--detach"]).output()?;
    let why = String::from_utf8_lossy(&refusal.stderr);
    ensure!(!refusal.status.success() && why.contains("petal rejoin"), "it says what to do: {why}");
    let kept = cluster.petal().args(["rejoin", "s3"]).output()?;
    ensure!(!kept.status.success(), "a disk that is there is not made anew unless it is named");
    read(cluster.petal().args(["rejoin", "s3", "--lost"]).arg(&disk))?;
    cluster.up(&[])?;
    full_again(cluster)?;
    read(nbdsh().args(["-u", &uri, "-c", check]))?;
    // The last copy: s4 goes on without s3, and loses everything. That is given up only by name.
    for server in ["s3", "s4"] {
        kill9(pid_of(cluster, server)?)?;
        declared_down(cluster, server)?;
    }
    std::fs::remove_file(cluster.data().join("s4/disk1"))?;
    let refusal = cluster.petal().args(["rejoin", "s4"]).output()?;
    let why = String::from_utf8_lossy(&refusal.stderr);
    ensure!(why.contains("the only complete copy") && why.contains("--accept-data-loss"), "it says why not: {why}");
    read(cluster.petal().args(["rejoin", "s4", "--accept-data-loss"]))?;
    cluster.up(&[])?;
    full_again(cluster)?;
    // s3 was as good: nothing is lost.
    read(nbdsh().args(["-u", &uri, "-c", check]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn two_neighbours_killed(cluster: &Cluster) -> Result<()> {
    // The ring (s1 to s3) keeps its majority.
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    read(nbdsh().args(["-u", &uri, "-c", "[h.pwrite(b'a' * 65536, i << 20) for i in range(256)]"]))?;
    let what_if = cluster.petal().args(["what-if", "--down", "s3,s4", "--json"]).output()?;
    let what_if: Value = serde_json::from_slice(&what_if.stdout).context("`petal what-if --json` printed no JSON")?;
    for server in ["s3", "s4"] {
        kill9(pid_of(cluster, server)?)?;
    }
    for server in ["s3", "s4"] {
        declared_down(cluster, server)?;
    }
    let redundancy = cluster.status()?["redundancy"].clone();
    ensure!(redundancy["available"] == false, "some slots have lost both copies: {redundancy}");
    ensure!(what_if["then"]["schemes"] == redundancy["schemes"], "it was foretold otherwise: {what_if} {redundancy}");
    // One write to each slot: those that both held wait, the others are done.
    let mut writers: Vec<Child> = Vec::new();
    let code = "\
import os
done = [0]
def end(error): done[0] += 1; return 1
bufs = [nbd.Buffer.from_bytearray(bytearray(b'b' * 65536)) for i in range(256)]
for i in range(256): h.aio_pwrite(bufs[i], i << 20, end)
while h.aio_in_flight() > 0:
    h.poll(100)
    open('done.new', 'w').write(str(done[0]))
    os.replace('done.new', 'done')
";
    writers.push(nbdsh().current_dir(cluster.folder()).args(["-u", &uri, "-c", code]).spawn()?);
    let done = || std::fs::read_to_string(cluster.folder().join("done")).ok().and_then(|t| t.parse::<u32>().ok());
    let others = Cluster::wait_for("writes of the other slots are done", Duration::from_secs(20), || {
        done().is_some_and(|n| n >= 192)
    });
    std::thread::sleep(Duration::from_millis(500));
    let waiting = done();
    let back = cluster.up(&[]);
    let finished = writers.iter_mut().try_for_each(|w| finish(w, "the writer"));
    others?;
    back?;
    finished?;
    ensure!(waiting == Some(192), "a quarter of the slots was on both: 192 of 256 were to be done, not {waiting:?}");
    full_again(cluster)?;
    let code = "assert all(h.pread(65536, i << 20) == b'b' * 65536 for i in range(256)), 'a write is lost'";
    read(nbdsh().args(["-u", &uri, "-c", code]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// A verified load goes on through a failure without an error; then everything comes back, and nothing is lost.
fn survives(cluster: &Cluster, fail: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    let uri = cluster.nbd_uri("vol0")?;
    let mut load = command("fio");
    load.args(["--name=load", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--iodepth=8", "--size=64m"]);
    load.args(["--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--randrepeat=0"]);
    load.args(["--time_based", "--runtime=10", "--output=/dev/null"]).arg(format!("--uri={uri}"));
    let mut load = load.spawn().context("cannot start fio")?;
    std::thread::sleep(Duration::from_secs(2));
    let failed = fail(cluster);
    let moving = failed.and_then(|()| goes_on(cluster));
    // Even where something is wrong: fio must not outlive the scenario.
    let finished = finish(&mut load, "fio");
    moving?;
    finished?;
    cluster.up(&[])?;
    full_again(cluster)?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// Another client's I/O on all slots is done within seconds.
fn goes_on(cluster: &Cluster) -> Result<()> {
    let start = Instant::now();
    let code = "[h.pwrite(b'x' * 4096, (1 << 30) + (i << 20)) for i in range(256)]; h.flush()";
    let mut writer = nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", code]).spawn()?;
    finish(&mut writer, "a writer after the failure")?;
    println!("I/O on every slot went on within {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Waits for a load; ends it if it does not end.
fn finish(load: &mut Child, what: &str) -> Result<()> {
    let end = Instant::now() + LOAD_LIMIT;
    loop {
        if let Some(status) = load.try_wait()? {
            ensure!(status.success(), "{what} failed: {status}");
            return Ok(());
        }
        if Instant::now() > end {
            let _ = load.kill();
            let _ = load.wait();
            bail!("{what} did not end within {LOAD_LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(super) fn full_again(cluster: &Cluster) -> Result<()> {
    let start = Instant::now();
    Cluster::wait_for("everything is redundant again", FULL_LIMIT, || {
        cluster.status().is_ok_and(|s| s["redundancy"]["full"] == true)
    })?;
    println!("redundant again after {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

pub(super) fn declared_down(cluster: &Cluster, server: &str) -> Result<()> {
    Cluster::wait_for("the ring declares it down", Duration::from_secs(15), || {
        server_status(cluster, server).is_ok_and(|s| s["down"] == true)
    })
}

pub(super) fn server_status(cluster: &Cluster, server: &str) -> Result<Value> {
    let status = cluster.status()?;
    let found = status["servers"].as_array().into_iter().flatten().find(|s| s["id"] == server);
    found.cloned().with_context(|| format!("the status does not show {server}"))
}

pub(super) fn pid_of(cluster: &Cluster, server: &str) -> Result<u32> {
    let pid = server_status(cluster, server)?["pid"].as_u64();
    pid.map(|p| p as u32).with_context(|| format!("{server} does not run"))
}

pub(super) fn incarnation(cluster: &Cluster, server: &str) -> Result<u64> {
    server_status(cluster, server)?["incarnation"].as_u64().with_context(|| format!("{server} tells no incarnation"))
}

pub(super) fn leader(cluster: &Cluster) -> Result<String> {
    let status = cluster.status()?;
    let leads = status["servers"].as_array().into_iter().flatten().find(|s| s["leads"] == true);
    leads.and_then(|s| s["id"].as_str()).map(String::from).context("nobody leads the ring")
}

fn signal(pid: u32, name: &str) -> Result<()> {
    read(command("kill").args([format!("-{name}"), pid.to_string()])).map(|_| ())
}
