//! What an operator does with disks that are not what they should be: restored from a backup, of another cluster,
//! given twice; and wall clocks that jump. Refused with the reason, or handled; never wrong data.

use super::chaos::judge;
use super::failures::{declared_down, full_again, leader, pid_of};
use crate::cluster::{Cluster, kill9};
use crate::run::{command, nbdsh, read, read_failure};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One write to every slot: those of all letters are told apart.
fn write_everywhere(cluster: &Cluster, letter: char) -> Result<()> {
    let code = format!("[h.pwrite(b'{letter}' * 65536, i << 20) for i in range(256)]; h.flush()");
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", &code])).map(|_| ())
}

fn everywhere_is(cluster: &Cluster, letter: char) -> Result<()> {
    let code = format!("assert all(h.pread(65536, i << 20) == b'{letter}' * 65536 for i in range(256)), 'old data'");
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", &code])).map(|_| ())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    read(command("cp").args(["--sparse=always", "--remove-destination"]).args([from, to])).map(|_| ())
}

pub fn restored_from_a_backup(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB"])?;
    write_everywhere(cluster, 'o')?;
    // Of somebody who leads the ring, as of somebody who only learns.
    for server in [leader(cluster)?, "s4".to_string()] {
        let disk = cluster.data().join(&server).join("disk1");
        let (backup, right) = (cluster.folder().join("backup"), cluster.folder().join("right"));
        read(cluster.petal().args(["down", &server]))?;
        copy(&disk, &backup)?;
        cluster.up(&[])?;
        full_again(cluster)?;
        write_everywhere(cluster, 'n')?;
        read(cluster.petal().args(["down", &server]))?;
        std::fs::rename(&disk, &right)?;
        copy(&backup, &disk)?;
        let config = cluster.data().join(&server).join("server.toml");
        // One start of it ends before anybody could refuse it.
        aborted_start(cluster, &server, &config)?;
        // Again, as a supervisor would: what it tried before must not make it pass.
        for _ in 0..3 {
            let (code, said) = read_failure(cluster.petal().args(["server", "--config"]).arg(&config))?;
            let words = ["earlier life", "restored"];
            ensure!(code == 3 && words.iter().all(|w| said.contains(w)), "{server}: exit code {code}: {said}");
            println!("{server}: {}", said.lines().last().unwrap_or_default());
        }
        everywhere_is(cluster, 'n')?;
        std::fs::rename(&right, &disk)?;
        cluster.up(&[])?;
        full_again(cluster)?;
        everywhere_is(cluster, 'n')?;
        write_everywhere(cluster, 'o')?;
    }
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// What `petal inspect superblock` tells of a disk.
fn superblock(cluster: &Cluster, disk: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&read(cluster.petal().args(["inspect", "superblock", "--json"]).arg(disk))?)?)
}

/// Starts a server while nobody else answers, until its new life is on its disk, and kills it.
fn aborted_start(cluster: &Cluster, server: &str, config: &Path) -> Result<()> {
    let others: Vec<String> =
        ["s1", "s2", "s3", "s4"].iter().filter(|s| **s != server).map(ToString::to_string).collect();
    let pids = others.iter().map(|s| pid_of(cluster, s)).collect::<Result<Vec<_>>>()?;
    let signal = |name: &str| -> Result<()> {
        pids.iter().try_for_each(|pid| read(command("kill").args([name, &pid.to_string()])).map(drop))
    };
    let disk = cluster.data().join(server).join("disk1");
    let before = superblock(cluster, &disk)?["incarnation"].clone();
    signal("-STOP")?;
    let mut started = cluster.petal();
    let mut process = started.args(["server", "--config"]).arg(config).spawn().context("cannot start the server")?;
    let begun = Cluster::wait_for("its new life is on the disk", Duration::from_secs(10), || {
        superblock(cluster, &disk).is_ok_and(|now| now["incarnation"] != before)
    });
    let killed = process.kill();
    let _ = process.wait();
    signal("-CONT")?;
    begun?;
    killed?;
    Cluster::wait_for("the others go on", Duration::from_secs(20), || everywhere_is(cluster, 'n').is_ok())
}

/// Somebody writes over a journal, or cuts a disk's file: refused with what to do, which is done.
pub fn overwritten_and_cut(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB"])?;
    let disk = cluster.data().join("s4/disk1");
    let regions = superblock(cluster, &disk)?["regions"].clone();
    let region = |name: &str, what: &str| -> Result<u64> {
        let found = regions.as_array().into_iter().flatten().find(|r| r["name"] == name);
        found.and_then(|r| r[what].as_u64()).with_context(|| format!("no {what} of {name} in {regions}"))
    };
    let (offset, length) = (region("journal", "offset")?, region("journal", "length")?);
    let data = region("data", "offset")?;
    for (letter, killed, said) in
        [('m', false, "durable once"), ('n', true, "durable once"), ('o', false, "was truncated")]
    {
        write_everywhere(cluster, letter)?;
        if killed {
            // What is written in the second before may pass for a torn end, which the others put back.
            std::thread::sleep(Duration::from_millis(2500));
            kill9(pid_of(cluster, "s4")?)?;
            declared_down(cluster, "s4")?;
        } else {
            read(cluster.petal().args(["down", "s4"]))?;
        }
        let file = std::fs::File::options().write(true).open(&disk)?;
        match said {
            "was truncated" => file.set_len(data + (1 << 20))?,
            _ => file.write_all_at(&vec![0xa5; length as usize], offset)?,
        }
        file.sync_all()?;
        let config = cluster.data().join("s4/server.toml");
        let (code, words) = read_failure(cluster.petal().args(["server", "--config"]).arg(&config))?;
        ensure!(words.contains(said) && words.contains("petal rejoin s4 --lost"), "exit code {code}: {words}");
        println!("{}", words.lines().last().unwrap_or_default());
        everywhere_is(cluster, letter)?;
        read(cluster.petal().args(["rejoin", "s4", "--lost"]).arg(&disk))?;
        cluster.up(&[])?;
        full_again(cluster)?;
        read(cluster.petal().arg("verify"))?;
    }
    // What came back is all there is of it.
    read(cluster.petal().args(["down", "s3"]))?;
    everywhere_is(cluster, 'o')?;
    cluster.down()
}

/// The disk of a running server is copied, and somebody starts the copy elsewhere.
pub fn copied_and_started(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB"])?;
    write_everywhere(cluster, 'o')?;
    let (disk, copied) = (cluster.data().join("s4/disk1"), cluster.folder().join("copied"));
    let pid = pid_of(cluster, "s4")?;
    read(command("kill").args(["-STOP", &pid.to_string()]))?;
    let result = copy(&disk, &copied);
    read(command("kill").args(["-CONT", &pid.to_string()]))?;
    result?;
    full_again(cluster)?;
    let config = cluster.folder().join("copy.toml");
    let right = std::fs::read_to_string(cluster.data().join("s4/server.toml"))?;
    let socket = cluster.folder().join("copy.sock");
    let changed: Vec<String> = right
        .lines()
        .map(|line| match line {
            line if line.starts_with("listen") => format!("listen = [\"unix:{}\"]", socket.display()),
            line if line.starts_with("disks") => format!("disks = [{:?}]", copied.display().to_string()),
            line => line.to_string(),
        })
        .collect();
    std::fs::write(&config, changed.join("\n"))?;
    let mut copy =
        cluster.petal().args(["server", "--config"]).arg(&config).spawn().context("cannot start the copy")?;
    let ended = Cluster::wait_for("the process of the right disk ends", Duration::from_secs(40), || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z"))
    });
    // The folder knows no process of it now.
    let told = Cluster::wait_for("the copy is shown as the server that it is", Duration::from_secs(20), || {
        let status = cluster.status().unwrap_or_default();
        status["servers"].as_array().is_some_and(|s| s.iter().any(|s| s["id"] == "s4" && s["state"] == "up"))
    });
    let _ = copy.kill();
    let _ = copy.wait();
    ended?;
    told?;
    let log = std::fs::read_to_string(cluster.data().join("s4/log"))?;
    ensure!(log.contains("copy of"), "it does not say why it ended: {log}");
    // From here on the right disk is one from the past.
    everywhere_is(cluster, 'o')?;
    let (code, words) =
        read_failure(cluster.petal().args(["server", "--config"]).arg(cluster.data().join("s4/server.toml")))?;
    ensure!(code == 3 && words.contains("earlier life"), "exit code {code}: {words}");
    cluster.down()
}

pub fn copied_in_the_same_life(cluster: &Cluster) -> Result<()> {
    // As a storage array that was set back to its own snapshot, or a disk that lied about what it had written: by
    // its numbers nobody can tell it from the right one. What it lacks the others have.
    cluster.up(&["--disk-size", "2GiB"])?;
    write_everywhere(cluster, 'o')?;
    let (disk, backup) = (cluster.data().join("s4/disk1"), cluster.folder().join("backup"));
    for wait_until_down in [true, false] {
        // A copy of one moment, without stopping its life.
        let pid = pid_of(cluster, "s4")?.to_string();
        read(command("kill").args(["-STOP", &pid]))?;
        let copied = copy(&disk, &backup);
        read(command("kill").args(["-CONT", &pid]))?;
        copied?;
        full_again(cluster)?;
        let letter = if wait_until_down { 'm' } else { 'n' };
        write_everywhere(cluster, letter)?;
        kill9(pid_of(cluster, "s4")?)?;
        if wait_until_down {
            declared_down(cluster, "s4")?;
        }
        copy(&backup, &disk)?;
        cluster.up(&[])?;
        full_again(cluster)?;
        everywhere_is(cluster, letter)?;
        read(cluster.petal().arg("verify"))?;
    }
    cluster.down()
}

pub fn of_who_decides_alone(cluster: &Cluster) -> Result<()> {
    // A ring of one: what its disk forgets nobody else can vote for, and all others have it.
    cluster.up(&["--servers", "2", "--disk-size", "2GiB"])?;
    write_everywhere(cluster, 'o')?;
    let server = leader(cluster)?;
    let disk = cluster.data().join(&server).join("disk1");
    let (backup, right) = (cluster.folder().join("backup"), cluster.folder().join("right"));
    let pid = pid_of(cluster, &server)?.to_string();
    read(command("kill").args(["-STOP", &pid]))?;
    let copied = copy(&disk, &backup);
    read(command("kill").args(["-CONT", &pid]))?;
    copied?;
    full_again(cluster)?;
    for n in 0..20 {
        read(cluster.petal().args(["disk", "create", &format!("later{n}"), "1GiB"]))?;
    }
    write_everywhere(cluster, 'n')?;
    kill9(pid_of(cluster, &server)?)?;
    std::fs::rename(&disk, &right)?;
    copy(&backup, &disk)?;
    let config = cluster.data().join(&server).join("server.toml");
    let (code, said) = read_failure(cluster.petal().args(["server", "--config"]).arg(&config))?;
    ensure!(code == 3 && said.contains("decides alone"), "exit code {code}: {said}");
    println!("{}", said.lines().last().unwrap_or_default());
    std::fs::rename(&right, &disk)?;
    cluster.up(&[])?;
    full_again(cluster)?;
    everywhere_is(cluster, 'n')?;
    read(cluster.petal().args(["disk", "info", "later19"]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn of_another_cluster(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3", "--disk-size", "2GiB"])?;
    write_everywhere(cluster, 'n')?;
    let other = cluster.folder().join("other");
    let other_petal = |arguments: &[&str]| read(cluster.petal().env("PETAL_CLUSTER", &other).args(arguments));
    other_petal(&["up", "--detach", "--nbd-port", "0", "--servers", "3", "--disk-size", "2GiB"])?;
    other_petal(&["down"])?;
    let disk = cluster.data().join("s2/disk1");
    read(cluster.petal().args(["down", "s2"]))?;
    std::fs::rename(&disk, disk.with_extension("right"))?;
    copy(&other.join("s2/disk1"), &disk)?;
    // The others serve; who has the wrong disk is named, with the reason.
    let said = crate::run::output(cluster.petal().args(["up", "--detach", "--nbd-port", "0"]))?;
    let said = crate::run::tail(&said);
    ensure!(said.contains("s2") && said.contains("cluster"), "the foreign disk is not named: {said}");
    println!("{}", said.lines().find(|l| l.contains("s2")).unwrap_or_default());
    everywhere_is(cluster, 'n')?;
    std::fs::rename(disk.with_extension("right"), &disk)?;
    cluster.up(&[])?;
    full_again(cluster)?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn wall_clock_jumps(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    read(cluster.petal().args(["disk", "create", "judged", "1GiB"]))?;
    // One server gets a wall clock of its own; the clock that counts is left as it is.
    let offset = cluster.folder().join("offset");
    std::fs::write(&offset, "+0")?;
    kill9(pid_of(cluster, "s2")?)?;
    let mut up = cluster.petal();
    up.env("LD_PRELOAD", faketime()?).env("FAKETIME_TIMESTAMP_FILE", &offset).env("FAKETIME_NO_CACHE", "1");
    up.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").args(["up", "--detach", "--nbd-port", "0"]);
    read(&mut up)?;
    full_again(cluster)?;
    let suspected = |cluster: &Cluster| -> Result<usize> {
        Ok(read(cluster.petal().args(["log", "-n", "1024"]))?.matches("is suspected").count())
    };
    let before = suspected(cluster)?;
    let record = cluster.folder().join("history.jsonl");
    let mut history = cluster.petal();
    history.args(["history", "judged", "--clients", "2", "--seconds", "6", "--out"]).arg(&record);
    let mut history = history.spawn().context("cannot start `petal history`")?;
    let steps = ["+1h", "-1d", "+3650d", "-3650d", "+3650d"].into_iter().try_for_each(|step| -> Result<()> {
        std::thread::sleep(Duration::from_secs(1));
        // All at once, as the library reads it at any time.
        std::fs::write(offset.with_extension("new"), step)?;
        Ok(std::fs::rename(offset.with_extension("new"), &offset)?)
    });
    let status = history.wait()?;
    steps?;
    ensure!(status.success(), "`petal history` ended with {status}");
    println!("{}", judge(&record)?);
    ensure!(suspected(cluster)? == before, "somebody was suspected because a wall clock jumped");
    read(cluster.petal().args(["down", "s2"]))?;
    let log = std::fs::read_to_string(cluster.data().join("s2/log"))?;
    let year = |line: &str| line.trim_start_matches('\x1b').split('-').next()?.parse::<u32>().ok();
    let years: Vec<u32> = log.lines().filter_map(year).collect();
    let (first, last) = (years.first().context("no line with a date")?, years.last().context("no line")?);
    ensure!(last > first, "its wall clock did not jump: the log begins in {first} and ends in {last}");
    cluster.down()
}

/// The library that gives a process another wall clock.
fn faketime() -> Result<PathBuf> {
    let files = read(command("dpkg").args(["-L", "libfaketime"]))?;
    let library = files.lines().find(|line| line.ends_with("/libfaketime.so.1"));
    library.map(PathBuf::from).context("the package libfaketime has no library")
}
