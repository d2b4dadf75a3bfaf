//! Debian packages that tests and benchmarks use, installed where they are missing.

use crate::run::{self, command};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// `(program, package)`: the package is needed if the program is not found.
const NEEDED: [(&str, &str); 14] = [
    ("fio", "fio"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    ("nbdkit", "nbdkit"),
    ("qemu-img", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mount", "mount"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("pg_amcheck", "postgresql"),
    ("faketime", "faketime"),
];

/// Installs what is missing, with apt-get (as root). Fails with the list where that cannot be done.
pub fn install_missing() -> Result<()> {
    let mut missing: Vec<&str> =
        NEEDED.iter().filter(|(p, _)| find(p).is_none()).map(|(_, package)| *package).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let advice = format!("install these Debian packages: {}", missing.join(" "));
    if find("apt-get").is_none() {
        bail!("{advice}");
    }
    run::read(command("apt-get").args(["update", "-qq"])).context(advice.clone())?;
    let mut install = command("apt-get");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    install.env("DEBIAN_FRONTEND", "noninteractive");
    run::read(&mut install).context(advice)?;
    Ok(())
}

/// Where a program is, as a shell would find it; sbin included, where file system tools are, and the place where
/// Debian keeps those of PostgreSQL, the newest version first.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = path.split(':').chain(["/usr/sbin", "/sbin"]).map(PathBuf::from).collect();
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    versions.sort();
    folders.extend(versions.into_iter().rev());
    folders.into_iter().map(|folder| folder.join(program)).find(|p| p.is_file())
}
