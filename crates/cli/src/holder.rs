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

/// True if it is a process of this machine that is no longer there.
pub fn is_gone(holder: &str) -> bool {
    let of_process = |holder: &str| -> Option<u32> {
        let (_, inside) = holder.strip_suffix(')')?.rsplit_once(" (pid ")?;
        let (pid, of) = inside.split_once(" on ")?;
        (of == host()).then(|| pid.parse().ok())?
    };
    of_process(holder).is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone_is_said_of_processes_of_this_machine_alone() {
        assert!(!is_gone(&of_process("petal export")), "this one is there");
        // No process has a number above 2^22.
        assert!(is_gone(&format!("petal export (pid 5000000 on {})", host())));
        for other in ["petal export (pid 5000000 on elsewhere)", "petal export (pid 5000000)", "petal up in x", ")", ""]
        {
            assert!(!is_gone(other), "{other}");
        }
    }
}
