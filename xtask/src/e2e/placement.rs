//! Servers are added, drained and filled while a disk is written, and killed meanwhile (design 2.8).

use super::chaos::{Dice, number};
use super::failures::{declared_down, full_again, leader, pid_of};
use crate::cluster::{Cluster, kill9};
use crate::run::{command, read, read_failure};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long a move may take: much longer than it does.
const MOVED_WITHIN: Duration = Duration::from_secs(300);

fn list(cluster: &Cluster) -> Result<Value> {
    Ok(serde_json::from_str(&read(cluster.petal().args(["server", "list", "--json"]))?)?)
}

fn of_server(list: &Value, server: &str, what: &str) -> Result<u64> {
    let servers = list["servers"].as_array().context("no servers")?;
    let one = servers.iter().find(|s| s["server"] == server).context("no such server")?;
    one[what].as_u64().with_context(|| format!("no {what} of {server}"))
}

/// Elements on a server's disks.
fn elements(cluster: &Cluster, server: &str) -> Result<u64> {
    let status = super::failures::server_status(cluster, server)?;
    let disks = status["disks"].as_array().context("no disks")?;
    Ok(disks.iter().filter_map(|d| d["elements"].as_u64()).sum())
}

/// fio on the first 192 MiB of the disk.
fn fio(cluster: &Cluster, more: &[&str]) -> Result<std::process::Command> {
    let mut fio = command("fio");
    fio.args(["--name=load", "--ioengine=nbd", "--size=192m", &format!("--uri={}", cluster.nbd_uri("vol0")?)]);
    fio.args(more);
    Ok(fio)
}

/// What `petal reconfigure status` tells programs.
fn reconfiguration(cluster: &Cluster) -> Result<Value> {
    Ok(serde_json::from_str(&read(cluster.petal().args(["reconfigure", "status", "--json"]))?)?)
}

/// Waits until something moves.
fn wait_until_moving(cluster: &Cluster) -> Result<()> {
    Cluster::wait_for("something moves", Duration::from_secs(20), || {
        reconfiguration(cluster).is_ok_and(|r| r["moving"].as_array().is_some_and(|m| !m.is_empty()))
    })
}

fn wait_until_moved(cluster: &Cluster) -> Result<()> {
    let end = Instant::now() + MOVED_WITHIN;
    loop {
        let list = list(cluster)?;
        let moving = list["reconfiguration"]["moving"].as_array().context("no progress")?;
        if moving.is_empty() && list["reconfiguration"]["to_plan"] == 0 {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("it does not end: {list}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

pub fn drained_and_filled(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    read(&mut fio(cluster, &["--rw=write", "--bs=1m", "--iodepth=4"])?)?;
    let before = list(cluster)?;
    ensure!(of_server(&before, "s3", "copies")? > 0, "s3 holds nothing to begin with: {before}");
    let plan: Value =
        serde_json::from_str(&read(cluster.petal().args(["server", "drain", "s3", "--dry-run", "--json"]))?)?;
    let (stored, moved) = (plan["bytes_stored"].as_u64().unwrap_or(0), plan["bytes_to_move"].as_u64().unwrap_or(0));
    println!("stored: {stored}, to move: {moved}");
    ensure!(moved > stored / 6 && moved < stored / 3, "of four servers one is to move about a quarter: {plan}");
    ensure!(list(cluster)?["reconfiguration"] == before["reconfiguration"], "a dry run has changed something");
    for (command_word, copies_left) in [("drain", false), ("fill", true)] {
        let verify = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--verify=crc32c", "--time_based", "--runtime=15"];
        let load = fio(cluster, &verify)?.stdout(std::process::Stdio::piped()).spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        read(cluster.petal().args(["server", command_word, "s3"]))?;
        wait_until_moved(cluster)?;
        println!("{command_word} took {:.1} s under writes", begun.elapsed().as_secs_f64());
        let said = load.wait_with_output()?;
        ensure!(said.status.success(), "fio ended with {} during {command_word}", said.status);
        let after = list(cluster)?;
        ensure!((of_server(&after, "s3", "copies")? > 0) == copies_left, "after {command_word}: {after}");
        read(cluster.petal().arg("verify"))?;
        if !copies_left {
            let end = Instant::now() + Duration::from_secs(30);
            while elements(cluster, "s3")? > 0 {
                ensure!(Instant::now() < end, "s3 still holds {} elements", elements(cluster, "s3")?);
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    cluster.down()
}

/// A server that stays away is replaced, and everything is on two servers again; when it is back it gets its share.
pub fn stays_away(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    ensure!(list(cluster)?["replace_after_s"] == 600, "ten minutes, if nobody says anything");
    read(cluster.petal().args(["server", "replace-after", "3s"]))?;
    let (_, said) = read_failure(cluster.petal().args(["server", "replace-after", "soon"]))?;
    ensure!(said.contains("10m"), "{said}");
    let load = ["--rw=randwrite", "--bs=64k", "--iodepth=8", "--verify=crc32c", "--do_verify=0", "--randseed=7"];
    read(fio(cluster, &load)?.args(["--verify_state_save=0"]))?;
    let share = of_server(&list(cluster)?, "s4", "copies")?;
    ensure!(share > 0, "s4 holds nothing to begin with");
    kill9(pid_of(cluster, "s4")?)?;
    declared_down(cluster, "s4")?;
    ensure!(of_server(&list(cluster)?, "s4", "copies")? == share, "s4 is replaced at once");
    wait_until_moving(cluster)?;
    let text = read(cluster.petal().args(["server", "list"]))?;
    ensure!(text.contains("away, being replaced"), "{text}");
    wait_until_moved(cluster)?;
    full_again(cluster)?;
    ensure!(of_server(&list(cluster)?, "s4", "copies")? == 0, "s4 still holds something");
    let log = read(cluster.petal().args(["log", "--lines", "1000"]))?;
    ensure!(log.contains("s4 stayed away"), "{log}");
    // What it had is on two others: one of these may go. (Of three that are left one may not be replaced in three seconds.)
    read(cluster.petal().args(["down", "s3"]))?;
    let verify = ["--rw=randwrite", "--bs=64k", "--iodepth=8", "--verify=crc32c", "--verify_only", "--randseed=7"];
    read(fio(cluster, &verify)?.args(["--verify_state_save=0"]))?;
    cluster.up(&[])?;
    wait_until_moved(cluster)?;
    full_again(cluster)?;
    let after = list(cluster)?;
    ensure!(of_server(&after, "s4", "copies")?.abs_diff(share) <= 2, "s4 had {share} slots: {after}");
    read(fio(cluster, &verify)?.args(["--verify_state_save=0"]))?;
    read(cluster.petal().arg("verify"))?;
    removed(cluster)?;
    read(fio(cluster, &verify)?.args(["--verify_state_save=0"]))?;
    cluster.down()
}

/// s4 is drained, stopped and removed, and refused when it comes back.
fn removed(cluster: &Cluster) -> Result<()> {
    let refused = |why: &str| -> Result<()> {
        let (code, said) = read_failure(cluster.petal().args(["server", "remove", "s4"]))?;
        ensure!(code == 1 && said.contains(why), "{code}: {said}");
        Ok(())
    };
    refused("not down")?;
    read(cluster.petal().args(["server", "drain", "s4"]))?;
    wait_until_moved(cluster)?;
    let config = cluster.data().join("s4/server.toml");
    read(cluster.petal().args(["down", "s4"]))?;
    declared_down(cluster, "s4")?;
    read(cluster.petal().args(["server", "remove", "s4"]))?;
    refused("no server s4")?;
    ensure!(of_server(&list(cluster)?, "s4", "copies").is_err(), "the list still has it");
    let (code, said) = read_failure(cluster.petal().args(["server", "--config"]).arg(&config))?;
    ensure!(code == 3 && said.contains("removed from the cluster"), "{code}: {said}");
    cluster.up(&[])?;
    full_again(cluster)?;
    let plan: Value =
        serde_json::from_str(&read(cluster.petal().args(["server", "add", "--local", "--dry-run", "--json"]))?)?;
    ensure!(plan["server"] == "s5", "a number is given again: {plan}");
    Ok(())
}

/// A server is added to a running cluster; the move is paused, its target killed, and started again; then turned back.
pub fn added_paused_and_turned_back(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    read(&mut fio(cluster, &["--rw=write", "--bs=1m", "--iodepth=4"])?)?;
    let add = |more: &[&str]| read(cluster.petal().args(["server", "add", "--local", "--json"]).args(more));
    let plan: Value = serde_json::from_str(&add(&["--dry-run"])?)?;
    let (stored, moved) = (plan["bytes_stored"].as_u64().unwrap_or(0), plan["bytes_to_move"].as_u64().unwrap_or(0));
    ensure!(moved > stored / 7 && moved < stored / 4, "of five servers one is to get about a fifth: {plan}");
    ensure!(plan["server"] == "s5" && plan["balance"]["after"].as_f64().is_some_and(|b| b < 1.2), "{plan}");
    ensure!(of_server(&list(cluster)?, "s5", "copies").is_err(), "a dry run has added a server");

    add(&[])?;
    wait_until_moving(cluster)?;
    read(cluster.petal().args(["reconfigure", "pause"]))?;
    kill9(pid_of(cluster, "s5")?)?;
    declared_down(cluster, "s5")?;
    let waits = reconfiguration(cluster)?;
    let said = waits["moving"][0]["waits"].as_array().cloned().unwrap_or_default();
    let says = |why: &str| said.iter().any(|w| w["why"] == why);
    ensure!(says("paused") && says("target_down") && said[1]["servers"][0] == "s5", "{waits}");
    let text = read(cluster.petal().args(["reconfigure", "status"]))?;
    ensure!(text.contains("s5, which is down") && text.contains("paused"), "{text}");
    let text = read(cluster.petal().arg("status"))?;
    ensure!(text.contains("waits for s5, which is down"), "the status does not tell what is waited for:\n{text}");
    cluster.up(&[])?;
    read(cluster.petal().args(["reconfigure", "resume"]))?;
    wait_until_moved(cluster)?;
    let after = list(cluster)?;
    let (most, least) = (of_server(&after, "s1", "copies")?, of_server(&after, "s5", "copies")?);
    ensure!(most <= least + 2, "five servers hold as much as each other: {after}");
    let (_, said) = read_failure(cluster.petal().args(["reconfigure", "pause"]))?;
    ensure!(said.contains("nothing is under way"), "{said}");

    read(cluster.petal().args(["server", "drain", "s5"]))?;
    wait_until_moving(cluster)?;
    read(cluster.petal().args(["reconfigure", "abort"]))?;
    wait_until_moved(cluster)?;
    let text = read(cluster.petal().args(["reconfigure", "status"]))?;
    ensure!(of_server(&list(cluster)?, "s5", "copies")? > 0, "it was turned back, and s5 holds nothing");
    ensure!(text.contains("s5 was to be drained and holds"), "{text}");
    read(cluster.petal().args(["server", "drain", "s5"]))?;
    let lines = read(cluster.petal().args(["reconfigure", "status", "--watch", "--json"]))?;
    let last: Value = serde_json::from_str(lines.lines().last().context("nothing was told")?)?;
    ensure!(last["moving"] == Value::Array(Vec::new()) && last["to_plan"] == 0, "it ended too early: {last}");
    ensure!(of_server(&list(cluster)?, "s5", "copies")? == 0, "s5 is drained");
    full_again(cluster)?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// Servers that are killed, unless `PETAL_E2E_KILLS` says otherwise.
const KILLS: u64 = 4;

/// Somebody who takes part is killed at some moment of each move: a source, a joiner, the ring's leader, in turn.
pub fn killed_while_moving(cluster: &Cluster) -> Result<()> {
    let kills = number("PETAL_E2E_KILLS", KILLS)?;
    let seed = number("PETAL_E2E_SEED", u64::from(std::process::id()))?;
    println!("{kills} kills, drawn from {seed} (PETAL_E2E_KILLS, PETAL_E2E_SEED)");
    let mut dice = Dice(seed);
    cluster.up(&[])?;
    read(&mut fio(cluster, &["--rw=write", "--bs=1m", "--iodepth=4"])?)?;
    let mut met = 0;
    for kill in 0..kills {
        // Half of the moves are away from s4, half to it.
        let (order, is_source) = if kill % 2 == 0 { ("drain", true) } else { ("fill", false) };
        let verify = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--verify=crc32c", "--time_based", "--runtime=8"];
        let load = fio(cluster, &verify)?.stdout(std::process::Stdio::piped()).spawn()?;
        let at = dice.below(90);
        let down_for = Duration::from_millis(dice.below(2500));
        read(cluster.petal().args(["server", order, "s4"]))?;
        wait_until_moving(cluster)?;
        let moved = loop {
            let report = reconfiguration(cluster)?;
            let Some(one) = report["moving"].get(0) else { break None };
            let (moved, all) = (one["moved"].as_u64().unwrap_or(0), one["slots"].as_u64().unwrap_or(1));
            if moved * 100 >= at * all {
                break Some(moved * 100 / all);
            }
        };
        let ring_leader = leader(cluster)?;
        let other = ["s1", "s2", "s3"].into_iter().find(|s| *s != ring_leader).context("a ring of three")?;
        let (role, victim) = match kill % 3 {
            0 => ("source", if is_source { "s4" } else { other }),
            1 => ("joiner", if is_source { other } else { "s4" }),
            _ => ("leader", ring_leader.as_str()),
        };
        kill9(pid_of(cluster, victim)?)?;
        met += u64::from(moved.is_some());
        let when = moved.map_or("behind the end".into(), |percent| format!("at {percent} %"));
        println!("{order} s4: {victim} ({role}) is killed {when}, for {down_for:?}");
        std::thread::sleep(down_for);
        cluster.up(&[])?;
        wait_until_moved(cluster)?;
        full_again(cluster)?;
        let said = load.wait_with_output()?;
        ensure!(said.status.success(), "fio ended with {} after kill {kill}", said.status);
        let after = list(cluster)?;
        ensure!((of_server(&after, "s4", "copies")? == 0) == is_source, "after {order}: {after}");
        read(cluster.petal().arg("verify"))?;
    }
    ensure!(met > 0 || kills == 0, "no kill met a move");
    cluster.down()
}

/// A disk gets one copy, two, three and two again while it is written and read back; with three any two servers may die.
pub fn copies_changed(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    read(&mut fio(cluster, &["--rw=write", "--bs=1m", "--iodepth=4"])?)?;
    let set = |copies: u64, more: &[&str]| {
        let copies = copies.to_string();
        read(cluster.petal().args(["disk", "set", "vol0", "--copies", &copies]).args(more))
    };
    let change = |copies: u64| -> Result<()> {
        let plan: Value = serde_json::from_str(&set(copies, &["--dry-run", "--json"])?)?;
        ensure!(plan["copies"] == copies, "{plan}");
        let has = disk_copies(cluster)?;
        let verify = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--verify=crc32c", "--time_based", "--runtime=10"];
        let load = fio(cluster, &verify)?.stdout(std::process::Stdio::piped()).spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        set(copies, &[])?;
        wait_until_moved(cluster)?;
        println!("from {has} copies to {copies} took {:.1} s under writes", begun.elapsed().as_secs_f64());
        let said = load.wait_with_output()?;
        ensure!(said.status.success(), "fio ended with {} while {has} copies became {copies}", said.status);
        ensure!(disk_copies(cluster)? == copies, "it has {} copies instead of {copies}", disk_copies(cluster)?);
        full_again(cluster)?;
        read(cluster.petal().arg("verify"))?;
        Ok(())
    };
    for copies in [1, 2, 3] {
        change(copies)?;
    }
    ensure!(set(3, &[])?.contains("has 3 of everything already"), "the same again is no news");

    let ring_leader = leader(cluster)?;
    let other = ["s1", "s2", "s3"].into_iter().find(|s| *s != ring_leader).context("a ring of three")?;
    for victim in ["s4", other] {
        kill9(pid_of(cluster, victim)?)?;
        declared_down(cluster, victim)?;
    }
    read(&mut fio(cluster, &["--rw=read", "--bs=1m", "--iodepth=4"])?)?;
    println!("all of it is read though s4 and {other} are down");
    cluster.up(&[])?;
    full_again(cluster)?;
    change(2)?;
    cluster.down()
}

fn disk_copies(cluster: &Cluster) -> Result<u64> {
    let about: Value = serde_json::from_str(&read(cluster.petal().args(["disk", "info", "vol0", "--json"]))?)?;
    about["copies"].as_u64().context("no copies")
}
