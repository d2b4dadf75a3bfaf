//! A server's disks as a person names them: formatting them, and opening them all or refusing.

use crate::server_config::Owner;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::Genesis;
use petal::ids::{ClusterId, DiskId, Incarnation, ServerId};
use petal::store::OpenDisk;
use petal::store::superblock::{FormatParams, Superblock};
use petal_io::disk::{DirectIo, Engine, EngineDisk, EngineOptions, Format, FoundDisk};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Bytes of the data region that are written when a disk file is made: the first writes find room
/// while the file grows ahead of them.
const FIRST_DATA: u64 = 16 << 20;

/// 128 random bits.
pub fn random() -> Result<u128> {
    let mut bytes = [0; 16];
    let source = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    source.context("cannot read /dev/urandom")?;
    Ok(u128::from_le_bytes(bytes))
}

/// Token by which a server asks to become a member: the same for the same server, so that asking again
/// after a failure does not make another one.
pub fn join_token(cluster: ClusterId, addresses: &[String]) -> u128 {
    let text = addresses.join(",");
    let half = |salt: u32| u128::from(stdx::checksum::crc32c_append(salt, text.as_bytes()));
    cluster.0 ^ (half(1) | half(2) << 32 | 1 << 127)
}

/// The superblock of a disk that may be in use.
pub fn read_superblock(path: &Path) -> Result<Superblock> {
    let mut area = vec![0; petal_io::disk::SUPERBLOCK_AREA];
    let read = std::fs::File::open(path).and_then(|f| f.take(area.len() as u64).read(&mut area));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    choose(path, &area)
}

fn choose(path: &Path, area: &[u8]) -> Result<Superblock> {
    let (a, b) = area.split_at(area.len() / 2);
    Superblock::choose(a, b).with_context(|| format!("the disk {} cannot be used", path.display()))
}

/// Makes disks for a server, all of them or none that could be used: each superblock names all.
pub fn format(paths: &[PathBuf], size: Option<u64>, genesis: &Genesis, server: ServerId, force: bool) -> Result<()> {
    let disks: Vec<DiskId> = paths.iter().map(|_| random().map(DiskId)).collect::<Result<_>>()?;
    for (path, disk) in paths.iter().zip(&disks) {
        let (size, genesis, disks) = (size_of(path, size)?, genesis.clone(), disks.clone());
        let (incarnation, votes_lost) = (Incarnation(0), false);
        format_one(path, FormatParams { genesis, server, disk: *disk, disks, size, incarnation, votes_lost }, force)?;
    }
    Ok(())
}

fn format_one(path: &Path, params: FormatParams, force: bool) -> Result<()> {
    let size = params.size;
    let (superblock, writes) =
        Superblock::format(params).with_context(|| format!("cannot make the disk {}", path.display()))?;
    let layout = superblock.layout;
    let first_data = layout.data.offset..(layout.data.offset + FIRST_DATA).min(layout.data.end());
    // The PMap store's region stays a hole: it is written by itself, away from the path of writes.
    let zeroed = [0..layout.journal.end(), first_data];
    let pmap = layout.pmap.offset..layout.pmap.end();
    let format = Format { size, zeroed: &zeroed, pmap, writes: &writes, force, direct: DirectIo::WherePossible };
    Ok(petal_io::disk::format_disk(path, &format)?)
}

/// Copies of the metadata, on a server's first disks: where its votes in the ring are.
const VOTES_ON: usize = petal::store::META_COPIES;

/// The disks of a server that has lost some.
pub struct Replacement {
    /// Those that are there, in the order of their superblocks' list.
    pub kept: Vec<(PathBuf, FoundDisk, Superblock)>,
    /// Those that are to be made.
    pub lost: Vec<PathBuf>,
    /// What they will be called.
    new: Vec<DiskId>,
    /// What it voted in the ring was on the lost ones.
    pub votes_lost: bool,
    /// The cluster, if a kept disk knows it.
    pub genesis: Option<Genesis>,
}

impl Replacement {
    /// Tells what is there from what is not. `lost` are not looked at. Kept ones are locked.
    pub fn find(paths: &[PathBuf], lost: &[PathBuf], server: ServerId) -> Result<Replacement> {
        let is_lost = |path: &&PathBuf| lost.contains(path) || (!path.exists() && !path.is_symlink());
        let (lost, there): (Vec<&PathBuf>, Vec<&PathBuf>) = paths.iter().partition(is_lost);
        let mut kept = Vec::new();
        for path in there {
            let what = || format!("if {} is lost, say so with --lost {0}", path.display());
            let disk = petal_io::disk::open_disk(path, DirectIo::WherePossible).with_context(what)?;
            let superblock = choose(path, &disk.superblocks).with_context(what)?;
            check_length(path, &disk, &superblock).with_context(what)?;
            ensure!(
                superblock.server == server,
                "the disk {} belongs to server {}, and this is {server}; put the right disk there",
                path.display(),
                superblock.server
            );
            kept.push((path.clone(), disk, superblock));
        }
        let place = |s: &Superblock| s.disks.iter().position(|d| *d == s.disk);
        kept.sort_by_key(|(_, _, superblock)| place(superblock));
        let has_votes = |s: &Superblock| place(s).is_some_and(|at| at < VOTES_ON) && !s.votes_lost;
        Ok(Replacement {
            votes_lost: !kept.iter().any(|(_, _, s)| has_votes(s)),
            genesis: kept.first().map(|(_, _, s)| s.genesis.clone()),
            new: lost.iter().map(|_| random().map(DiskId)).collect::<Result<_>>()?,
            lost: lost.into_iter().cloned().collect(),
            kept,
        })
    }

    /// Paths of those that are kept.
    pub fn kept_paths(&self) -> Vec<PathBuf> {
        self.kept.iter().map(|(path, _, _)| path.clone()).collect()
    }

    /// All disks that the server will have: kept ones first, so that what was voted stays on the first ones.
    pub fn ids(&self) -> Vec<DiskId> {
        self.kept.iter().map(|(_, _, s)| s.disk).chain(self.new.iter().copied()).collect()
    }

    /// Makes the new ones, then tells the kept ones: until that is done the server starts with neither.
    pub fn make(&self, genesis: &Genesis, server: ServerId, incarnation: Incarnation, size: Option<u64>) -> Result<()> {
        let votes_lost = self.votes_lost;
        for (path, disk) in self.lost.iter().zip(&self.new) {
            let (size, genesis, disks) = (size_of(path, size)?, genesis.clone(), self.ids());
            let params = FormatParams { genesis, server, disk: *disk, disks, size, incarnation, votes_lost };
            format_one(path, params, true)?;
        }
        for (path, disk, superblock) in &self.kept {
            let (_, write) = superblock.regroup(self.ids(), votes_lost)?;
            disk.file.write_superblock(&write).with_context(|| format!("cannot write to {}", path.display()))?;
        }
        Ok(())
    }
}

/// Devices are used whole; files have the size that was asked for.
fn size_of(path: &Path, size: Option<u64>) -> Result<u64> {
    let device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    match size {
        _ if device => {
            let end = std::fs::File::open(path).and_then(|mut f| f.seek(SeekFrom::End(0)));
            end.with_context(|| format!("cannot find out the size of {}", path.display()))
        }
        Some(size) => Ok(size),
        None => bail!("{} is a file: say how large it may become with --disk-size", path.display()),
    }
}

/// Opens and locks all disks of a server, in the order of their superblocks' list. `expected` is who the
/// config file says that it is.
pub fn open(paths: &[PathBuf], expected: Owner) -> Result<(Vec<OpenDisk>, Engine)> {
    let mut found = Vec::new();
    for path in paths {
        let disk = petal_io::disk::open_disk(path, DirectIo::WherePossible)?;
        let superblock = choose(path, &disk.superblocks)?;
        check_length(path, &disk, &superblock)?;
        if let Some(expected) = expected.cluster.filter(|c| *c != superblock.genesis.cluster) {
            bail!(
                "the disk {} is of the cluster {}, and this server of the cluster {expected}; put the right disk there",
                path.display(),
                superblock.genesis.cluster
            );
        }
        if let Some(expected) = expected.server.filter(|s| *s != superblock.server) {
            bail!(
                "the disk {} belongs to server {}, and this is {expected}; put the right disk there",
                path.display(),
                superblock.server
            );
        }
        found.push((path.clone(), disk, superblock));
    }
    let ordered = in_order(found)?;
    let region = |s: &Superblock| -> Range<u64> { s.layout.pmap.offset..s.layout.pmap.end() };
    let engine_disks = ordered.iter().map(|(_, d, s)| EngineDisk { file: d.file.clone(), pmap: region(s) }).collect();
    let options = EngineOptions::from_environment().map_err(anyhow::Error::msg)?;
    let engine = Engine::start(engine_disks, &options).context("cannot start the disk engine")?;
    let open = |(path, disk, superblock): (PathBuf, FoundDisk, Superblock)| OpenDisk {
        path: path.display().to_string(),
        superblock,
        frontier: disk.length,
    };
    Ok((ordered.into_iter().map(open).collect(), engine))
}

/// A file never ends before its data region begins; only somebody else can have cut it there.
fn check_length(path: &Path, disk: &FoundDisk, superblock: &Superblock) -> Result<()> {
    let least = superblock.layout.data.offset;
    ensure!(
        disk.length >= least,
        "the disk {} was truncated: it has {} bytes, and at least {least} were written; its content is lost. \
         Restore the file, or make the disk anew with `petal rejoin`",
        path.display(),
        disk.length
    );
    Ok(())
}

/// All disks that the superblocks name, each once, and no others.
fn in_order(mut found: Vec<(PathBuf, FoundDisk, Superblock)>) -> Result<Vec<(PathBuf, FoundDisk, Superblock)>> {
    let Some((first_path, _, first)) = found.first() else { bail!("a server needs at least one disk") };
    let first_path = first_path.display().to_string();
    for (path, _, superblock) in &found {
        let (path, other) = (path.display(), superblock);
        ensure!(
            other.genesis.cluster == first.genesis.cluster,
            "{first_path} is of the cluster {}, {path} of the cluster {}; use disks of one cluster",
            first.genesis.cluster,
            other.genesis.cluster
        );
        ensure!(
            other.server == first.server,
            "{first_path} belongs to server {}, {path} to server {}; give each server its own disks",
            first.server,
            other.server
        );
        ensure!(
            first.disks.contains(&other.disk),
            "{path} was formatted apart from {first_path}: server {} does not know it",
            first.server
        );
    }
    let (server, all) = (first.server, first.disks.clone());
    let mut ordered = Vec::new();
    for (number, disk) in all.iter().enumerate() {
        let at = found.iter().position(|(_, _, s)| s.disk == *disk);
        let Some(at) = at else {
            bail!(
                "server {server} has {} disks, and number {} of them ({disk}) is not among those given; \
                 name all of them, it does not start without one; if it is lost, see `petal rejoin --help`",
                all.len(),
                number + 1
            );
        };
        ordered.push(found.remove(at));
    }
    if let Some((path, _, superblock)) = found.first() {
        bail!("{} is a copy of a disk that is given too ({})", path.display(), superblock.disk);
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::global_state::GenesisServer;

    const SIZE: u64 = 256 << 20;

    fn genesis(cluster: u128) -> Genesis {
        let ring = vec![GenesisServer { server: ServerId(1), addresses: vec!["127.0.0.1:7000".into()] }];
        Genesis { cluster: ClusterId(cluster), name: "test".into(), ring }
    }

    fn paths(dir: &tempfile::TempDir, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|n| dir.path().join(n)).collect()
    }

    fn refusal(paths: &[PathBuf], server: Option<ServerId>) -> String {
        refusal_of(paths, Owner { server, cluster: None })
    }

    fn refusal_of(paths: &[PathBuf], expected: Owner) -> String {
        match open(paths, expected) {
            Ok(_) => panic!("{paths:?} were opened"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn disks_are_opened_in_the_order_of_the_server_whatever_the_order_of_the_paths() {
        let dir = tempfile::tempdir().unwrap();
        let p = paths(&dir, &["a", "b"]);
        format(&p, Some(SIZE), &genesis(1), ServerId(1), false).unwrap();
        let owner = Owner { server: Some(ServerId(1)), cluster: Some(ClusterId(1)) };
        let (open, _engine) = open(&[p[1].clone(), p[0].clone()], owner).unwrap();
        assert_eq!(open[0].path, p[0].display().to_string());
        assert!(open[0].frontier > open[0].superblock.layout.data.offset);
        assert!(refusal(&p, None).contains("in use"));
    }

    #[test]
    fn a_missing_foreign_copied_or_truncated_disk_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let p = paths(&dir, &["a", "b", "other", "copy"]);
        format(&p[..2], Some(SIZE), &genesis(1), ServerId(1), false).unwrap();
        format(&p[2..3], Some(SIZE), &genesis(1), ServerId(2), false).unwrap();
        assert!(refusal(&p[..1], None).contains("number 2 of them"));
        let elsewhere = Owner { server: None, cluster: Some(ClusterId(2)) };
        assert!(refusal_of(&p[..2], elsewhere).contains("is of the cluster 00000000000000000000000000000001"));
        assert!(refusal(&p[1..3], None).contains("belongs to server s1"));
        assert!(refusal(&p[2..3], Some(ServerId(1))).contains("belongs to server s2, and this is s1"));
        std::fs::copy(&p[0], &p[3]).unwrap();
        assert!(refusal(&[p[0].clone(), p[1].clone(), p[3].clone()], None).contains("is a copy"));
        std::fs::OpenOptions::new().write(true).open(&p[3]).unwrap().set_len(8192).unwrap();
        assert!(refusal(&p[3..4], None).contains("was truncated"));
        std::fs::write(&p[3], [7; 9000]).unwrap();
        assert!(refusal(&p[3..4], None).contains("copy"));
        assert!(refusal(&[dir.path().join("none")], None).contains("none"));
    }

    #[test]
    fn a_file_without_a_size_and_one_that_holds_data_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let p = paths(&dir, &["a"]);
        let format = |size, force| format(&p, size, &genesis(1), ServerId(1), force);
        assert!(format(None, false).unwrap_err().to_string().contains("--disk-size"));
        assert!(format!("{:#}", format(Some(1 << 20), false).unwrap_err()).contains("at least"));
        std::fs::write(&p[0], b"my thesis").unwrap();
        assert!(format(Some(SIZE), false).unwrap_err().to_string().contains("holds data"));
        format(Some(SIZE), true).unwrap();
    }
}
