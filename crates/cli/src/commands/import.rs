//! `petal import`: a stream of `petal export` becomes a disk, or the next state of one.
//!
//! ```text
//!  the disk is noted as begun -> elements are written -> end mark -> snapshot of the stream's name, whole: in one
//! ```
//!
//! Nothing counts before the end mark: the snapshot appears then, and until then nobody else reads or writes the disk. An
//! import that was interrupted is repeated with the same stream: all of that is read and checked, and written from the check
//! mark on which the cluster was told last (`ImportReached`), if its hash is the same. An increment goes only onto the very
//! state that it starts from.

use super::diff;
use super::disk::{create, find};
use crate::connect::{self, Connection, Disk, refusal};
use crate::output;
use crate::place::Place;
use crate::progress::Progress;
use anyhow::{Context, Result, bail, ensure};
use petal::client::RequestError;
use petal::global_state::{Attachment, Command, State, check_name, split_name};
use petal::ids::{BLOCK_SIZE, ClusterId, ELEMENT_SIZE, Epoch, FamilyId, LineageId};
use petal::message::Refusal;
use petal::translator::vdir::{ForeignState, Imported, Reached, Vdisk};
use petal_stream::{Fit, Header, Item, Kind, Point, Reader, StateId, StreamError, Summary, Target};
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Elements that are written side by side.
const WRITES_MAX: usize = 32;
/// Time between two of them that the cluster is told.
const MARK_EVERY: Duration = Duration::from_secs(2);

/// `petal import`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal import monday.petal vol0                 a new disk vol0, with a snapshot vol0@monday
  petal import tuesday.petal vol0                the increment that follows
  zstd -dc monday.petal.zst | petal import - vol0

The same command again goes on with an import that was interrupted; with --take-over if that was killed.
Until it has ended nobody else uses the disk.")]
pub struct Arguments {
    /// The stream; `-` is standard input
    file: PathBuf,
    /// The disk: a new one for a full stream, the one that holds its parent for an increment
    disk: String,
    /// Copies of a new disk; as in the stream without it
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    copies: Option<u8>,
    /// End the session of who has the disk attached, such as an import that was killed
    #[arg(long)]
    take_over: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let Arguments { file, disk: name, copies, take_over, format } = arguments;
        if let (disk, Some(_)) = split_name(&name) {
            bail!(
                "'{name}' names a snapshot, which is never written; name a disk, '{disk}' perhaps: the import makes the snapshot"
            );
        }
        let (input, what, length) = open(&file)?;
        let reader = Reader::open(input).with_context(|| what.clone())?;
        let header = reader.header().clone();
        let connection = Connection::open(&place).await?;
        let Some(seen) = prepare(&connection, &name, &header, copies).await? else {
            let snapshot = format!("{name}@{}", header.snapshot);
            if format.json {
                return output::print_json(&serde_json::json!({"disk": name, "snapshot": snapshot, "bytes": 0}));
            }
            eprintln!("'{name}' has taken in this stream already, as {snapshot} (unless that was renamed).");
            return Ok(());
        };
        let take_in = async |disk: &Disk| -> Result<Written> {
            let reached = begin(&connection, disk, &seen, &header).await?;
            let written = write(&connection, disk, reader, (reached, length), &name, &what).await?;
            disk.flush().await?;
            // The session is ended behind the snapshot: what anybody else writes is not in it.
            let (vdisk, session) = (disk.id(), disk.session());
            let (snapshot, made) = (header.snapshot.clone(), output::unix_seconds());
            connection.execute(Command::EndImport { vdisk, session, name: snapshot, made }).await?;
            Ok(written)
        };
        let Written { summary, skipped } =
            match connection.attached(&name, Attachment::Import, "petal import", take_over, take_in).await {
                Ok(written) => written,
                Err(error) => return Err(explained(&connection, &name, error).await),
            };
        if format.json {
            return output::print_json(&serde_json::json!({
                "disk": name, "snapshot": format!("{name}@{}", header.snapshot), "bytes": summary.bytes,
                "hash": summary.hash.to_string(), "written_before": skipped,
            }));
        }
        let before = match skipped {
            0 => String::new(),
            skipped => format!(", {} of that before it was interrupted", output::size(skipped)),
        };
        println!("Imported {name}@{} ({}{before}).", header.snapshot, output::size(summary.bytes));
        Ok(())
    })
}

/// The stream, what it is called in sentences, and its bytes if that is known.
fn open(file: &Path) -> Result<(Box<dyn Read + Send>, String, u64)> {
    if file == Path::new("-") {
        ensure!(!std::io::stdin().is_terminal(), "standard input is a terminal; send a stream through a pipe");
        return Ok((Box::new(std::io::stdin()), "standard input".into(), 0));
    }
    let name = file.display().to_string();
    ensure!(!file.is_dir(), "{name} is a folder; name the stream in it");
    let opened = File::open(file).with_context(|| format!("cannot read {name}"))?;
    Ok((Box::new(opened), name, file.metadata().map_or(0, |m| m.len())))
}

/// An import that was left in the middle: what is to be done now.
async fn explained(connection: &Connection, name: &str, error: anyhow::Error) -> anyhow::Error {
    let state = connection.state().await.ok();
    let is_unfinished = state.and_then(|state| state.vdisk_named(name).map(Vdisk::is_importing));
    if is_unfinished != Some(true) || refusal(&error).is_some() {
        return error;
    }
    let is_full = matches!(error.downcast_ref(), Some(RequestError::Refused(Refusal::NoSpace)));
    let room = if is_full {
        "make room first (`petal snapshot list --space` shows what takes it) or add disks, then "
    } else {
        ""
    };
    error.context(format!(
        "the import into '{name}' has not ended, and what it holds is neither the old state nor the new one; {room}repeat it with the whole stream, or delete the disk"
    ))
}

fn foreign(state: StateId) -> ForeignState {
    ForeignState {
        cluster: ClusterId(state.cluster),
        family: FamilyId(state.family),
        lineage: LineageId(state.point.lineage),
        epoch: Epoch(state.point.epoch),
    }
}

fn target(imported: &Imported) -> Target {
    let state = |s: ForeignState| StateId {
        cluster: s.cluster.0,
        family: s.family.0,
        point: Point { lineage: s.lineage.0, epoch: s.epoch.0 },
    };
    Target { newest: imported.newest.map(state), begun: imported.begun.map(state) }
}

fn not_imported(name: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "there is a disk named '{name}' already that was not imported; choose another name, or delete it first"
    )
}

/// The disk to write to, made if there is none; `None` if it holds the state already.
async fn prepare(connection: &Connection, name: &str, header: &Header, copies: Option<u8>) -> Result<Option<Vdisk>> {
    check_name(&header.snapshot).context("the name of the snapshot in the stream")?;
    let mut state = connection.state().await?;
    let is_new = state.vdisk_named(name).is_none();
    if is_new {
        // Refused before anything is made.
        header.fit(&Target::default())?;
        let copies = copies.unwrap_or(header.copies);
        let id = create(connection, name, header.size, copies, Some(header.stripe_unit)).await?;
        state = connection.state_with(id).await?;
    }
    let present = find(&state, name)?;
    // One that was made a moment ago, by an import that was killed before it began perhaps, is as good as a new one.
    let is_untouched =
        present.epoch == Epoch(1) && present.size == header.size && state.snapshots_of(present).next().is_none();
    if !is_new && present.imported == Imported::default() && !is_untouched {
        return Err(not_imported(name));
    }
    let fit = header.fit(&target(&present.imported)).with_context(|| format!("'{name}' cannot take this stream"))?;
    if fit == Fit::Present {
        let newest = present.imported.newest;
        ensure!(
            state.snapshots_of(present).any(|s| s.imported.begun == newest),
            "'{name}' has taken in this state, and the snapshot of it is gone; roll it back to one that was imported before \
             (`petal snapshot list {name}`) to take it in again, or import it as a new disk"
        );
        return Ok(None);
    }
    let full = format!("{name}@{}", header.snapshot);
    ensure!(
        state.vdisk_named(&full).is_none(),
        "there is a snapshot '{full}' already, and the stream's is to have that name; rename or delete it first"
    );
    Ok(Some(present.clone()))
}

/// Notes what is to come, and makes the disk as large as that. Returns how far an import came that was interrupted.
async fn begin(connection: &Connection, disk: &Disk, present: &Vdisk, header: &Header) -> Result<Option<Reached>> {
    // Nobody else writes from here on.
    if present.imported == Imported::default() {
        ensure!(diff::extents(disk, None, disk.size()).await?.is_empty(), not_imported(&present.name));
    }
    if present.imported.begun.is_none() {
        unchanged(disk, &connection.state().await?, present, header).await?;
    }
    let (vdisk, session, to) = (present.id, disk.session(), foreign(header.state()));
    connection.execute(Command::BeginImport { vdisk, session, seen: present.imported, to }).await?;
    // From a server that is behind it is less at most.
    let now = connection.state().await?.vdisk(vdisk).cloned();
    let size = disk.size();
    if header.size != size {
        if header.size < size {
            disk.zero(header.size, size - header.size).await?;
        }
        connection.execute(Command::ResizeDisk { vdisk, size: header.size, session }).await?;
        disk.refresh().await?;
    }
    Ok(now.filter(|now| now.imported.begun == Some(to)).and_then(|now| now.reached))
}

/// An increment is right only over exactly the state that it starts from.
async fn unchanged(attached: &Disk, state: &State, disk: &Vdisk, header: &Header) -> Result<()> {
    let Kind::Incremental { from_snapshot, .. } = &header.kind else { return Ok(()) };
    let parent = state
        .snapshots_of(disk)
        .filter(|s| s.imported.begun.is_some_and(|b| Some(b) == disk.imported.newest))
        .last()
        .with_context(|| format!("'{}@{from_snapshot}' is gone, which the stream starts from", disk.name))?;
    let size = attached.size();
    let differs = diff::extents(attached, Some(parent.id), size.min(parent.size)).await?;
    ensure!(
        differs.is_empty() && size == parent.size,
        "'{0}' was changed since {1}, which the stream starts from; `petal rollback {0} --to {1}` brings that back",
        disk.name,
        parent.name
    );
    Ok(())
}

enum Piece {
    Element {
        number: u64,
        data: u16,
        zero: u16,
        bytes: Vec<u8>,
        at: u64,
    },
    /// Everything before was as the writer wrote it.
    Mark(Reached),
    End(Box<Summary>),
}

/// What came of it.
struct Written {
    summary: Summary,
    /// Bytes that an import before had written.
    skipped: u64,
}

/// Reads the stream, in a thread of its own that ends with the process: nobody waits for a pipe that is silent.
fn read_ahead(mut reader: Reader<Box<dyn Read + Send>>) -> mpsc::Receiver<Result<Piece, StreamError>> {
    let (sender, receiver) = mpsc::channel(64);
    std::thread::spawn(move || {
        loop {
            let at = reader.offset();
            let piece = match reader.next_item() {
                Err(refused) => Err(refused),
                Ok(Item::Mark(mark)) => {
                    let below = mark.last_element.map_or(0, |last| last + 1);
                    Ok(Piece::Mark(Reached { below, hash: mark.hash.0 }))
                }
                Ok(Item::End(summary)) => Ok(Piece::End(Box::new(summary))),
                Ok(Item::Element(e)) => {
                    Ok(Piece::Element { number: e.number, data: e.data, zero: e.zero, bytes: e.bytes.to_vec(), at })
                }
            };
            let is_last = matches!(piece, Err(_) | Ok(Piece::End(_)));
            if sender.blocking_send(piece).is_err() || is_last {
                return;
            }
        }
    });
    receiver
}

async fn write(
    connection: &Connection,
    disk: &Disk,
    reader: Reader<Box<dyn Read + Send>>,
    (reached, length): (Option<Reached>, u64),
    name: &str,
    what: &str,
) -> Result<Written> {
    let mut receiver = read_ahead(reader);
    let mut progress = Progress::begin(format!("import {name}"), length);
    let mut writes: JoinSet<Result<()>> = JoinSet::new();
    let mut skipped = 0;
    // What was written before, until its mark comes again.
    let mut before = reached;
    let mut told_at: Option<Instant> = None;
    let mut failed = None;
    let mut summary = None;
    while failed.is_none() && summary.is_none() {
        match receiver.recv().await {
            None => break,
            Some(Err(refused)) => failed = Some(anyhow::Error::from(refused).context(what.to_string())),
            Some(Ok(Piece::Mark(mark))) if before == Some(mark) => before = None,
            Some(Ok(Piece::Element { number, bytes, .. })) if before.is_some_and(|b| number < b.below) => {
                skipped += bytes.len() as u64;
            }
            Some(Ok(Piece::Mark(mark))) if before.is_some_and(|b| mark.below < b.below) => {}
            // It ought to have come by now.
            Some(Ok(_)) if before.is_some() => failed = Some(other_stream(connection, disk, name).await),
            Some(Ok(Piece::Mark(mark))) => {
                if told_at.is_none_or(|at| at.elapsed() >= MARK_EVERY) {
                    failed = all_written(&mut writes).await.err();
                    if failed.is_none() {
                        tell(connection, disk, Some(mark)).await;
                    }
                    told_at = Some(Instant::now());
                }
            }
            Some(Ok(Piece::End(end))) => summary = Some(*end),
            Some(Ok(Piece::Element { number, data, zero, bytes, at })) => {
                progress.at(at);
                if writes.len() >= WRITES_MAX {
                    failed = writes.join_next().await.and_then(flat);
                }
                let disk = disk.clone();
                writes.spawn_local(async move { element(&disk, number, data, zero, bytes).await });
            }
        }
    }
    drop(receiver);
    let written = all_written(&mut writes).await;
    progress.end();
    match failed {
        Some(error) => Err(error),
        None => written
            .and_then(|()| Ok(Written { summary: summary.context("the stream ended without its end mark")?, skipped })),
    }
}

/// Everything before the mark is written: an import that goes on when this one is interrupted begins there. No more than
/// advice: whoever is not told writes it again.
async fn tell(connection: &Connection, disk: &Disk, reached: Option<Reached>) {
    let (vdisk, session) = (disk.id(), disk.session());
    if let Err(error) = connection.execute(Command::ImportReached { vdisk, session, reached }).await {
        tracing::debug!("{error:#}");
    }
}

/// Another stream of the same state: what it says of what was skipped is not known.
async fn other_stream(connection: &Connection, disk: &Disk, name: &str) -> anyhow::Error {
    tell(connection, disk, None).await;
    anyhow::anyhow!(
        "this is not the stream with which the import into '{name}' was begun, though it leads to the same state; repeat \
         the command, and all of it is written"
    )
}

/// Waits for all of them; the first error.
async fn all_written(writes: &mut JoinSet<Result<()>>) -> Result<()> {
    let mut failed = None;
    while let Some(done) = writes.join_next().await {
        failed = failed.or(flat(done));
    }
    failed.map_or(Ok(()), Err)
}

fn flat(done: Result<Result<()>, tokio::task::JoinError>) -> Option<anyhow::Error> {
    match done {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(error) => Some(error.into()),
    }
}

/// Writes one element's blocks, in runs.
async fn element(disk: &Disk, number: u64, data: u16, zero: u16, bytes: Vec<u8>) -> Result<()> {
    let (start, size) = (number * ELEMENT_SIZE, disk.size());
    let bytes = bytes::Bytes::from(bytes);
    let mut taken = 0;
    for (mask, is_data) in [(data, true), (zero, false)] {
        let mut block = 0;
        while block < 16 {
            let run = (mask >> block).trailing_ones();
            if run == 0 {
                block += 1;
                continue;
            }
            let offset = start + u64::from(block) * BLOCK_SIZE;
            // The last block of a disk may be a part of one.
            let length = (u64::from(run) * BLOCK_SIZE).min(size.saturating_sub(offset));
            if is_data {
                disk.write(offset, bytes.slice(taken..taken + length as usize)).await?;
                taken += run as usize * BLOCK_SIZE as usize;
            } else if length > 0 {
                disk.zero(offset, length).await?;
            }
            block += run;
        }
    }
    Ok(())
}
