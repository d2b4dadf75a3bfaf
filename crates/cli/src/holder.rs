//! Who holds a session, in words for people: shown when somebody else wants the disk.

use crate::cluster_folder::ClusterFolder;

/// The front end of a folder's `petal up`. The same after a restart, so that it finds its own old session
/// again: the folder's lock makes sure that there is only one.
pub fn of_folder(folder: &ClusterFolder) -> String {
    format!("petal up in {} on {}", folder.path().display(), host())
}

/// A process.
pub fn of_process(what: &str) -> String {
    format!("{what} (pid {} on {})", std::process::id(), host())
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
