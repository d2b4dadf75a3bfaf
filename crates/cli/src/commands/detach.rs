//! `petal detach`: ends what `petal attach` began.

use super::attach;
use crate::cluster_folder::ClusterFolder;
use crate::connect::{self, Connection, refusal};
use crate::place::Place;
use crate::processes::ProcessFile;
use anyhow::{Result, bail};
use petal::global_state::{Command, CommandError};
use petal::ids::SessionId;
use petal_io::loop_device::LoopDevice;
use rustix::process::Signal;
use std::path::Path;
use std::time::Duration;

/// How long writing back may take.
const END_LIMIT: Duration = Duration::from_secs(120);

/// `petal detach`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  umount /mnt && petal detach vol0
  petal detach --session a17        one that a dead program left (`petal disk info vol0@monday` shows it)")]
pub struct Arguments {
    /// The disk or snapshot
    #[arg(required_unless_present = "session")]
    disk: Option<String>,
    /// End this session instead, whoever has it: its holder can do nothing any more
    #[arg(long, value_name = "ID", value_parser = parse_session, conflicts_with = "disk")]
    session: Option<SessionId>,
}

/// Detaches.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    if let Some(session) = arguments.session {
        let place = place.clone();
        let ended = connect::block_on(async move {
            let connection = Connection::open(&place).await?;
            connection.execute_settled(Command::Detach { session }).await
        });
        match ended {
            Err(error) if matches!(refusal(&error), Some(CommandError::NoSuchSession(_))) => {
                println!("There is no session {session}, or no longer.");
            }
            ended => {
                ended?;
                println!("Session {session} is over.");
            }
        }
    }
    if let Some(disk) = arguments.disk {
        detach_folder(place, &attach::folder_of(place, &disk)?, &disk)?;
        println!("Detached {disk}.");
    }
    Ok(())
}

/// `a17`.
fn parse_session(text: &str) -> Result<SessionId, String> {
    let number = text.strip_prefix('a').unwrap_or(text).parse().ok();
    number.map(SessionId).ok_or_else(|| "a session is named like a17".into())
}

/// Detaches a disk of a cluster folder.
pub fn detach(place: &Place, folder: &ClusterFolder, disk: &str) -> Result<()> {
    detach_folder(place, &folder.attached(disk), disk)
}

fn detach_folder(place: &Place, folder: &Path, disk: &str) -> Result<()> {
    if !folder.exists() {
        bail!("{disk} is not attached here");
    }
    if let Some(process) = ProcessFile::alive_at(&folder.join("pid")) {
        if let Some(device) = process.text("device")
            && is_in_use(Path::new(device))
        {
            bail!("{device} ({disk}) is in use (mounted, or open in another program); unmount it and try again");
        }
        process.signal(Signal::TERM);
        if !process.wait_for_end(END_LIMIT) {
            let log = folder.join("log");
            bail!("{disk} is not detached after {} s; see {}", END_LIMIT.as_secs(), log.display());
        }
    }
    attach::take_down_dead(place, folder, disk)
}

/// Asked before the process is told to end, so that the answer comes here and not into its log.
fn is_in_use(device: &Path) -> bool {
    LoopDevice::existing(device).is_in_use()
}
