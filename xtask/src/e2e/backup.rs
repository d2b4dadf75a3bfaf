//! Diff, export, import and flatten: streams into another cluster, judged by cmp and qemu-img, and everything that
//! must be refused.

use super::snapshots::{image, json, same};
use crate::cluster::{Cluster, kill9};
use crate::run::{command, nbdsh, read, read_failure};
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

const INCREMENTS: u32 = 10;
const MIB: u64 = 1 << 20;

fn petal(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    read(cluster.petal().args(arguments))
}

/// It ends with exit code 1 and says all of these words.
fn fails(cluster: &Cluster, arguments: &[&str], words: &[&str]) -> Result<()> {
    let (code, text) = read_failure(cluster.petal().args(arguments))?;
    ensure!(code == 1, "{arguments:?}: exit code {code}: {text}");
    let missing = words.iter().find(|word| !text.contains(**word));
    ensure!(missing.is_none(), "{arguments:?}: the message does not say '{}': {text}", missing.unwrap_or(&""));
    Ok(())
}

/// Python in nbdsh, connected to a disk.
fn write(cluster: &Cluster, disk: &str, code: &str) -> Result<()> {
    read(nbdsh().args(["-u", &cluster.nbd_uri(disk)?, "-c", code])).map(|_| ())
}

/// Random blocks, some zeros, some discarded, some written again as they were.
fn change(cluster: &Cluster, seed: u32) -> Result<()> {
    let code = format!(
        "\
import random
r = random.Random({seed})
size = h.get_size()
for n in range(150):
    h.pwrite(r.randbytes(4096 * r.randint(1, 5)), 4096 * r.randrange(size // 4096 - 8))
h.zero(1 << 20, 4096 * r.randrange(size // 4096 - 256))
h.trim(1 << 20, 4096 * r.randrange(size // 4096 - 256))
at = 4096 * r.randrange(size // 4096)
h.pwrite(h.pread(4096, at), at)
h.pwrite(b'odd', 4096 * r.randrange(size // 4096) + 77)
h.flush()
"
    );
    write(cluster, "vol0", &code)
}

fn file(cluster: &Cluster, name: &str) -> String {
    cluster.folder().join(name).display().to_string()
}

fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let tree = json(cluster, &["snapshot", "list"])?;
    let lines = tree.as_array().context("no list")?.iter();
    Ok(lines.filter_map(|l| l["name"].as_str().map(String::from)).collect())
}

/// A disk with a full stream and increments of it: 0.petal, 1.petal, ...
fn source(cluster: &Cluster, increments: u32) -> Result<()> {
    cluster.up(&["--size", "48MiB"])?;
    write(cluster, "vol0", "import random; h.pwrite(random.Random(1).randbytes(20 << 20), 3 << 20)")?;
    for n in 0..=increments {
        if n > 0 {
            change(cluster, n)?;
        }
        if n == increments / 2 {
            // Not a whole number of blocks.
            petal(cluster, &["disk", "resize", "vol0", "104858112"])?;
            write(cluster, "vol0", "h.pwrite(b'end', h.get_size() - 3)")?;
        }
        petal(cluster, &["snapshot", "create", "vol0", "--name", &format!("s{n}")])?;
        let (snapshot, stream) = (format!("vol0@s{n}"), file(cluster, &format!("{n}.petal")));
        let parent = format!("vol0@s{}", n.saturating_sub(1));
        let from: &[&str] = if n > 0 { &["--from", &parent] } else { &[] };
        petal(cluster, &[&["export", snapshot.as_str(), &stream], from].concat())?;
        petal(cluster, &["stream", "verify", &stream])?;
    }
    Ok(())
}

pub fn chain(cluster: &Cluster) -> Result<()> {
    source(cluster, INCREMENTS)?;
    let other = cluster.another("backup")?;
    other.up(&["--servers", "3", "--size", "16MiB"])?;
    for n in 0..=INCREMENTS {
        petal(&other, &["import", &file(cluster, &format!("{n}.petal")), "copy"])?;
    }
    for n in 0..=INCREMENTS {
        let from = image(cluster, &format!("vol0@s{n}"), "from.img")?;
        same(&from, &image(&other, &format!("copy@s{n}"), "to.img")?).with_context(|| format!("s{n}"))?;
        if n > 0 {
            diff_is_right(cluster, n, &from)?;
        }
        std::fs::rename(&from, cluster.folder().join("before.img"))?;
    }
    let compare = ["compare", "-f", "raw", "-F", "raw"];
    read(command("qemu-img").args(compare).args([cluster.nbd_uri("vol0")?, other.nbd_uri("copy")?]))?;

    // Another way to the same image: raw, by file and by pipe.
    let last = format!("copy@s{INCREMENTS}");
    let raw = other.folder().join("raw.img");
    petal(&other, &["export", &last, &raw.display().to_string(), "--raw"])?;
    same(&cluster.folder().join("before.img"), &raw)?;
    let piped = std::fs::File::create(other.folder().join("piped.img"))?;
    let status = other.petal().args(["export", &last, "-", "--raw"]).stdout(piped).status()?;
    ensure!(status.success(), "the export to standard output ended with {status}");
    same(&raw, &other.folder().join("piped.img"))?;

    // What was interrupted goes on to the same bytes.
    let (whole, part) = (file(cluster, "0.petal"), file(cluster, "part.petal"));
    std::fs::copy(&whole, &part)?;
    std::fs::OpenOptions::new().write(true).open(&part)?.set_len(std::fs::metadata(&whole)?.len() * 2 / 3)?;
    fails(cluster, &["stream", "verify", &part], &["part.petal"])?;
    petal(cluster, &["export", "vol0@s0", &part])?;
    same(Path::new(&whole), Path::new(&part))?;
    for cluster in [&other, cluster] {
        petal(cluster, &["verify"])?;
        cluster.down()?;
    }
    Ok(())
}

/// Outside of what `petal diff` tells nothing differs; inside lies not much more than what was written.
fn diff_is_right(cluster: &Cluster, n: u32, now: &Path) -> Result<()> {
    let (older, newer) = (format!("vol0@s{}", n - 1), format!("vol0@s{n}"));
    let told = json(cluster, &["diff", &older, &newer])?;
    let mut extents = Vec::new();
    for extent in told.as_array().context("no list of extents")? {
        let field = |name: &str| extent[name].as_u64().with_context(|| format!("an extent without {name}: {extent}"));
        extents.push((field("offset")?, field("length")?));
    }
    ensure!(extents.windows(2).all(|e| e[0].0 + e[0].1 < e[1].0), "they do not ascend, or touch: {extents:?}");
    let (before, now) = (std::fs::File::open(cluster.folder().join("before.img"))?, std::fs::File::open(now)?);
    let size = now.metadata()?.len().min(before.metadata()?.len());
    let (mut a, mut b) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for at in (0..size).step_by(MIB as usize) {
        let length = MIB.min(size - at) as usize;
        before.read_exact_at(&mut a[..length], at)?;
        now.read_exact_at(&mut b[..length], at)?;
        for (block, (a, b)) in a[..length].chunks(4096).zip(b[..length].chunks(4096)).enumerate() {
            let at = at + 4096 * block as u64;
            let within = extents.iter().any(|(offset, length)| (*offset..offset + length).contains(&at));
            ensure!(a == b || within, "{older} and {newer} differ at {at}, and the diff does not say so");
        }
    }
    let told: u64 = extents.iter().map(|(_, length)| length).sum();
    // At most 150 writes of 5 blocks, zeros, discards, two single blocks, and the end of a disk that grew.
    let most = (750 + 3) * 4096 + 2 * MIB;
    ensure!(told <= most && told >= 150 * 4096, "{told} bytes are said to differ between {older} and {newer}");
    Ok(())
}

pub fn refused(cluster: &Cluster) -> Result<()> {
    source(cluster, 3)?;
    let stream = |n: u32| file(cluster, &format!("{n}.petal"));
    let other = cluster.another("refused")?;
    other.up(&["--servers", "3", "--size", "16MiB"])?;

    // Exports that make no sense.
    let out = file(cluster, "out.petal");
    fails(cluster, &["export", "vol0", &out], &["snapshot create vol0"])?;
    fails(cluster, &["export", "vol0@none", &out], &["vol0@none"])?;
    fails(cluster, &["export", "vol0@s1", &out, "--from", "vol0@s2"], &["no earlier snapshot"])?;
    fails(cluster, &["export", "vol0@s1", &out, "--from", "vol0"], &["no earlier snapshot"])?;
    fails(cluster, &["export", "vol0@s1", &stream(0)], &["exists", "another name"])?;
    fails(cluster, &["export", "vol0@s1", &stream(0), "--raw"], &["never written over"])?;
    fails(cluster, &["export", "vol0@s1", &out, "--from", "vol0@s1"], &["itself", "earlier snapshot"])?;
    let folder = cluster.folder().display().to_string();
    fails(cluster, &["export", "vol0@s1", &folder], &["is a folder", "vol0-s1.petal"])?;
    fails(cluster, &["export", "vol0@s1", &folder, "--raw"], &["is a folder", "vol0-s1.img"])?;
    let (_, text) = read_failure(cluster.petal().args(["export", "vol0@s1", "/dev/full"]))?;
    ensure!(text.matches("No space left").count() == 1, "a full disk is told once: {text}");
    ensure!(!Path::new(&out).exists(), "a refused export left a file");
    petal(cluster, &["disk", "create", "stranger", "64MiB"])?;
    fails(cluster, &["diff", "vol0@s1", "stranger"], &["nothing in common"])?;

    // Imports.
    fails(&other, &["import", "-", "copy"], &["standard input", "it is empty"])?;
    fails(&other, &["import", &folder, "copy"], &["is a folder"])?;
    fails(&other, &["import", &stream(0), "copy@s0"], &["names a snapshot", "'copy'"])?;
    fails(&other, &["import", &stream(1), "copy"], &["does not have", "import that first"])?;
    fails(&other, &["import", &stream(0), "vol0"], &["already", "another name"])?;
    ensure!(names(&other)? == ["vol0"], "refused imports left {:?}", names(&other)?);
    petal(&other, &["import", &stream(0), "copy"])?;
    fails(&other, &["import", &stream(2), "copy"], &["copy"])?;
    fails(&other, &["import", &stream(1), "vol0"], &["vol0"])?;
    let said = read_stderr(&other, &["import", &stream(0), "copy"])?;
    ensure!(said.contains("already"), "the same stream again: {said}");
    ensure!(names(&other)? == ["vol0", "copy", "copy@s0"], "refused imports left {:?}", names(&other)?);
    // Somebody has written to it: the increment would make something that never was.
    write(&other, "copy", "h.pwrite(b'x' * 4096, 0); h.flush()")?;
    Cluster::wait_for("nobody has it attached", Duration::from_secs(10), || {
        json(&other, &["disk", "info", "copy"]).is_ok_and(|info| info["attached"].as_array().is_some_and(Vec::is_empty))
    })?;
    fails(&other, &["import", &stream(1), "copy"], &["was changed", "petal rollback copy --to copy@s0"])?;
    petal(&other, &["rollback", "copy", "--to", "copy@s0", "--discard"])?;
    petal(&other, &["import", &stream(1), "copy"])?;
    same(&image(cluster, "vol0@s1", "from.img")?, &image(&other, "copy", "to.img")?)?;
    // A chain goes on from the snapshot that was gone back to.
    petal(&other, &["rollback", "copy", "--to", "copy@s0", "--discard"])?;
    fails(&other, &["import", &stream(1), "copy"], &["copy@s1", "rename or delete it first"])?;
    petal(&other, &["snapshot", "delete", "copy@s1"])?;
    petal(&other, &["import", &stream(1), "copy"])?;
    same(&image(cluster, "vol0@s1", "from.img")?, &image(&other, "copy", "to.img")?)?;
    // One that was killed before it began leaves an empty disk, which is as good as none; and whose snapshot is gone
    // does not hold the state.
    let size = json(cluster, &["disk", "info", "vol0@s0"])?["size"].as_u64().context("a disk has no size")?;
    petal(&other, &["disk", "create", "begun", &size.to_string()])?;
    petal(&other, &["import", &stream(0), "begun"])?;
    same(&image(cluster, "vol0@s0", "from.img")?, &image(&other, "begun", "to.img")?)?;
    petal(&other, &["snapshot", "delete", "begun@s0"])?;
    fails(&other, &["import", &stream(0), "begun"], &["is gone"])?;
    petal(&other, &["disk", "delete", "begun", "--yes"])?;

    // Cut, or with one bit flipped, wherever: no snapshot, and the whole stream can be taken in behind it.
    let whole = std::fs::read(stream(2))?;
    let broken = file(cluster, "broken.petal");
    let length = whole.len();
    for n in 0..12 {
        let at = (length - 1) * n / 11;
        let bytes = if n % 2 == 0 {
            whole[..at].to_vec()
        } else {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (n % 8);
            bytes
        };
        std::fs::write(&broken, &bytes)?;
        fails(&other, &["stream", "verify", &broken], &["broken.petal"])?;
        let (_, text) = read_failure(other.petal().args(["import", &broken, "copy"]))?;
        // Where the record begins that is not right, or where the cut is.
        let told = text.split_once("refused at byte ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        let record = 128 << 10;
        ensure!(
            told.is_some_and(|told: usize| told <= at && at - told < record) || (at == 0 && text.contains("empty")),
            "{told:?} is told for {at} of {length}: {text}"
        );
        ensure!(names(&other)?.iter().all(|name| name != "copy@s2"), "a broken stream made a snapshot");
    }
    petal(&other, &["import", &stream(2), "copy"])?;
    same(&image(cluster, "vol0@s2", "from.img")?, &image(&other, "copy", "to.img")?)?;
    petal(&other, &["verify"])?;
    other.down()?;
    no_space(cluster)?;
    cluster.down()
}

fn read_stderr(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let output = crate::run::output(cluster.petal().args(arguments))?;
    ensure!(output.status.success(), "{arguments:?} ended with {}", output.status);
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A stream that is larger than the other cluster.
fn no_space(cluster: &Cluster) -> Result<()> {
    petal(cluster, &["disk", "create", "big", "512MiB"])?;
    let code =
        "import random; r = random.Random(2)\nfor n in range(40): h.pwrite(r.randbytes(10 << 20), n * (10 << 20))";
    write(cluster, "big", code)?;
    petal(cluster, &["snapshot", "create", "big", "--name", "s"])?;
    let stream = file(cluster, "big.petal");
    petal(cluster, &["export", "big@s", &stream])?;
    let small = cluster.another("small")?;
    small.up(&["--servers", "3", "--disk-size", "128MiB", "--size", "16MiB"])?;
    fails(&small, &["import", &stream, "big"], &["space", "make room", "delete the disk"])?;
    ensure!(names(&small)? == ["vol0", "big"], "left are {:?}", names(&small)?);
    petal(&small, &["disk", "delete", "big", "--yes"])?;
    // The room is there again.
    petal(&small, &["import", &file(cluster, "0.petal"), "copy"])?;
    same(&image(cluster, "vol0@s0", "from.img")?, &image(&small, "copy", "to.img")?)?;
    petal(&small, &["verify"])?;
    small.down()
}

/// A command that does not end by itself, with a pipe to it or from it.
fn held(cluster: &Cluster, arguments: &[&str], stream: &[u8]) -> Result<Child> {
    let mut petal = cluster.petal();
    petal.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = petal.spawn().context("cannot start petal")?;
    child.stdin.as_mut().context("no pipe")?.write_all(stream)?;
    Ok(child)
}

/// It ends by this signal; what it said.
fn signalled(mut child: Child, signal: &str) -> Result<String> {
    read(command("kill").args([signal, &child.id().to_string()]))?;
    let mut ended = Ok(None);
    Cluster::wait_for(&format!("the end by {signal}"), Duration::from_secs(20), || {
        ended = child.try_wait();
        !matches!(ended, Ok(None))
    })?;
    ensure!(ended?.is_some_and(|status| !status.success()), "it ended well by {signal}");
    let output = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn sessions(cluster: &Cluster, disk: &str) -> Result<Vec<String>> {
    let info = json(cluster, &["disk", "info", disk])?;
    let attached = info["attached"].as_array().context("no sessions")?.iter();
    Ok(attached.filter_map(|s| s["session"].as_str().map(String::from)).collect())
}

fn is_attached(cluster: &Cluster, disk: &str) -> Result<()> {
    let is_attached = || sessions(cluster, disk).is_ok_and(|sessions| sessions.len() == 1);
    Cluster::wait_for(&format!("{disk} is attached"), Duration::from_secs(20), is_attached)
}

fn is_unfinished(cluster: &Cluster) -> bool {
    json(cluster, &["disk", "info", "copy"]).is_ok_and(|info| info["import_unfinished"] == true)
}

pub fn interrupted(cluster: &Cluster) -> Result<()> {
    source(cluster, 1)?;
    let other = cluster.another("interrupted")?;
    other.up(&["--servers", "3", "--size", "16MiB"])?;
    interrupted_imports(cluster, &other)?;
    interrupted_exports(cluster)?;
    for cluster in [&other, cluster] {
        petal(cluster, &["verify"])?;
        cluster.down()?;
    }
    Ok(())
}

fn interrupted_imports(cluster: &Cluster, other: &Cluster) -> Result<()> {
    let stream = file(cluster, "0.petal");
    let whole = std::fs::read(&stream)?;
    // With one check mark.
    let begin = || -> Result<Child> {
        let child = held(other, &["import", "-", "copy"], &whole[..whole.len() * 9 / 10])?;
        is_attached(other, "copy")?;
        Cluster::wait_for("the import has begun", Duration::from_secs(20), || is_unfinished(other))?;
        Ok(child)
    };
    for signal in ["-INT", "-TERM", "-HUP"] {
        let said = signalled(begin()?, signal)?;
        ensure!(said.contains("'copy' has not ended"), "it says nothing of what it leaves: {said}");
        ensure!(sessions(other, "copy")?.is_empty(), "{signal} left a session");
    }
    for list in ["disk", "snapshot"] {
        let all = json(other, &[list, "list"])?;
        let copy = all.as_array().context("no list")?.iter().find(|d| d["name"] == "copy").context("no copy")?;
        ensure!(copy["import_unfinished"] == true, "{list} list: {copy}");
        let text = petal(other, &[list, "list"])?;
        ensure!(text.contains("import unfinished"), "{list} list: {text}");
    }
    let text = petal(other, &["disk", "info", "copy"])?;
    ensure!(text.contains("unfinished"), "disk info: {text}");

    // Until it has ended only an import uses it, and nothing is made of it.
    read_failure(nbdsh().args(["-u", &other.nbd_uri("copy")?, "-c", "h.pread(4096, 4 << 20)"]))?;
    read_failure(nbdsh().args(["-u", &other.nbd_uri("copy")?, "-c", "h.pwrite(b'x' * 4096, 4 << 20)"]))?;
    fails(other, &["bench", "copy", "--write", "--seconds", "1"], &["has not ended", "petal import FILE copy"])?;
    fails(other, &["snapshot", "create", "copy", "--name", "half"], &["has not ended"])?;
    fails(other, &["clone", "copy", "half"], &["has not ended"])?;
    fails(other, &["disk", "resize", "copy", "4MiB", "--shrink"], &["has not ended"])?;

    // One that was killed stands in the way until it is told to be gone. What it was known to have written need not be
    // written again.
    let mut killed = begin()?;
    let reached = || json(other, &["disk", "info", "copy"]).is_ok_and(|info| info["import_reached"].as_u64() > Some(0));
    Cluster::wait_for("it is known how far the import has come", Duration::from_secs(20), reached)?;
    kill9(killed.id())?;
    killed.wait()?;
    ensure!(sessions(other, "copy")?.len() == 1, "the session of a dead import is gone by itself");
    fails(other, &["import", &stream, "copy"], &["attached by petal import", "--take-over"])?;
    let imported = json(other, &["import", &stream, "copy", "--take-over"])?;
    let (bytes, before) = (imported["bytes"].as_u64(), imported["written_before"].as_u64());
    ensure!(before > Some(0) && before < bytes, "{before:?} of {bytes:?} bytes had been written before");
    ensure!(!is_unfinished(other) && sessions(other, "copy")?.is_empty(), "the import has not ended");
    let from = image(cluster, "vol0@s0", "from.img")?;
    same(&from, &image(other, "copy@s0", "to.img")?)?;
    same(&from, &image(other, "copy", "to.img")?)?;
    write(other, "copy", "h.pwrite(b'x' * 4096, 4 << 20); h.flush()")
}

fn interrupted_exports(cluster: &Cluster) -> Result<()> {
    let begin = || -> Result<Child> {
        let child = held(cluster, &["export", "vol0@s0", "-"], &[])?;
        is_attached(cluster, "vol0@s0")?;
        Ok(child)
    };
    for signal in ["-INT", "-TERM", "-HUP"] {
        signalled(begin()?, signal)?;
        ensure!(sessions(cluster, "vol0@s0")?.is_empty(), "{signal} left a session");
    }
    // An image gets its name when it is whole; what one that was killed left is in nobody's way.
    let (image_file, part) = (cluster.folder().join("raw.img"), cluster.folder().join("raw.img.part"));
    let raw = ["export", "vol0@s0", "raw.img", "--raw"];
    let mut killed = command("prlimit");
    killed.arg("--fsize=8388608").arg(cluster.petal().get_program()).args(raw);
    killed.current_dir(cluster.folder()).env("PETAL_CLUSTER", cluster.data());
    let output = crate::run::output(&mut killed)?;
    ensure!(output.status.signal().is_some(), "the export was not killed: {}", crate::run::tail(&output));
    ensure!(!image_file.exists() && part.exists(), "a part of an image has the name of the whole");
    let left = sessions(cluster, "vol0@s0")?;
    ensure!(left.len() == 1, "the session of a dead export: {left:?}");
    petal(cluster, &raw)?;
    ensure!(
        sessions(cluster, "vol0@s0")?.is_empty(),
        "the next program on this machine did not end the dead one's session"
    );
    ensure!(!part.exists(), "the part is left beside the whole image");
    same(&image(cluster, "vol0@s0", "from.img")?, &image_file)?;

    // One that lives is named where it is in the way, with what ends it.
    let mut child = begin()?;
    let lives = sessions(cluster, "vol0@s0")?;
    let [session] = &lives[..] else { anyhow::bail!("one program reads: {lives:?}") };
    let remedy = format!("petal detach --session {session}");
    fails(cluster, &["snapshot", "delete", "vol0@s0"], &["petal export (pid", &remedy])?;
    child.kill()?;
    child.wait()?;
    petal(cluster, &["snapshot", "delete", "vol0@s0"]).map(drop)
}

pub fn flattened(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "128MiB"])?;
    write(cluster, "vol0", "import random; h.pwrite(random.Random(1).randbytes(20 << 20), 3 << 20)")?;
    petal(cluster, &["snapshot", "create", "vol0", "--name", "s"])?;
    petal(cluster, &["clone", "vol0@s", "copy"])?;
    petal(cluster, &["clone", "vol0@s", "with-snapshot"])?;
    write(cluster, "copy", "h.pwrite(b'c' * 8192, 4 << 20); h.zero(1 << 20, 5 << 20); h.flush()")?;
    change(cluster, 7)?;
    let before = image(cluster, "copy", "before.img")?;
    let space = |disk: &str, what: &str| -> Result<u64> {
        json(cluster, &["disk", "info", disk, "--space"])?["space"][what].as_u64().context("no space is told")
    };
    let used = space("copy", "family")?;
    ensure!(petal(cluster, &["disk", "flatten", "vol0"])?.contains("no clone"), "there is nothing to be done");
    fails(cluster, &["disk", "flatten", "vol0@s"], &["snapshot", "name a disk"])?;
    // Nobody waits for it; another one is told that it goes on, and waits.
    let begun = json(cluster, &["disk", "flatten", "copy", "--detach"])?;
    ensure!(begun["flattening"] == true, "{begun}");
    let is_done = || json(cluster, &["disk", "info", "copy"]).is_ok_and(|info| info["flattening"].is_null());
    Cluster::wait_for("copy is flattened", Duration::from_secs(30), is_done)?;
    ensure!(json(cluster, &["disk", "flatten", "copy"])?["done"] == true, "it is done already");
    petal(cluster, &["disk", "flatten", "copy", "--stop"])?;
    ensure!(sessions(cluster, "copy")?.is_empty(), "flattening left a session");
    petal(cluster, &["clone", "vol0@s", "second"])?;
    let second = image(cluster, "second", "second.img")?;
    let done = json(cluster, &["disk", "flatten", "second"])?;
    ensure!(done["done"] == true, "{done}");
    same(&second, &image(cluster, "second", "after.img")?)?;
    petal(cluster, &["disk", "delete", "second", "--yes"])?;
    ensure!(space("copy", "family")? == used, "flattening took space: {used}, then {}", space("copy", "family")?);
    petal(cluster, &["snapshot", "create", "with-snapshot", "--name", "t"])?;
    fails(cluster, &["disk", "flatten", "with-snapshot"], &["with-snapshot@t"])?;
    let parents = image(cluster, "with-snapshot", "with.img")?;
    same(&before, &image(cluster, "copy", "after.img")?)?;

    // Its parents go, and nothing of them stays but what it shows.
    petal(cluster, &["disk", "delete", "vol0", "--with-snapshots", "--yes"])?;
    same(&parents, &image(cluster, "with-snapshot", "after.img")?)?;
    petal(cluster, &["disk", "delete", "with-snapshot", "--with-snapshots", "--yes"])?;
    same(&before, &image(cluster, "copy", "after.img")?)?;
    let (family, shown) = (space("copy", "family")?, space("copy", "used")?);
    ensure!(family == shown && family == 20 * MIB - MIB, "{family} bytes are left, {shown} are shown");
    petal(cluster, &["verify"])?;
    cluster.down()
}
