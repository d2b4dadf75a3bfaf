//! Where a cluster is, as a person names it: a folder that `petal up` made, or addresses of servers.

use crate::cluster_folder::ClusterFolder;
use anyhow::{Result, bail};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What is meant where nobody says which cluster: what this variable says, or else this folder.
pub const CLUSTER_VARIABLE: &str = "PETAL_CLUSTER";
/// The second of these.
pub const CLUSTER_DEFAULT: &str = "./petal-data";

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

/// What a person types here to reach the cluster in a folder: `petal`, or `petal --cluster FOLDER`.
pub fn petal(folder: &ClusterFolder) -> String {
    let meant = std::env::var(CLUSTER_VARIABLE).unwrap_or_else(|_| CLUSTER_DEFAULT.into());
    let is_meant = ClusterFolder::at(Path::new(&meant)).is_ok_and(|meant| meant.path() == folder.path());
    if is_meant { "petal".into() } else { format!("petal --cluster {}", quoted(&shorter(folder.path()))) }
}

/// The path as seen from here, where that is shorter.
pub fn shorter(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

/// As one word of a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:=@,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_names_the_cluster_unless_it_is_the_one_that_is_meant_anyway() {
        let hint = |path: &str| petal(&ClusterFolder::at(Path::new(path)).unwrap());
        let meant = std::env::var(CLUSTER_VARIABLE).unwrap_or_else(|_| CLUSTER_DEFAULT.into());
        assert_eq!(hint(&meant), "petal");
        assert_eq!(hint("/nowhere/other"), "petal --cluster /nowhere/other");
        assert_eq!(hint("/nowhere/it's here"), r"petal --cluster '/nowhere/it'\''s here'");
        assert_eq!(hint("beside"), "petal --cluster beside");
    }

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
