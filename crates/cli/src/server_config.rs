//! The config file of one server, `server.toml`. Flags of `petal server` add to it.
//!
//! ```toml
//! server = 1                          # who the disks should say that it is; may be left out
//! cluster = "0b7c..."                 # of which cluster; may be left out
//! listen = ["0.0.0.0:7000"]           # where it accepts connections
//! advertise = ["10.0.0.1:7000"]       # what it tells others; the same as listen if left out
//! disks = ["/dev/sdb", "disk2"]       # all of them; relative paths are relative to this file
//! cache_elements = 65536              # element entries kept in memory
//! scrub_hours = 336                   # time in which all blocks are read once; 0 = never by itself
//! ```
//!
//! Who the server is, its cluster and the ring are on its disks, and nowhere else.

use crate::output;
use anyhow::{Context, Result, bail};
use petal::ids::{ClusterId, ServerId};
use petal::limits::HALF_LEASE;
use petal::scrub::{PERIOD_DEFAULT, ScrubConfig};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use stdx::Duration;

/// Element entries kept in memory if the file does not say: about 40 MiB.
pub const CACHE_ELEMENTS_DEFAULT: usize = 65536;
/// Longest time of a round of scrub: a year.
const SCRUB_HOURS_MAX: u64 = 366 * 24;

/// `server.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Who it is; the disks must agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<u16>,
    /// The cluster's id, in hexadecimal digits; the disks must agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where it accepts connections: `unix:PATH` or `HOST:PORT`.
    #[serde(default)]
    pub listen: Vec<String>,
    /// What it tells others, the best first; empty = the same as `listen`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advertise: Vec<String>,
    /// Its disks: files or block devices.
    #[serde(default)]
    pub disks: Vec<PathBuf>,
    /// Element entries kept in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_elements: Option<usize>,
    /// Hours in which every block is read once in the background; 0: only when `petal scrub` asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub_hours: Option<u64>,
    /// A disk that answers nothing for so many milliseconds hangs, and the server goes out of the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_patience_ms: Option<u64>,
    /// It only votes in the ring, and gets no data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
}

/// Whose disks they should be; what is not said is not compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner {
    /// The server.
    pub server: Option<ServerId>,
    /// Its cluster.
    pub cluster: Option<ClusterId>,
}

impl ServerConfig {
    /// Reads a config file; its disks get absolute paths.
    pub fn read(path: &Path) -> Result<ServerConfig> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the config file {}", path.display()))?;
        let mut config: ServerConfig =
            toml::from_str(&text).with_context(|| format!("the config file {} makes no sense", path.display()))?;
        let folder = std::path::absolute(path)?.parent().map(Path::to_path_buf).unwrap_or_default();
        config.disks.iter_mut().for_each(|disk| *disk = folder.join(&*disk));
        Ok(config)
    }

    /// Writes a config file.
    pub fn write(&self, path: &Path) -> Result<()> {
        crate::cluster_folder::write_whole(path, toml::to_string(self)?.as_bytes())
    }

    /// Who it is, as far as the file says so.
    pub fn owner(&self) -> Result<Owner> {
        let id = |text: &String| {
            u128::from_str_radix(text, 16).context("`cluster` in the config file is not a hexadecimal id")
        };
        let cluster = self.cluster.as_ref().map(id).transpose()?.map(ClusterId);
        Ok(Owner { server: self.server.map(ServerId), cluster })
    }

    /// How long a disk may answer nothing: at least half a lease.
    pub fn disk_patience(&self) -> Duration {
        self.disk_patience_ms.map_or(HALF_LEASE, |ms| Duration::from_millis(ms.min(3_600_000)).max(HALF_LEASE))
    }

    /// What others are told.
    pub fn addresses(&self) -> &[String] {
        if self.advertise.is_empty() { &self.listen } else { &self.advertise }
    }

    /// How the server looks for bad blocks.
    pub fn scrub(&self) -> ScrubConfig {
        let period = match self.scrub_hours {
            None => Some(PERIOD_DEFAULT),
            Some(0) => None,
            Some(hours) => Some(stdx::Duration::from_secs(hours * 3600)),
        };
        ScrubConfig { period, unix_seconds: output::unix_seconds() }
    }

    /// Complains about what cannot work.
    pub fn check(&self) -> Result<()> {
        if self.disks.is_empty() {
            bail!("the server has no disk; name its disks in the config file (disks = [...]) or with --disk");
        }
        if self.listen.is_empty() {
            bail!("the server listens nowhere; say where in the config file (listen = [...]) or with --listen");
        }
        if let Some(hours) = self.scrub_hours.filter(|hours| *hours > SCRUB_HOURS_MAX) {
            bail!("scrub_hours = {hours} is more than a year ({SCRUB_HOURS_MAX}); 0 means never");
        }
        let anywhere = |a: &String| a.starts_with("0.0.0.0:") || a.starts_with("[::]:");
        if let Some(address) = self.addresses().iter().find(|a| anywhere(a)) {
            bail!("others cannot reach a server at {address}; say at which address they can with `advertise`");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_relative_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.toml");
        std::fs::write(&path, "listen = ['127.0.0.1:7000']\ndisks = ['d1', '/dev/sdb']\n").unwrap();
        let config = ServerConfig::read(&path).unwrap();
        assert_eq!(config.disks, [dir.path().join("d1"), "/dev/sdb".into()]);
        assert_eq!(config.addresses(), ["127.0.0.1:7000"]);
        config.check().unwrap();
    }

    #[test]
    fn what_cannot_work_is_said_with_its_remedy() {
        let mut config = ServerConfig { listen: vec!["0.0.0.0:1".into()], ..ServerConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("--disk"));
        config.disks.push("d".into());
        assert!(config.check().unwrap_err().to_string().contains("advertise"));
        config.advertise.push("10.0.0.1:1".into());
        config.check().unwrap();
    }

    #[test]
    fn a_word_that_is_not_known_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.toml");
        std::fs::write(&path, "disk = ['a']\n").unwrap();
        let error = format!("{:#}", ServerConfig::read(&path).unwrap_err());
        assert!(error.contains("server.toml") && error.contains("disk"), "{error}");
    }
}
