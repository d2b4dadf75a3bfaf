//! Where a cluster is, as a person names it: a folder that `petal up` made, or addresses of servers.

use crate::cluster_folder::ClusterFolder;
use anyhow::{Result, bail};
use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

/// What `--cluster` named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A folder with `cluster.toml`.
    Folder(PathBuf),
    /// Addresses: `unix:PATH` or `HOST:PORT`.
    Addresses(Vec<String>),
}

impl FromStr for Place {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let parts: Vec<String> = text.split(',').map(|p| p.trim().to_string()).collect();
        if parts.iter().all(|p| is_address(p)) { Ok(Place::Addresses(parts)) } else { Ok(Place::Folder(text.into())) }
    }
}

/// `unix:PATH`, or something that ends in a colon and a number and has no slash.
fn is_address(text: &str) -> bool {
    let port = text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    text.starts_with("unix:") || (port && !text.contains('/'))
}

impl Place {
    /// The folder, for commands that need one.
    pub fn folder(&self) -> Result<ClusterFolder> {
        match self {
            Place::Folder(path) => ClusterFolder::at(path),
            Place::Addresses(addresses) => bail!(
                "{} is an address, and this command works on a cluster that `petal up` made; \
                 name its folder with --cluster",
                addresses.join(",")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_folders_are_told_apart() {
        let place = |text: &str| text.parse::<Place>().unwrap();
        assert_eq!(place("./petal-data"), Place::Folder("./petal-data".into()));
        assert_eq!(place("/a:1/b"), Place::Folder("/a:1/b".into()));
        assert_eq!(place("10.0.0.1:7000"), Place::Addresses(vec!["10.0.0.1:7000".into()]));
        assert_eq!(place("a:1, b:2"), Place::Addresses(vec!["a:1".into(), "b:2".into()]));
        assert_eq!(place("unix:/a/b"), Place::Addresses(vec!["unix:/a/b".into()]));
        assert_eq!(place("[::1]:7000"), Place::Addresses(vec!["[::1]:7000".into()]));
        assert_eq!(place("folder"), Place::Folder("folder".into()));
    }
}
