//! Snapshots, clones and rollbacks, judged by nbdcopy, cmp, qemu-img, nbdinfo and e2fsck.

use crate::cluster::{Cluster, kill9};
use crate::run::{command, nbdsh, read, read_failure};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

pub(super) fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    let text = read(cluster.petal().args(arguments).arg("--json"))?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed no JSON: {text}"))
}

/// An image of an export in a file.
pub(super) fn image(cluster: &Cluster, disk: &str, file: &str) -> Result<PathBuf> {
    let path = cluster.folder().join(file);
    let name = path.display().to_string();
    read(command("nbdcopy").args([&cluster.nbd_uri(disk)?, &name]))?;
    Ok(path)
}

pub(super) fn same(a: &Path, b: &Path) -> Result<()> {
    read(command("cmp").args([a, b])).map(|_| ())
}

/// Writes to a disk for so many seconds.
fn writer(cluster: &Cluster, disk: &str, seconds: u32) -> Result<Child> {
    let mut fio = command("fio");
    fio.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=128m"]);
    fio.args(["--time_based", "--randrepeat=0", "--output-format=terse", &format!("--runtime={seconds}")]);
    fio.arg(format!("--uri={}", cluster.nbd_uri(disk)?)).stdout(Stdio::null());
    fio.spawn().context("cannot start fio")
}

/// Waits until the writer has written for a while.
fn has_begun(cluster: &Cluster) -> Result<()> {
    let written = || -> Option<u64> {
        let status = cluster.status().ok()?;
        status["servers"].as_array()?.iter().map(|s| s["counters"]["writes"].as_u64()).sum()
    };
    let before = written().context("no counters")?;
    Cluster::wait_for("the load writes", Duration::from_secs(20), || written().is_some_and(|n| n > before + 2000))
}

pub fn stays_as_it_was(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "1GiB"])?;
    let mut load = writer(cluster, "vol0", 15)?;
    has_begun(cluster)?;
    let began = Instant::now();
    read(cluster.petal().args(["snapshot", "create", "vol0", "--name", "s"]))?;
    println!("made under load in {} ms", began.elapsed().as_millis());
    let first = image(cluster, "vol0@s", "first.img")?;
    has_begun(cluster)?;
    let second = image(cluster, "vol0@s", "second.img")?;
    ensure!(load.try_wait()?.is_none(), "the load ended before the snapshot was read twice");
    same(&first, &second).context("the snapshot has changed while its disk was written")?;

    // A clone, written while the load goes on.
    read(cluster.petal().args(["clone", "vol0@s", "copy"]))?;
    let clone = image(cluster, "copy", "clone.img")?;
    same(&first, &clone).context("a clone does not begin with what the snapshot holds")?;
    let patch = "h.pwrite(b'clone' * 20000, 3 << 20); h.zero(1 << 20, 9 << 20); h.flush()";
    read(nbdsh().args(["-u", &cluster.nbd_uri("copy")?, "-c", patch]))?;
    let seen =
        "assert h.pread(100000, 3 << 20) == b'clone' * 20000; assert h.pread(1 << 20, 9 << 20) == bytes(1 << 20)";
    read(nbdsh().args(["-u", &cluster.nbd_uri("copy")?, "-c", seen]))?;
    let status = load.wait()?;
    ensure!(status.success(), "fio ended with {status}");
    same(&first, &image(cluster, "vol0@s", "second.img")?).context("the snapshot has changed")?;

    // What other programs say of them.
    for disk in ["vol0@s", "copy"] {
        let info = read(command("qemu-img").args(["info", "--output=json", &cluster.nbd_uri(disk)?]))?;
        let info: Value = serde_json::from_str(&info)?;
        ensure!(info["virtual-size"] == 1u64 << 30, "{disk}: qemu-img sees another size: {info}");
        let compared = ["compare", "-f", "raw", "-F", "raw"].map(String::from);
        let file = if disk == "copy" { image(cluster, disk, "clone.img")? } else { first.clone() };
        read(command("qemu-img").args(compared).arg(&file).arg(cluster.nbd_uri(disk)?))?;
        map_is_right(cluster, disk, &file)?;
    }
    let read_only = "\
import nbd
assert h.is_read_only()
h.set_strict_mode(0)
try:
    h.pwrite(b'x' * 4096, 0)
except nbd.Error:
    pass
else:
    raise SystemExit('a snapshot was written')
";
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0@s")?, "-c", read_only]))?;

    // Back, with what there was kept.
    let now = image(cluster, "vol0", "now.img")?;
    ensure!(same(&first, &now).is_err(), "the load has written nothing since the snapshot");
    read(cluster.petal().args(["rollback", "vol0", "--to", "s", "--keep", "was"]))?;
    same(&first, &image(cluster, "vol0", "back.img")?).context("after the rollback")?;
    same(&now, &image(cluster, "vol0@was", "was.img")?).context("what the rollback kept")?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// Where `nbdinfo --map` sees holes there are zeros, and it sees some data.
fn map_is_right(cluster: &Cluster, disk: &str, file: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let text = read(command("nbdinfo").args(["--map", "--json", &cluster.nbd_uri(disk)?]))?;
    let map: Value = serde_json::from_str(&text)?;
    let file = std::fs::File::open(file)?;
    let (mut data, mut end) = (0, 0);
    for extent in map.as_array().context("the map is no list")? {
        let field = |name: &str| extent[name].as_u64().with_context(|| format!("an extent without {name}: {extent}"));
        let (offset, length, kind) = (field("offset")?, field("length")?, field("type")?);
        ensure!(offset == end, "{disk}: the map has a gap at {end}");
        end = offset + length;
        if kind == 0 {
            data += length;
            continue;
        }
        let mut bytes = vec![0; 1 << 20];
        for at in (offset..end).step_by(1 << 20) {
            let bytes = &mut bytes[..(end - at).min(1 << 20) as usize];
            file.read_exact_at(bytes, at)?;
            ensure!(bytes.iter().all(|b| *b == 0), "{disk}: a hole at {at} that is not zero");
        }
    }
    ensure!(end == 1 << 30 && data > 0, "{disk}: the map ends at {end} and has {data} bytes of data");
    Ok(())
}

pub fn deleted_in_any_order(cluster: &Cluster) -> Result<()> {
    const SNAPSHOTS: usize = 24;
    cluster.up(&["--size", "1GiB"])?;
    let mut load = writer(cluster, "vol0", 20)?;
    has_begun(cluster)?;
    let mut kept = Vec::new();
    for n in 0..SNAPSHOTS {
        read(cluster.petal().args(["snapshot", "create", "vol0", "--name", &format!("s{n}")]))?;
        if n % 8 == 3 {
            read(cluster.petal().args(["clone", &format!("vol0@s{n}"), &format!("c{n}")]))?;
            let disk = format!("c{n}");
            kept.push((disk.clone(), image(cluster, &disk, &format!("{disk}.img"))?));
        }
    }
    let status = load.wait()?;
    ensure!(status.success(), "fio ended with {status}");
    // An order that is no order, and differs from run to run only in that.
    let mut order: Vec<usize> = (0..SNAPSHOTS).collect();
    let mut drawn = u64::from(std::process::id());
    for n in (1..order.len()).rev() {
        drawn = drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(n, (drawn >> 33) as usize % (n + 1));
    }
    println!("in the order {order:?}");
    let family = |cluster: &Cluster| -> Result<u64> {
        json(cluster, &["disk", "info", "vol0", "--space"])?["space"]["family"].as_u64().context("no space is told")
    };
    let mut used = family(cluster)?;
    for part in order.chunks(5) {
        let names: Vec<String> = part.iter().map(|n| format!("vol0@s{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let told = json(cluster, &[&["snapshot", "delete", "--dry-run"], &names[..]].concat())?;
        let back = told["bytes"].as_u64().context("a dry run without bytes")?;
        ensure!(told["pool_bytes"].as_u64() == Some(2 * back), "two copies come back twice: {told}");
        read(cluster.petal().args(["snapshot", "delete"]).args(&names))?;
        let left = family(cluster)?;
        ensure!(left == used - back, "{used} bytes were used, {back} were to come back, {left} are left");
        used = left;
    }
    for (disk, before) in &kept {
        same(before, &image(cluster, disk, "after.img")?)
            .with_context(|| format!("{disk} after its parent is gone"))?;
    }
    read(cluster.petal().arg("verify"))?;
    let told = json(cluster, &["disk", "delete", "vol0", "--dry-run"])?;
    read(cluster.petal().args(["disk", "delete", "vol0", "--yes"]))?;
    let left = json(cluster, &["disk", "info", &kept[0].0, "--space"])?["space"]["family"].as_u64();
    ensure!(left == told["bytes"].as_u64().map(|back| used - back), "the disk gave back something else: {told}");
    for (disk, before) in &kept {
        same(before, &image(cluster, disk, "after.img")?).with_context(|| format!("{disk} alone"))?;
    }
    // Not only by the accounts: nothing else is on the disks.
    Cluster::wait_for("the servers store what the accounts say", Duration::from_secs(60), || {
        cluster.stored().is_ok_and(|stored| left.is_some_and(|left| stored == 2 * left))
    })?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn commands(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3", "--size", "1GiB"])?;
    let petal = |arguments: &[&str]| read(cluster.petal().args(arguments));
    let fails = |arguments: &[&str], words: &[&str]| -> Result<()> {
        let (code, text) = read_failure(cluster.petal().args(arguments))?;
        ensure!(code == 1, "{arguments:?}: exit code {code}: {text}");
        match words.iter().find(|word| !text.contains(**word)) {
            Some(word) => bail!("{arguments:?}: the message does not say '{word}': {text}"),
            None => Ok(()),
        }
    };
    petal(&["disk", "create", "log", "1GiB"])?;
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", "h.pwrite(b'a' * (1 << 20), 0)"]))?;
    petal(&["snapshot", "create", "vol0", "log", "--name", "both", "--protect"])?;
    let named = json(cluster, &["snapshot", "create", "vol0"])?[0]["name"].as_str().context("no name")?.to_string();
    ensure!(named.starts_with("vol0@20") && named.ends_with('Z'), "a snapshot without a name got {named}");
    petal(&["snapshot", "rename", &named, "second"])?;
    petal(&["clone", "vol0@both", "copy"])?;
    petal(&["snapshot", "create", "copy", "--name", "inner"])?;

    let tree = json(cluster, &["snapshot", "list"])?;
    let lines: Vec<String> =
        tree.as_array().context("no list")?.iter().map(|l| format!("{} {}", l["depth"], l["name"])).collect();
    let expected = [
        "0 \"vol0\"",
        "1 \"vol0@both\"",
        "2 \"copy\"",
        "3 \"copy@inner\"",
        "1 \"vol0@second\"",
        "0 \"log\"",
        "1 \"log@both\"",
    ];
    ensure!(lines == expected, "the tree is {lines:?}");
    ensure!(json(cluster, &["snapshot", "list", "log"])?.as_array().map(Vec::len) == Some(2), "the tree of one disk");
    println!("{}", petal(&["snapshot", "list", "--space"])?);
    println!("{}", petal(&["disk", "list"])?);
    println!("{}", petal(&["disk", "info", "copy", "--space"])?);
    let info = json(cluster, &["disk", "info", "vol0@both", "--space"])?;
    ensure!(info["space"]["used"] == 1 << 20 && info["protected"] == true, "the snapshot's info is {info}");

    fails(&["snapshot", "create", "vol0", "--name", "both"], &["vol0@both", "snapshot delete"])?;
    fails(&["snapshot", "create", "vol0", "--name", "a@b"], &["'@'"])?;
    fails(&["snapshot", "create", "vol0@both"], &["--name both"])?;
    fails(&["snapshot", "create", "nothing"], &["nothing", "disk list"])?;
    // More than the log takes is refused at once, and not waited for.
    fails(&["snapshot", "create", "vol0", "--name", &"x".repeat(70_000)], &["the command has 70", "fewer disks"])?;
    fails(&["snapshot", "create", "vol0", "--freeze"], &["not attached", "--freeze"])?;
    fails(&["snapshot", "delete", "vol0"], &["is a disk", "disk --help"])?;
    fails(&["snapshot", "delete", "vol0@nothing"], &["vol0@nothing", "snapshot list vol0"])?;
    fails(&["snapshot", "delete", "vol0@second", "vol0@both"], &["protected", "snapshot release"])?;
    fails(&["snapshot", "rename", "vol0@second", "both"], &["already"])?;
    fails(&["disk", "delete", "vol0", "--yes"], &["--with-snapshots"])?;
    fails(&["disk", "delete", "vol0@both", "--yes"], &["snapshot delete"])?;
    fails(&["disk", "resize", "vol0@both", "2GiB"], &["snapshot"])?;
    fails(&["clone", "vol0@both", "log"], &["already"])?;
    fails(&["rollback", "vol0", "--to", "log@both"], &["log@both", "snapshot list vol0"])?;
    fails(&["rollback", "vol0", "--to", "none"], &["vol0@none"])?;
    // All or none: the protected one kept the other.
    ensure!(json(cluster, &["disk", "info", "vol0"])?["snapshots"] == 2, "a refused deletion deleted something");

    // Who reads a snapshot is in the way of its deletion, and is named with what to do.
    let code = "import time; open('connected', 'w').close(); time.sleep(60)";
    let uri = cluster.nbd_uri("vol0@second")?;
    let mut reader = nbdsh().current_dir(cluster.folder()).args(["-u", &uri, "-c", code]).spawn()?;
    let mark = cluster.folder().join("connected");
    let connected = Cluster::wait_for("the reader is connected", Duration::from_secs(10), || mark.exists());
    let refused = fails(&["snapshot", "delete", "vol0@second"], &["attached by", "detach --session"]);
    // Its front end dies with it: the session stays, until the next life of the front end meets it.
    let supervisor = cluster.status()?["nbd"]["pid"].as_u64().context("no supervisor")?;
    kill9(supervisor as u32)?;
    let _ = reader.kill();
    let _ = reader.wait();
    connected?;
    refused?;
    cluster.up(&[])?;
    let attached = |cluster: &Cluster| -> Result<usize> {
        let info = json(cluster, &["disk", "info", "vol0@second"])?;
        Ok(info["attached"].as_array().context("no sessions")?.len())
    };
    ensure!(attached(cluster)? == 1, "the dead reader's session is gone by itself");
    read(nbdsh().args(["-u", &uri, "-c", "assert h.pread(4096, 0) == b'a' * 4096"]))?;
    Cluster::wait_for("nobody reads it", Duration::from_secs(10), || attached(cluster).is_ok_and(|n| n == 0))?;
    petal(&["snapshot", "delete", "vol0@second"])?;

    petal(&["snapshot", "release", "vol0@both", "log@both"])?;
    petal(&["disk", "delete", "vol0", "--with-snapshots", "--yes"])?;
    read(nbdsh().args(["-u", &cluster.nbd_uri("copy")?, "-c", "assert h.pread(1 << 20, 0) == b'a' * (1 << 20)"]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn frozen_file_system(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "1GiB"])?;
    let attach = |disk: &str| -> Result<PathBuf> {
        Ok(json(cluster, &["attach", disk])?["device"].as_str().context("attach named no device")?.into())
    };
    let on = cluster.folder().join("mnt");
    std::fs::create_dir(&on)?;
    let mounted = Mounted(on.clone());
    let device = attach("vol0")?;
    read(command("mkfs.ext4").arg("-q").arg(&device))?;
    let (code, text) = read_failure(cluster.petal().args(["snapshot", "create", "vol0", "--freeze"]))?;
    ensure!(code == 1 && text.contains("not mounted"), "{code}: {text}");
    read(command("mount").args([&device, &on]))?;

    // Somebody writes and syncs all the time; the file system never rests.
    let script = "n=0; while :; do n=$((n+1)); echo $n > $0/f$((n%50)); dd if=/dev/zero of=$0/d bs=64k count=4 conv=fsync 2>/dev/null; done";
    let mut busy = command("sh").args(["-c", script]).arg(&on).spawn()?;
    let result = (|| -> Result<()> {
        let file = on.join("f40");
        Cluster::wait_for("the file system is in use", Duration::from_secs(20), || file.exists())?;
        read(cluster.petal().args(["snapshot", "create", "vol0", "--name", "running"]))?;
        read(cluster.petal().args(["snapshot", "create", "vol0", "--name", "frozen", "--freeze"]))?;
        goes_on(&on)?;
        freezer_thaws(cluster, &on)?;
        goes_on(&on)?;
        freezer_gives_up(cluster, &on)?;
        goes_on(&on)
    })();
    let _ = busy.kill();
    let _ = busy.wait();
    result?;

    // The one made while it stood still has no journal to replay, the other has.
    let journal = |snapshot: &str| -> Result<bool> {
        let device = attach(snapshot)?;
        let features = read(command("dumpe2fs").arg("-h").arg(&device))?;
        if !features.contains("needs_recovery") {
            read(command("e2fsck").args(["-f", "-n"]).arg(&device))?;
        }
        let (code, text) = read_failure(cluster.petal().args(["attach", snapshot]))?;
        ensure!(code == 1 && text.contains("is attached as"), "{text}");
        read(cluster.petal().args(["detach", snapshot]))?;
        Ok(features.contains("needs_recovery"))
    };
    ensure!(journal("vol0@running")?, "a running file system has nothing to replay: this shows nothing");
    ensure!(!journal("vol0@frozen")?, "the frozen file system has a journal to replay");
    read(command("umount").arg(&on))?;
    read(cluster.petal().args(["detach", "vol0"]))?;
    drop(mounted);

    // As after a power cut: what a clone's file system replays is consistent.
    read(cluster.petal().args(["clone", "vol0@running", "copy"]))?;
    let device = attach("copy")?;
    let repaired = crate::run::output(command("e2fsck").args(["-f", "-p"]).arg(&device))?;
    ensure!(matches!(repaired.status.code(), Some(0 | 1)), "e2fsck: {}", crate::run::tail(&repaired));
    read(command("e2fsck").args(["-f", "-n"]).arg(&device))?;
    read(cluster.petal().args(["detach", "copy"]))?;
    cluster.down()
}

/// A file system that stands still would hold this up.
fn goes_on(on: &Path) -> Result<()> {
    read(command("timeout").args(["20", "touch"]).arg(on.join("goes-on")))
        .map(|_| ())
        .context("the file system stands still")
}

/// The freezer thaws when whoever started it is gone.
fn freezer_thaws(cluster: &Cluster, on: &Path) -> Result<()> {
    let mut freezer = cluster.petal();
    let mut freezer = freezer.arg("freeze-until-left").arg(on).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut told = freezer.stdin.take().context("no pipe")?;
    let mut words = BufReader::new(freezer.stdout.take().context("no pipe")?).lines();
    let mut next = || words.next().context("the freezer has ended")?.context("no word");
    ensure!(next()? == "written back");
    told.write_all(b"f")?;
    ensure!(next()? == "frozen");
    let (code, _) = read_failure(command("fsfreeze").arg("-f").arg(on))?;
    ensure!(code == 1, "it can be frozen once more, so it was not");
    drop(told);
    ensure!(next()? == "thawed");
    freezer.wait()?;
    Ok(())
}

/// Nobody decides anything, and the disk takes no writes: an error in time, and it goes on when it can.
fn freezer_gives_up(cluster: &Cluster, on: &Path) -> Result<()> {
    let pids = cluster.server_pids()?;
    pids[..2].iter().try_for_each(|pid| kill9(*pid))?;
    let begun = Instant::now();
    let create = ["snapshot", "create", "vol0", "--name", "nobody", "--freeze"];
    let mut limited = command("timeout");
    limited.env("PETAL_CLUSTER", cluster.data()).arg("120").arg(cluster.petal().get_program()).args(create);
    let (code, text) = read_failure(&mut limited)?;
    ensure!(
        code == 1 && begun.elapsed() < Duration::from_secs(100),
        "exit code {code} after {:?}: {text}",
        begun.elapsed()
    );
    cluster.up(&[])?;
    goes_on(on)?;
    read(cluster.petal().args(["snapshot", "create", "vol0", "--name", "again", "--freeze"]))?;
    Ok(())
}

pub fn made_by_the_cluster(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "1GiB"])?;
    read(cluster.petal().args(["snapshot", "policy", "vol0", "--hourly", "2", "--daily", "1"]))?;
    let automatic = |disk: &str, kind: &str| -> Result<usize> {
        let tree = json(cluster, &["snapshot", "list", disk])?;
        let names = tree.as_array().context("no list")?.iter().filter_map(|l| l["name"].as_str());
        Ok(names.filter(|name| name.contains(&format!("@auto-{kind}-"))).count())
    };
    let has = |disk: &str, kind: &str| automatic(disk, kind).is_ok_and(|n| n > 0);
    let limit = Duration::from_secs(30);
    Cluster::wait_for("the cluster makes them", limit, || has("vol0", "hourly") && has("vol0", "daily"))?;
    let hour = || {
        Ok::<u64, anyhow::Error>(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() / 3600)
    };
    let (before, now) = (automatic("vol0", "hourly")?, hour()?);

    // Another leader looks at all disks, and makes nothing that is there.
    let status = cluster.status()?;
    let servers = status["servers"].as_array().context("no servers")?;
    let leader = servers.iter().find(|s| s["leads"] == true).context("nobody leads")?;
    kill9(leader["pid"].as_u64().context("the leader has no pid")? as u32)?;
    cluster.up(&[])?;
    read(cluster.petal().args(["disk", "create", "other", "1GiB"]))?;
    read(cluster.petal().args(["snapshot", "policy", "other", "--hourly", "1"]))?;
    Cluster::wait_for("the new leader makes one of another disk", limit, || has("other", "hourly"))?;
    let after = automatic("vol0", "hourly")?;
    ensure!(
        after == before || hour()? > now,
        "{before} hourly snapshots were made, and {after} after another leader came"
    );
    ensure!(automatic("vol0", "weekly")? == 0, "a kind that was not asked for was made");
    println!("{}", read(cluster.petal().args(["snapshot", "list"]))?);
    cluster.down()
}

/// Unmounts on every path out of a scenario.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = crate::run::output(command("umount").arg(&self.0));
    }
}
