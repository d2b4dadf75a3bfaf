//! The world outside the cores: clock, sockets, disks, and the loops that drive a core with them.
//!
//! Everything that decides is in `petal`; what is here only carries out. A process has one thread
//! with one runtime ([`run`]), on which the driver of the core, every connection and the disk engine live:
//! with few cores, handing work from thread to thread costs more than the work.
//!
//! * [`clock`]: the time;
//! * [`transport`]: connections, hello, framing of bytes, dialling;
//! * [`engine`]: the interface to disks;
//! * `disk`: the engines themselves;
//! * [`server`]: drives `petal::server::Server`;
//! * [`client`]: drives `petal::client::Client`: the library that programs use;
//! * [`loop_device`]: the ioctls of loop devices, for `petal-fuse`;
//! * [`frozen`]: the ioctls that freeze and thaw a file system.

pub mod client;
pub mod clock;
pub mod disk;
pub mod engine;
pub mod frozen;
pub mod loop_device;
pub mod server;
pub mod transport;

use std::future::Future;
use std::io;

/// Runs `future` on a runtime of this thread until it is done.
///
/// The future runs as a task, not as what the runtime blocks on: waking the latter from the same
/// thread costs two system calls each time, waking a task costs none.
pub fn run<F>(future: F) -> io::Result<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    let task = runtime.spawn_local(future);
    match runtime.block_on(task) {
        Ok(output) => Ok(output),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Lets this process open as many files as the system allows: each connection is one. Returns how
/// many that is.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
