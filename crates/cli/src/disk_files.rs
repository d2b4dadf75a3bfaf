//! A server's disks as a person names them: formatting them, and opening them all or refusing.

use crate::server_config::Owner;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Genesis, State};
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
        let (incarnation, votes_from) = (Incarnation(0), 0);
        format_one(path, FormatParams { genesis, server, disk: *disk, disks, size, incarnation, votes_from }, force)?;
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
    server: ServerId,
    /// Those that are there, in the order of their superblocks' list; locked.
    kept: Vec<(PathBuf, FoundDisk, Superblock)>,
    /// Those that are to be made, with what they will be called.
    lost: Vec<(PathBuf, DiskId)>,
    /// What can be read on those that are there although they are lost.
    foreign: Vec<(PathBuf, Superblock)>,
}

impl Replacement {
    /// Tells what is there from what is not. `lost` are to be made anew although they are there: they must look like
    /// disks of Petal, unless `force`.
    pub fn find(paths: &[PathBuf], lost: &[PathBuf], server: ServerId, force: bool) -> Result<Replacement> {
        let mut found = Replacement { server, kept: Vec::new(), lost: Vec::new(), foreign: Vec::new() };
        for path in paths {
            let is_named = lost.contains(path);
            if !is_there(path)? {
                found.lost.push((path.clone(), DiskId(random()?)));
                continue;
            }
            let what = || format!("if {} is lost, say so with --lost {0}", path.display());
            let disk = petal_io::disk::open_disk(path, DirectIo::WherePossible);
            let disk = if is_named { disk? } else { disk.with_context(what)? };
            match (choose(path, &disk.superblocks), is_named) {
                (Ok(superblock), true) => found.foreign.push((path.clone(), superblock)),
                (Err(error), true) => ensure!(
                    force || disk.superblocks.iter().all(|b| *b == 0),
                    "{error:#}: to overwrite it nevertheless, whatever it is, add --force"
                ),
                (superblock, false) => {
                    let superblock = superblock.with_context(what)?;
                    check_length(path, &disk, &superblock).with_context(what)?;
                    found.kept.push((path.clone(), disk, superblock));
                    continue;
                }
            }
            found.lost.push((path.clone(), DiskId(random()?)));
        }
        found.kept.sort_by_key(|(_, _, s)| place(s));
        let all =
            found.kept.iter().map(|(path, _, s)| (path, s)).chain(found.foreign.iter().map(|(path, s)| (path, s)));
        for (path, superblock) in all {
            ensure!(
                superblock.server == server,
                "the disk {} belongs to server {}, and this is {server}; put the right disk there",
                path.display(),
                superblock.server
            );
        }
        Ok(found)
    }

    /// Complains of disks that are not those that the cluster knows the server by.
    pub fn check(&self, state: &State) -> Result<()> {
        let known = &state.servers[&self.server];
        let kept = self.kept.iter().map(|(path, _, s)| (path, s));
        for (path, superblock) in kept.clone().chain(self.foreign.iter().map(|(path, s)| (path, s))) {
            ensure!(
                superblock.genesis.cluster == state.cluster,
                "the disk {} is of the cluster {}, and this one is {}; name the right cluster with --cluster, or put the \
                 right disk there",
                path.display(),
                superblock.genesis.cluster,
                state.cluster
            );
        }
        for (path, superblock) in kept {
            let expected = known.disks.get(&superblock.disk);
            ensure!(
                expected.is_some_and(|d| superblock.lives().saw(d.incarnation)),
                "the disk {} is not the one that the cluster knows {} by: it is from a backup, or was replaced before. Put \
                 the right disk there, or have it made anew with --lost {0}",
                path.display(),
                self.server
            );
        }
        Ok(())
    }

    /// True if everything is there, and was named to the cluster; the disks themselves may not know it yet.
    pub fn is_half_made(&self, state: &State) -> bool {
        let ids = self.ids();
        let all_named = state.servers[&self.server].disks.keys().all(|d| ids.contains(d));
        self.lost.is_empty() && all_named && self.kept.iter().any(|(_, _, s)| !ids.iter().all(|d| s.disks.contains(d)))
    }

    /// What it voted in the ring is not on all of the disks that had it: half of it may be older than the rest.
    pub fn votes_lost(&self, state: &State) -> bool {
        let is_kept = |disk: &DiskId| self.kept.iter().any(|(_, _, s)| s.disk == *disk);
        let whole = self.kept.first().is_some_and(|(_, _, s)| s.disks.iter().take(VOTES_ON).all(is_kept));
        !whole && state.ring.node_of(self.server).is_some()
    }

    /// The cluster, if a kept disk knows it.
    pub fn genesis(&self) -> Option<&Genesis> {
        self.kept.first().map(|(_, _, s)| &s.genesis)
    }

    /// Paths of those that are to be made.
    pub fn lost_paths(&self) -> Vec<PathBuf> {
        self.lost.iter().map(|(path, _)| path.clone()).collect()
    }

    /// Paths of those that are kept.
    pub fn kept_paths(&self) -> Vec<PathBuf> {
        self.kept.iter().map(|(path, _, _)| path.clone()).collect()
    }

    /// All disks that the server will have: kept ones first, so that metadata stays on the first ones.
    pub fn ids(&self) -> Vec<DiskId> {
        self.kept.iter().map(|(_, _, s)| s.disk).chain(self.lost.iter().map(|(_, id)| *id)).collect()
    }

    /// Complains of what would keep the disks from being made, before anything is changed.
    pub fn rehearse(&self, genesis: &Genesis, size: Option<u64>) -> Result<()> {
        for params in self.params(genesis, Incarnation(u64::MAX), size, u32::MAX) {
            let (path, params) = params?;
            Superblock::format(params).with_context(|| format!("cannot make the disk {}", path.display()))?;
        }
        self.kept.iter().try_for_each(|(_, _, s)| Ok(s.regroup(self.ids(), u32::MAX).map(drop)?))
    }

    fn params<'a>(
        &'a self,
        genesis: &'a Genesis,
        incarnation: Incarnation,
        size: Option<u64>,
        votes_from: u32,
    ) -> impl Iterator<Item = Result<(&'a Path, FormatParams)>> {
        self.lost.iter().map(move |(path, disk)| {
            let (size, genesis, disks, server) = (size_of(path, size)?, genesis.clone(), self.ids(), self.server);
            Ok((&**path, FormatParams { genesis, server, disk: *disk, disks, size, incarnation, votes_from }))
        })
    }

    /// Makes the new ones, then tells the kept ones: until that is done the server starts with neither.
    pub fn make(&self, genesis: &Genesis, incarnation: Incarnation, size: Option<u64>, votes_from: u32) -> Result<()> {
        for params in self.params(genesis, incarnation, size, votes_from) {
            let (path, params) = params?;
            format_one(path, params, true)?;
        }
        for (path, disk, superblock) in &self.kept {
            let (_, write) = superblock.regroup(self.ids(), votes_from)?;
            disk.file.write_superblock(&write).with_context(|| format!("cannot write to {}", path.display()))?;
        }
        Ok(())
    }
}

fn place(superblock: &Superblock) -> Option<usize> {
    superblock.disks.iter().position(|d| *d == superblock.disk)
}

/// Whether there is something at the path. What cannot be looked at is not lost.
fn is_there(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(Path::new("/"));
            ensure!(folder.is_dir(), "there is no folder {} (not mounted?)", folder.display());
            ensure!(
                !path.starts_with("/dev"),
                "there is no device {}; put the new disk in, or name another",
                path.display()
            );
            Ok(false)
        }
        Err(e) => Err(e).with_context(|| format!("cannot look at {}", path.display())),
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
        let opened = open_one(path);
        let (disk, superblock) = match expected.server {
            Some(server) => opened.with_context(|| {
                let path = path.display();
                format!("{server} cannot use a disk (if it is lost: `petal rejoin {server} --lost {path}`)")
            })?,
            None => opened?,
        };
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

fn open_one(path: &Path) -> Result<(FoundDisk, Superblock)> {
    let disk = petal_io::disk::open_disk(path, DirectIo::WherePossible)?;
    let superblock = choose(path, &disk.superblocks)?;
    check_length(path, &disk, &superblock)?;
    Ok((disk, superblock))
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
