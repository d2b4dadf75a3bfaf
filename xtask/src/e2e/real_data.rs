//! Real file systems and images, judged by nbdcopy, qemu-img, fsck and diff.

use crate::cluster::{Cluster, kill9};
use crate::run::{command, read, root};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of the image: at least 1 GiB (the issue's "must show").
const IMAGE_SIZE: u64 = 1 << 30;

pub fn image_survives_kill_9(cluster: &Cluster) -> Result<()> {
    let image = ext4_image(cluster.folder())?;
    let image_name = image.to_str().context("the folder's name is not text")?.to_string();
    cluster.up(&[])?;
    let size = IMAGE_SIZE.to_string();
    read(cluster.petal().args(["disk", "create", "img", &size]))?;
    let start = Instant::now();
    read(command("nbdcopy").args([&image_name, &cluster.nbd_uri("img")?]))?;
    println!("nbdcopy in: {:.1} s", start.elapsed().as_secs_f32());

    // A load on the other disk, and all servers die in the middle of it.
    let mut load = fio_load(&cluster.nbd_uri("vol0")?).spawn()?;
    std::thread::sleep(Duration::from_secs(3));
    for pid in cluster.server_pids()? {
        kill9(pid)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    cluster.up(&[])?;
    // The load waits like a hard mount, and goes on.
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = load.try_wait()? {
            break Some(status);
        }
        if Instant::now() > end {
            let _ = load.kill();
            let _ = load.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    ensure!(status.is_some_and(|s| s.success()), "the load did not go on after the restart: {status:?}");

    let out = cluster.folder().join("out.img");
    let out_name = out.to_str().context("the folder's name is not text")?.to_string();
    read(command("nbdcopy").args([&cluster.nbd_uri("img")?, &out_name]))?;
    read(command("cmp").args([&image_name, &out_name]))?;
    let compare = ["compare", "-f", "raw", "-F", "raw", &image_name, &cluster.nbd_uri("img")?].map(String::from);
    read(command("qemu-img").args(compare))?;
    fsck(&out)?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn attached_file_system(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let attach = || -> Result<PathBuf> {
        let text = read(cluster.petal().args(["attach", "vol0", "--json"]))?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        Ok(json["device"].as_str().context("attach named no device")?.into())
    };
    let on = cluster.folder().join("mnt");
    std::fs::create_dir(&on)?;
    let mounted = Mounted(on.clone());
    let source = root().join("crates");

    let device = attach()?;
    read(command("mkfs.ext4").arg("-q").arg(&device))?;
    read(command("mount").args([&device, &on]))?;
    read(command("cp").arg("-r").args([&source, &on]))?;
    read(&mut command("sync"))?;
    let (code, text) = crate::run::read_failure(cluster.petal().args(["detach", "vol0"]))?;
    ensure!(code == 1 && text.contains("in use"), "a mounted disk must not be detached: {text}");
    read(command("umount").arg(&on))?;
    read(cluster.petal().args(["detach", "vol0"]))?;
    let left = cluster.processes().into_iter().find(|(_, line)| line.contains(" attach "));
    ensure!(left.is_none(), "detach left a process: {left:?}");

    let device = attach()?;
    read(command("mount").args([&device, &on]))?;
    read(command("diff").arg("-r").args([&source, &on.join("crates")]))?;
    read(command("umount").arg(&on))?;
    fsck(&device)?;
    read(cluster.petal().args(["detach", "vol0"]))?;
    drop(mounted);
    cluster.down()
}

pub fn qemu_img_converts(cluster: &Cluster) -> Result<()> {
    let folder = cluster.folder().to_path_buf();
    let path = |name: &str| folder.join(name).display().to_string();
    let raw = path("in.raw");
    // Not a multiple of anything large, with holes.
    let size = (200 << 20) + 512 * 3;
    write_pattern(Path::new(&raw), size)?;
    read(command("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2", &raw, &path("in.qcow2")]))?;
    cluster.up(&[])?;
    read(cluster.petal().args(["disk", "create", "q", &size.to_string()]))?;
    let uri = cluster.nbd_uri("q")?;
    read(command("qemu-img").args(["convert", "-n", "-f", "qcow2", "-O", "raw", &path("in.qcow2"), &uri]))?;
    read(command("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2", &uri, &path("out.qcow2")]))?;
    read(command("qemu-img").args(["compare", &path("in.qcow2"), &path("out.qcow2")]))?;
    cluster.down()
}

/// A load that waits for its answers however long they take.
fn fio_load(uri: &str) -> std::process::Command {
    let mut fio = command("fio");
    fio.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=1g"]);
    fio.args(["--time_based", "--runtime=8", "--output-format=terse"]).arg(format!("--uri={uri}"));
    fio.stdout(std::process::Stdio::null());
    fio
}

/// An ext4 image made from real files: the workspace's sources, and what the toolchain installed.
fn ext4_image(folder: &Path) -> Result<PathBuf> {
    let (image, tree) = (folder.join("in.img"), folder.join("tree"));
    std::fs::create_dir(&tree)?;
    read(command("cp").arg("-r").args([&root().join("crates"), &tree]))?;
    let sysroot = read(command("rustc").args(["--print", "sysroot"]))?;
    let documents = Path::new(sysroot.trim()).join("lib");
    if documents.exists() {
        read(command("cp").arg("-r").args([&documents, &tree]))?;
    }
    read(command("truncate").args(["-s", &IMAGE_SIZE.to_string()]).arg(&image))?;
    read(command("mkfs.ext4").args(["-q", "-d"]).args([&tree, &image]))?;
    std::fs::remove_dir_all(&tree)?;
    Ok(image)
}

/// `e2fsck -f -n`: any finding is an error.
fn fsck(on: &Path) -> Result<()> {
    read(command("e2fsck").args(["-f", "-n"]).arg(on)).map(|_| ())
}

/// Numbered 64-bit words in every third MiB, holes elsewhere.
fn write_pattern(path: &Path, size: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path)?;
    file.set_len(size)?;
    for start in (0..size).step_by(3 << 20) {
        let end = (start + (1 << 20)).min(size);
        let words: Vec<u8> = (start / 8..end.div_ceil(8)).flat_map(u64::to_le_bytes).collect();
        file.write_all_at(&words[..(end - start) as usize], start)?;
    }
    Ok(())
}

/// Unmounts on every path out of a scenario.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = crate::run::output(command("umount").arg(&self.0));
    }
}
