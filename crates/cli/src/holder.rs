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

/// A process that only reads, and whose end the next one like it may find out: with where its number is valid.
pub fn of_reader(what: &str) -> String {
    format!("{what} (pid {} on {}, {})", std::process::id(), host(), numbering())
}

/// True if it is such a process of this machine that is no longer there.
pub fn is_gone(holder: &str) -> bool {
    let pid = || -> Option<i32> {
        let (_, inside) = holder.strip_suffix(')')?.rsplit_once(" (pid ")?;
        let (pid, of) = inside.split_once(" on ")?;
        (of == format!("{}, {}", host(), numbering())).then(|| pid.parse().ok())?
    };
    // One that may not be asked is there.
    let is_missing = |pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
    pid().and_then(rustix::process::Pid::from_raw).is_some_and(is_missing)
}

/// What says within which process numbers are one and the same: this start of the machine, and the namespace.
fn numbering() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let space = std::fs::read_link("/proc/self/ns/pid").map(|link| link.display().to_string()).unwrap_or_default();
    format!("{} {space}", boot.get(..8).unwrap_or_default())
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone_is_said_of_processes_of_this_machine_alone() {
        assert!(!is_gone(&of_reader("petal export")), "this one is there");
        // No process has a number above 2^22.
        assert!(is_gone(&format!("petal export (pid 5000000 on {}, {})", host(), numbering())));
        assert!(!is_gone(&format!("petal nbd (pid 5000000 on {})", host())));
        for other in ["petal export (pid 5000000 on elsewhere)", "petal export (pid 5000000)", "petal up in x", ")", ""]
        {
            assert!(!is_gone(other), "{other}");
        }
    }
}
