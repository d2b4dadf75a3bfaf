//! The folder of a cluster that `petal up` made.
//!
//! ```text
//!   petal-data/
//!     cluster.toml      what the cluster consists of; written once, read by every command
//!     lock              held by the supervising `petal up`
//!     up.pid, up.log    the supervisor
//!     nbd.sock          NBD
//!     s1/ .. s4/        one per server: disk1.., server.toml, sock, pid, log
//!     attached/NAME/    one per attached disk: pid, log, fuse/
//! ```
//!
//! `cluster.toml` appears by a rename, after the first disks were formatted: without it nothing was ever
//! promised to anybody, and the first start may begin again.

use anyhow::{Context, Result, bail};
use petal::ids::{ClusterId, ServerId};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Longest path that fits into the address of a unix socket, with room for its zero.
const SOCKET_PATH_MAX: usize = 107;

/// A cluster's folder; it need not exist yet.
#[derive(Clone, Debug)]
pub struct ClusterFolder {
    path: PathBuf,
}

/// `cluster.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// The cluster's id, in hexadecimal digits.
    pub cluster: String,
    /// Its name.
    pub name: String,
    /// Disk files per server.
    pub disks_per_server: usize,
    /// Bytes of each disk file.
    pub disk_size: u64,
    /// TCP port of NBD on 127.0.0.1; none = unix socket only.
    pub nbd_port: Option<u16>,
    /// The disk that the first `up` makes: name, bytes, copies. Gone once it was made.
    pub first_disk: Option<FirstDisk>,
    /// The servers.
    #[serde(rename = "server")]
    pub servers: Vec<ServerEntry>,
}

/// The disk that a new cluster gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstDisk {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Copies.
    pub copies: u8,
}

/// A server of the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerEntry {
    /// Its number.
    pub id: u16,
    /// Member of the ring.
    pub ring: bool,
    /// TCP port on 127.0.0.1, picked at the first start.
    pub port: u16,
    /// Its disks were made. From then on nothing here formats them: a disk that is missing or damaged
    /// is somebody's loss, not an empty place.
    pub formatted: bool,
}

impl ClusterFile {
    /// The cluster's id.
    pub fn id(&self) -> Result<ClusterId> {
        let id = u128::from_str_radix(&self.cluster, 16).context("cluster.toml: `cluster` is not a hexadecimal id")?;
        Ok(ClusterId(id))
    }
}

impl ServerEntry {
    /// Its id.
    pub fn server(&self) -> ServerId {
        ServerId(self.id)
    }
}

impl ClusterFolder {
    /// The folder at `path`, made absolute.
    pub fn at(path: &Path) -> Result<ClusterFolder> {
        let path = std::path::absolute(path).with_context(|| format!("{} is not a path", path.display()))?;
        // A symbolic link and what it leads to are one cluster.
        Ok(ClusterFolder { path: path.canonicalize().unwrap_or(path) })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder.
    pub fn create(&mut self) -> Result<()> {
        std::fs::create_dir_all(&self.path)
            .with_context(|| format!("cannot make the cluster's folder {}", self.path.display()))?;
        self.path = self.path.canonicalize()?;
        Ok(())
    }

    /// `cluster.toml`, if there is a cluster.
    pub fn read_if_there(&self) -> Result<Option<ClusterFile>> {
        let path = self.path.join("cluster.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let file = toml::from_str(&text)
            .with_context(|| format!("{} is damaged, or of a newer petal; restore it from a backup", path.display()))?;
        Ok(Some(file))
    }

    /// `cluster.toml`.
    pub fn read(&self) -> Result<ClusterFile> {
        match self.read_if_there()? {
            Some(file) => Ok(file),
            None => bail!(
                "there is no cluster in {0}; go to the folder that has it, or name it with --cluster or PETAL_CLUSTER \
                 (`petal --cluster {0} up` makes one)",
                self.path.display()
            ),
        }
    }

    /// Writes `cluster.toml`, all or nothing.
    pub fn write(&self, file: &ClusterFile) -> Result<()> {
        let text = format!("# Written by `petal up`. The disks know the rest.\n{}", toml::to_string(file)?);
        write_whole(&self.path.join("cluster.toml"), text.as_bytes())
    }

    /// The folder of a server.
    pub fn server(&self, server: ServerId) -> PathBuf {
        self.path.join(server.to_string())
    }

    /// Disk files of a server.
    pub fn disks(&self, file: &ClusterFile, server: ServerId) -> Vec<PathBuf> {
        (1..=file.disks_per_server).map(|n| self.server(server).join(format!("disk{n}"))).collect()
    }

    /// Addresses of a server, the best first.
    pub fn addresses(&self, entry: &ServerEntry) -> Result<Vec<String>> {
        let socket = self.socket(&format!("{}/sock", entry.server()))?;
        Ok(vec![format!("unix:{}", socket.display()), format!("127.0.0.1:{}", entry.port)])
    }

    /// Where NBD is served.
    pub fn nbd_socket(&self) -> Result<PathBuf> {
        self.socket("nbd.sock")
    }

    /// The supervisor's process file.
    pub fn supervisor(&self) -> PathBuf {
        self.path.join("up.pid")
    }

    /// The folder of an attached disk.
    pub fn attached(&self, disk: &str) -> PathBuf {
        self.path.join("attached").join(disk)
    }

    /// Names of the disks that are attached, or were when their process died.
    pub fn all_attached(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path.join("attached")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        // Beside the folders are their locks.
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }

    /// A path for a socket: in the folder, or, where that is too long for a socket's address, in a folder
    /// for temporary files, under a name that this cluster alone has.
    fn socket(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if path.as_os_str().len() <= SOCKET_PATH_MAX {
            return Ok(path);
        }
        let mark = stdx::checksum::crc32c(self.path.as_os_str().as_encoded_bytes());
        let short = std::env::temp_dir().join(format!("petal-{mark:08x}")).join(name);
        let folder = short.parent().context("a socket has a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(short)
    }
}

/// Writes a file so that a crash leaves the old or the new one.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> ClusterFile {
        ClusterFile {
            cluster: format!("{:032x}", 5),
            name: "n".into(),
            disks_per_server: 2,
            disk_size: 1 << 30,
            nbd_port: None,
            first_disk: Some(FirstDisk { name: "vol0".into(), size: 1 << 20, copies: 2 }),
            servers: vec![ServerEntry { id: 1, ring: true, port: 7000, formatted: true }],
        }
    }

    #[test]
    fn the_cluster_file_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let folder = ClusterFolder::at(dir.path()).unwrap();
        assert!(folder.read().unwrap_err().to_string().contains("up` makes one"));
        folder.write(&file()).unwrap();
        assert_eq!(folder.read().unwrap(), file());
        assert_eq!(folder.read().unwrap().id().unwrap(), ClusterId(5));
    }

    #[test]
    fn a_damaged_cluster_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cluster.toml"), "cluster = 1").unwrap();
        let error = format!("{:#}", ClusterFolder::at(dir.path()).unwrap().read().unwrap_err());
        assert!(error.contains("cluster.toml"), "{error}");
    }

    #[test]
    fn sockets_of_a_deep_folder_get_a_short_path() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        let folder = ClusterFolder::at(&deep).unwrap();
        let socket = folder.nbd_socket().unwrap();
        assert!(socket.as_os_str().len() <= SOCKET_PATH_MAX, "{}", socket.display());
        assert_eq!(socket, folder.nbd_socket().unwrap());
        std::fs::remove_dir_all(socket.parent().unwrap()).unwrap();
    }
}
