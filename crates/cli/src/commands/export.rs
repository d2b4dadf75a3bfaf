//! `petal export`: a snapshot, or what changed since another one, as a stream that can be verified by itself.
//!
//! ```text
//!  maps -> extents -> reads of up to 4 MiB ----> a thread that writes: file, or standard output
//! ```
//!
//! A file that holds the beginning of the very same stream is continued behind its last good check mark. A raw image gets
//! its name when it is whole.

use super::diff;
use super::disk::find;
use crate::connect::{self, Connection, Disk};
use crate::output;
use crate::place::Place;
use crate::progress::Progress;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Attachment, State, split_name};
use petal::ids::{BLOCK_SIZE, BLOCKS_PER_ELEMENT, ELEMENT_SIZE};
use petal::translator::vdir::Vdisk;
use petal_stream::{Header, Kind, Point, Scan, Summary, Writer};
use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tokio::sync::{mpsc, oneshot};

/// Bytes that are asked for at one time.
const READ_MAX: u64 = 4 << 20;

/// `petal export`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal export vol0@monday monday.petal                         all of it
  petal export vol0@tuesday tuesday.petal --from vol0@monday    what changed in between
  petal export vol0@monday - | zstd > monday.petal.zst
  petal export vol0@monday vol0.img --raw                       a sparse image
  petal stream verify monday.petal                              needs no cluster

The same command again continues a stream that was interrupted; an image begins anew, in FILE.part.")]
pub struct Arguments {
    /// The snapshot, DISK@SNAPSHOT
    snapshot: String,
    /// A file; `-` is standard output
    file: PathBuf,
    /// Only what differs from this snapshot
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "raw")]
    from: Option<String>,
    /// A plain image instead of a stream
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let is_stdout = arguments.file == Path::new("-");
        ensure!(
            !is_stdout || !std::io::stdout().is_terminal(),
            "this is no text; send it to a file or a program: `petal export {} - > FILE`",
            arguments.snapshot
        );
        let connection = Connection::open(&place).await?;
        let state = connection.state().await?;
        let snapshot = find(&state, &arguments.snapshot)?.clone();
        if !snapshot.is_snapshot() {
            bail!(
                "'{0}' is a disk, which changes while it is read; make a snapshot of it first: `petal snapshot create {0}`",
                snapshot.name
            );
        }
        let from = arguments.from.as_deref().map(|from| find(&state, from)).transpose()?.cloned();
        let header = header(&state, &snapshot, from.as_ref())?;
        check_target(&arguments, &snapshot)?;
        let read = async |disk: &Disk| export(disk, &snapshot, from.as_ref(), header, &arguments, is_stdout).await;
        let done = connection.attached(&snapshot.name, Attachment::ReadOnly, "petal export", false, read).await;
        let Some(summary) = done? else { return Ok(()) };
        if arguments.format.json {
            let told = serde_json::json!({
                "snapshot": snapshot.name, "from": arguments.from, "bytes": summary.bytes, "hash": summary.hash.to_string(),
            });
            return if is_stdout { Ok(()) } else { output::print_json(&told) };
        }
        eprintln!("Exported {} ({}, hash {}).", snapshot.name, output::size(summary.bytes), summary.hash);
        Ok(())
    })
}

/// What can be said of the file before anything is read.
fn check_target(arguments: &Arguments, snapshot: &Vdisk) -> Result<()> {
    let path = &arguments.file;
    let (suffix, name) = (if arguments.raw { "img" } else { "petal" }, snapshot.name.replace('@', "-"));
    ensure!(!path.is_dir(), "{0} is a folder; name a file in it, {0}/{name}.{suffix} perhaps", path.display());
    ensure!(
        !arguments.raw || path == Path::new("-") || !path.exists(),
        "{} exists, and an image is never written over; choose another name",
        path.display()
    );
    Ok(())
}

fn header(state: &State, snapshot: &Vdisk, from: Option<&Vdisk>) -> Result<Header> {
    let family = state.families.get(&snapshot.family).context("the disk was deleted meanwhile")?;
    let copies = state.gmaps.get(&family.gmap).map_or(1, |g| g.scheme.copies());
    let point = |v: &Vdisk| Point { lineage: v.lineage.0, epoch: v.epoch.0 };
    let kind = match from {
        None => Kind::Full,
        Some(from) => {
            ensure!(
                from.id != snapshot.id,
                "'{}' cannot be exported as what changed since itself; name an earlier snapshot with --from, or \
                 leave that out for all of it",
                from.name
            );
            let is_before = from.is_snapshot()
                && from.family == snapshot.family
                && ((from.lineage == snapshot.lineage && from.epoch < snapshot.epoch)
                    || family.ancestors(snapshot.lineage).any(|(l, e)| l == from.lineage && from.epoch <= e));
            ensure!(is_before, "'{}' is no earlier snapshot of what '{}' is of", from.name, snapshot.name);
            let name = split_name(&from.name).1.unwrap_or_default().to_string();
            Kind::Incremental { from: point(from), from_snapshot: name }
        }
    };
    let (disk, name) = split_name(&snapshot.name);
    Ok(Header {
        kind,
        cluster: state.cluster.0,
        family: snapshot.family.0,
        to: point(snapshot),
        disk: disk.into(),
        snapshot: name.unwrap_or_default().into(),
        size: snapshot.size,
        stripe_unit: family.stripe_unit,
        copies: copies as u8,
    })
}

/// Where a stream goes: a thread of its own, since files and pipes make wait.
enum Piece {
    Element {
        number: u64,
        data: u16,
        zero: u16,
        bytes: Vec<u8>,
    },
    Raw {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// That was all; without it the output stays without an end.
    End,
}

async fn export(
    disk: &Disk,
    snapshot: &Vdisk,
    from: Option<&Vdisk>,
    header: Header,
    arguments: &Arguments,
    is_stdout: bool,
) -> Result<Option<Summary>> {
    let extents = diff::extents(disk, from.map(|from| from.id), snapshot.size).await?;
    let (mut output, after, image) = match open(&header, arguments, is_stdout)? {
        Opened::Ready(output, after, image) => (output, after, image),
        Opened::Whole(summary) => {
            eprintln!("{} holds this stream already, whole.", arguments.file.display());
            return Ok(Some(summary));
        }
    };
    let (sender, mut receiver) = mpsc::channel::<Piece>(64);
    let size = snapshot.size;
    let (told, written) = oneshot::channel();
    // A thread of its own, which ends with the process: nobody waits for a pipe that takes nothing.
    std::thread::spawn(move || {
        let mut write = || loop {
            match receiver.blocking_recv() {
                Some(Piece::End) => return Ok(()),
                Some(piece) => output.put(piece)?,
                None => bail!("the export was interrupted"),
            }
        };
        let written = write().and_then(|()| output.finish(size));
        let _ = told.send(written);
    });
    let total = extents.iter().map(|(_, length)| length).sum();
    let mut progress = Progress::begin(format!("export {}", snapshot.name), total);
    let mut done = 0;
    let mut failed = None;
    'all: for (first, last) in windows(&extents, after) {
        let (offset, end) = (first * ELEMENT_SIZE, ((last + 1) * ELEMENT_SIZE).min(size.next_multiple_of(BLOCK_SIZE)));
        let length = end.min(size) - offset;
        let bytes = match disk.read(offset, length).await {
            Ok(pieces) => pieces.concat(),
            Err(error) => {
                failed = Some(error);
                break;
            }
        };
        for piece in pieces(first, &bytes, &extents, arguments.raw, from.is_some()) {
            if sender.send(piece).await.is_err() {
                break 'all; // The writer says why.
            }
        }
        done += length;
        progress.at(done);
    }
    progress.end();
    if failed.is_none() {
        let _ = sender.send(Piece::End).await; // If nobody takes it, the writer says why.
    }
    drop(sender);
    let written = written.await.context("the writing thread ended")?;
    if let Some(error) = failed {
        return Err(error).context("the snapshot cannot be read; repeat the command: a stream in a file is continued");
    }
    let written = written?;
    image.map_or(Ok(()), Image::keep)?;
    Ok(written)
}

/// Runs of elements `(first, last)` that the extents touch, each at most `READ_MAX` long; behind element `after`.
fn windows(extents: &[(u64, u64)], after: Option<u64>) -> Vec<(u64, u64)> {
    let mut windows: Vec<(u64, u64)> = Vec::new();
    for (offset, length) in extents {
        let (first, last) = (offset / ELEMENT_SIZE, (offset + length - 1) / ELEMENT_SIZE);
        let from = after.map_or(first, |after| first.max(after + 1));
        for element in from..=last {
            match windows.last_mut() {
                Some((_, last)) if element == *last => {}
                Some((first, last)) if element == *last + 1 && (element - *first) * ELEMENT_SIZE < READ_MAX => {
                    *last = element;
                }
                _ => windows.push((element, element)),
            }
        }
    }
    windows
}

/// What is written of a window's bytes.
fn pieces(first: u64, bytes: &[u8], extents: &[(u64, u64)], raw: bool, is_increment: bool) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (number, element) in (first..).zip(bytes.chunks(ELEMENT_SIZE as usize)) {
        let start = number * ELEMENT_SIZE;
        let (mut data, mut zero, mut kept) = (0u16, 0u16, Vec::new());
        for block in 0..BLOCKS_PER_ELEMENT.min(element.len().div_ceil(BLOCK_SIZE as usize)) {
            let at = block * BLOCK_SIZE as usize;
            let offset = start + at as u64;
            let upto = extents.partition_point(|(o, _)| *o <= offset);
            if upto == 0 || extents[upto - 1].0 + extents[upto - 1].1 <= offset {
                continue;
            }
            let content = &element[at..(at + BLOCK_SIZE as usize).min(element.len())];
            if raw {
                pieces.push(Piece::Raw { offset, bytes: content.to_vec() });
            } else if content.iter().all(|b| *b == 0) {
                zero |= u16::from(is_increment) << block;
            } else {
                data |= 1 << block;
                kept.extend_from_slice(content);
                kept.resize(kept.len().next_multiple_of(BLOCK_SIZE as usize), 0);
            }
        }
        if data | zero != 0 {
            pieces.push(Piece::Element { number, data, zero, bytes: kept });
        }
    }
    pieces
}

enum Output {
    Stream(Box<Writer<Box<dyn Write + Send>>>, Option<File>),
    RawFile(File),
    RawPipe(std::io::Stdout, u64),
}

enum Opened {
    /// To be written, behind this element; the image gets its name in the end.
    Ready(Output, Option<u64>, Option<Image>),
    /// There is nothing left to do.
    Whole(Summary),
}

fn open(header: &Header, arguments: &Arguments, is_stdout: bool) -> Result<Opened> {
    let path = &arguments.file;
    if arguments.raw && is_stdout {
        return Ok(Opened::Ready(Output::RawPipe(std::io::stdout(), 0), None, None));
    }
    if arguments.raw {
        let (image, file) = Image::begin(path)?;
        return Ok(Opened::Ready(Output::RawFile(file), None, Some(image)));
    }
    if is_stdout {
        let writer = Writer::create(Box::new(std::io::stdout()) as Box<dyn Write + Send>, header.clone())?;
        return Ok(Opened::Ready(Output::Stream(Box::new(writer), None), None, None));
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
    if is_regular(&file) {
        lock(&file, path)?;
    }
    if is_regular(&file) && file.metadata()?.len() > 0 {
        let other =
            || format!("{} exists, and is not the beginning of this stream; choose another name", path.display());
        let before = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        return match petal_stream::scan(before).with_context(other)? {
            Scan::Whole(summary) if summary.header == *header => Ok(Opened::Whole(summary)),
            Scan::Interrupted(part) if part.header() == header => {
                file.set_len(part.offset())?;
                file.seek(SeekFrom::End(0))?;
                eprintln!("{} is continued at {}.", path.display(), output::size(part.offset()));
                let (after, durable) = (part.last_element(), file.try_clone()?);
                let writer = Writer::resume(Box::new(file) as Box<dyn Write + Send>, part);
                Ok(Opened::Ready(Output::Stream(Box::new(writer), Some(durable)), after, None))
            }
            _ => bail!(other()),
        };
    }
    let durable = file.try_clone()?;
    let writer = Writer::create(Box::new(file) as Box<dyn Write + Send>, header.clone())?;
    Ok(Opened::Ready(Output::Stream(Box::new(writer), Some(durable)), None, None))
}

/// Two exports to one file would write into each other's.
fn lock(file: &File, path: &Path) -> Result<()> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("{} is being written by another export; wait for it", path.display())
        }
        // Some file systems cannot lock.
        _ => Ok(()),
    }
}

/// An image that is being written, under a name of its own until it is whole: nothing in it says where it ends.
struct Image {
    part: PathBuf,
    whole: PathBuf,
    is_kept: bool,
}

impl Image {
    /// What one that was killed left is written over: an image cannot be continued.
    fn begin(whole: &Path) -> Result<(Image, File)> {
        let part = PathBuf::from(format!("{}.part", whole.display()));
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&part);
        let file = file.with_context(|| format!("cannot write {}", part.display()))?;
        lock(&file, &part)?;
        let image = Image { part, whole: whole.into(), is_kept: false };
        file.set_len(0)?;
        Ok((image, file))
    }

    fn keep(mut self) -> Result<()> {
        ensure!(!self.whole.exists(), "{} was made meanwhile; an image is never written over", self.whole.display());
        std::fs::rename(&self.part, &self.whole)
            .with_context(|| format!("cannot rename {} to {}", self.part.display(), self.whole.display()))?;
        self.is_kept = true;
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

impl Output {
    fn put(&mut self, piece: Piece) -> Result<()> {
        match (self, piece) {
            (Output::Stream(writer, _), Piece::Element { number, data, zero, bytes }) => {
                writer.element(number, data, zero, &bytes)?;
            }
            (Output::RawFile(file), Piece::Raw { offset, bytes }) => {
                std::os::unix::fs::FileExt::write_all_at(file, &bytes, offset)?;
            }
            (Output::RawPipe(out, at), Piece::Raw { offset, bytes }) => {
                zeros(out, offset - *at)?;
                out.write_all(&bytes)?;
                *at = offset + bytes.len() as u64;
            }
            _ => unreachable!("pieces are of the output's kind"),
        }
        Ok(())
    }

    fn finish(self, size: u64) -> Result<Option<Summary>> {
        match self {
            Output::Stream(writer, durable) => {
                let (_, summary) = writer.finish()?;
                if let Some(file) = durable.filter(is_regular) {
                    file.sync_all()?;
                }
                Ok(Some(summary))
            }
            Output::RawFile(file) => {
                file.set_len(size)?;
                file.sync_all()?;
                Ok(None)
            }
            Output::RawPipe(mut out, at) => {
                zeros(&mut out, size - at)?;
                out.flush()?;
                Ok(None)
            }
        }
    }
}

/// Pipes and devices are neither locked nor synced, nor continued.
fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|m| m.is_file())
}

fn zeros(out: &mut impl Write, mut count: u64) -> std::io::Result<()> {
    let some = [0; 65536];
    while count > 0 {
        let now = count.min(some.len() as u64);
        out.write_all(&some[..now as usize])?;
        count -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_what_the_extents_touch_once_and_begin_behind_what_is_written() {
        let e = ELEMENT_SIZE;
        let extents = [(4096, 4096), (12288, e), (5 * e, 70 * e)];
        assert_eq!(windows(&extents, None), [(0, 1), (5, 68), (69, 74)]);
        assert_eq!(windows(&extents, Some(5)), [(6, 69), (70, 74)]);
        assert_eq!(windows(&[], None), []);
    }

    #[test]
    fn an_increment_tells_zeros_and_a_full_stream_leaves_them_out() {
        let mut bytes = vec![0; 2 * ELEMENT_SIZE as usize];
        bytes[4096..8192].fill(7);
        let extents = [(0, 3 * 4096)];
        let masks = |is_increment| match &pieces(
            9,
            &bytes,
            &[(9 * ELEMENT_SIZE + extents[0].0, extents[0].1)],
            false,
            is_increment,
        )[..]
        {
            [Piece::Element { number: 9, data, zero, bytes }] => (*data, *zero, bytes.len()),
            other => panic!("{} pieces", other.len()),
        };
        assert_eq!(masks(true), (0b010, 0b101, 4096));
        assert_eq!(masks(false), (0b010, 0, 4096));
    }
}
