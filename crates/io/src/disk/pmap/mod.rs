//! The PMap store of one disk: redb in a region of the disk, on a thread of its own.
//!
//! redb blocks (it reads and syncs where it stands), so it may not run on the reactor. Commands go to
//! the thread through a queue and are answered in order through the mailbox; the stepped store above
//! has its own bound on how many it keeps in flight.
//!
//! Every commit is two-phase and leaves redb's allocator state behind ("quick repair"), so that opening
//! after a crash reads two pages instead of walking the database.
//!
//! How it fails: a page that does not match its checksum, an error of the disk or a panic of redb ends
//! the store: that command and all later ones are answered with the first error. Nothing is ever
//! answered on the ground of a page that could not be checked ([`pages`]).

mod pages;
#[cfg(test)]
mod tests;

use super::mailbox::Mailbox;
use super::open::{DiskFile, disk_error};
use bytes::Bytes;
use pages::{CheckedPages, Region};
use petal::store::{DiskCommand, DiskError, DiskResult, OpId, Table};
use redb::{Database, ReadableDatabase, TableDefinition};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

type RedbTable = TableDefinition<'static, &'static [u8], &'static [u8]>;

const TABLES: [Table; 5] = [Table::Heads, Table::Rows, Table::Changes, Table::Free, Table::Meta];

/// Names are part of the format of the disk.
fn definition(table: Table) -> RedbTable {
    TableDefinition::new(match table {
        Table::Heads => "heads",
        Table::Rows => "rows",
        Table::Changes => "changes",
        Table::Free => "free",
        Table::Meta => "meta",
    })
}

/// A region of an open disk.
struct DiskRegion {
    file: Arc<DiskFile>,
    range: Range<u64>,
}

impl Region for DiskRegion {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.file
            .read_at(buffer, self.range.start + offset)
            .map_err(|error| disk_error(self.file.path(), "read the PMap store of", &error))
    }
    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        self.file
            .write_at(buffer, self.range.start + offset)
            .map_err(|error| disk_error(self.file.path(), "write the PMap store of", &error))
    }
    fn sync(&self) -> Result<(), DiskError> {
        self.file.sync().map_err(|error| disk_error(self.file.path(), "sync the PMap store of", &error))
    }
    fn length(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Writes an empty PMap store into a region of a disk that is being formatted.
pub(super) fn format(file: &Arc<DiskFile>, range: Range<u64>) -> Result<(), DiskError> {
    pages::format(&DiskRegion { file: file.clone(), range })
}

/// The thread of one disk's PMap store.
pub(super) struct PmapThread {
    /// `None` only while it is being dropped.
    commands: Option<Sender<(OpId, DiskCommand)>>,
    thread: Option<JoinHandle<()>>,
}

impl PmapThread {
    /// Starts the thread; it opens the store at once. If that fails, every command says why.
    pub(super) fn start(
        disk: usize,
        file: Arc<DiskFile>,
        range: Range<u64>,
        cache_bytes: usize,
        mailbox: Arc<Mailbox>,
    ) -> std::io::Result<PmapThread> {
        let (commands, queue) = channel();
        let region = DiskRegion { file, range };
        let thread = std::thread::Builder::new()
            .name(format!("pmap-{disk}"))
            .spawn(move || serve(disk, region, cache_bytes, &queue, &mailbox))?;
        Ok(PmapThread { commands: Some(commands), thread: Some(thread) })
    }

    /// Queues a command.
    pub(super) fn submit(&self, op: OpId, command: DiskCommand) {
        let commands = self.commands.as_ref().expect("alive until dropped");
        commands.send((op, command)).expect("the thread ends only when the queue does");
    }
}

impl Drop for PmapThread {
    /// Waits until what was queued is done and redb is closed: the thread holds the disk's lock.
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    disk: usize,
    region: impl Region,
    cache_bytes: usize,
    queue: &Receiver<(OpId, DiskCommand)>,
    mailbox: &Mailbox,
) {
    let mut store = Guarded::open(region, cache_bytes);
    while let Ok(first) = queue.recv() {
        let mut answers = Vec::new();
        for (op, command) in std::iter::once(first).chain(queue.try_iter()) {
            if matches!(command, DiskCommand::PmapCommit { .. }) && !answers.is_empty() {
                // A commit takes long: what is known before is told before.
                mailbox.put(std::mem::take(&mut answers));
            }
            answers.push((disk, op, store.answer(command)));
        }
        mailbox.put(answers);
    }
    store.close();
}

/// A store that cannot take its thread down, and that is dead after its first failure.
enum Guarded {
    Open(Store),
    Failed(DiskError),
}

impl Guarded {
    fn open(region: impl Region, cache_bytes: usize) -> Guarded {
        match quietly(|| Store::open(region, cache_bytes)) {
            Ok(Ok(store)) => Guarded::Open(store),
            Ok(Err(error)) => Guarded::Failed(error),
            Err(panic) => Guarded::Failed(panic),
        }
    }

    fn answer(&mut self, command: DiskCommand) -> DiskResult {
        match command {
            DiskCommand::PmapGet { table, key } => DiskResult::PmapValue(self.run(|store| store.get(table, &key))),
            DiskCommand::PmapRange { table, from, to, limit } => {
                DiskResult::PmapRange(self.run(|store| store.range(table, &from, &to, limit)))
            }
            DiskCommand::PmapCommit { changes } => DiskResult::PmapCommitted(self.run(|store| store.commit(&changes))),
            other => panic!("{other:?} is not for the PMap store"),
        }
    }

    fn run<T>(&mut self, work: impl FnOnce(&Store) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let store = match self {
            Guarded::Open(store) => store,
            Guarded::Failed(error) => return Err(error.clone()),
        };
        let result = quietly(|| work(store)).unwrap_or_else(Err);
        if let Err(error) = &result {
            store.pages.kill(error.clone());
            if let Guarded::Open(store) = std::mem::replace(self, Guarded::Failed(error.clone())) {
                let _ = quietly(|| drop(store));
            }
        }
        result
    }

    fn close(self) {
        if let Guarded::Open(store) = self {
            let _ = quietly(|| drop(store));
        }
    }
}

/// Turns a panic into an error.
fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, DiskError> {
    // What the closure touches is never used again after a panic: `Guarded` becomes `Failed`.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        DiskError::PmapDamaged(format!("redb panicked: {text}"))
    })
}

/// redb over checked pages.
struct Store {
    database: Database,
    pages: CheckedPages,
}

impl Store {
    fn open(region: impl Region, cache_bytes: usize) -> Result<Store, DiskError> {
        let pages = CheckedPages::open(region)?;
        let database = redb::Builder::new()
            .set_cache_size(cache_bytes)
            .set_repair_callback(|_| tracing::warn!("the PMap store has to be walked through after a crash"))
            .create_with_backend(pages.clone())
            .map_err(|error| error_of(&pages, &error))?;
        let store = Store { database, pages };
        store.make_tables()?;
        Ok(store)
    }

    /// A missing table would be an error on each read, and must not be taken for an empty one.
    fn make_tables(&self) -> Result<(), DiskError> {
        let known = self.tried(|| Ok(self.database.begin_read()?.list_tables()?.count()))?;
        if known == TABLES.len() {
            return Ok(());
        }
        self.write(|transaction| {
            for table in TABLES {
                transaction.open_table(definition(table))?;
            }
            Ok(())
        })
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, DiskError> {
        self.tried(|| {
            let table = self.database.begin_read()?.open_table(definition(table))?;
            Ok(table.get(key)?.map(|value| Bytes::copy_from_slice(value.value())))
        })
    }

    fn range(&self, table: Table, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, DiskError> {
        if from >= to {
            return Ok(Vec::new());
        }
        self.tried(|| {
            let table = self.database.begin_read()?.open_table(definition(table))?;
            let mut entries = Vec::new();
            for entry in table.range(from..to)?.take(limit) {
                let (key, value) = entry?;
                entries.push((Bytes::copy_from_slice(key.value()), Bytes::copy_from_slice(value.value())));
            }
            Ok(entries)
        })
    }

    fn commit(&self, changes: &[(Table, Bytes, Option<Bytes>)]) -> Result<(), DiskError> {
        if changes.is_empty() {
            return Ok(());
        }
        self.write(|transaction| {
            for name in TABLES {
                let mut changes: Vec<_> = changes.iter().filter(|(table, ..)| *table == name).collect();
                if changes.is_empty() {
                    continue;
                }
                // Neighbours one after the other: a page is taken up once. Changes of one key keep their order.
                changes.sort_by(|(_, one, _), (_, other, _)| one.cmp(other));
                let mut table = transaction.open_table(definition(name))?;
                for (_, key, value) in changes {
                    match value {
                        Some(value) => table.insert(&key[..], &value[..])?,
                        None => table.remove(&key[..])?,
                    };
                }
            }
            Ok(())
        })
    }

    fn write(&self, work: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>) -> Result<(), DiskError> {
        self.tried(|| {
            let mut transaction = self.database.begin_write()?;
            transaction.set_two_phase_commit(true);
            transaction.set_quick_repair(true);
            work(&transaction)?;
            transaction.commit()?;
            Ok(())
        })
    }

    fn tried<T>(&self, work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, DiskError> {
        work().map_err(|error| error_of(&self.pages, &error))
    }
}

/// What really happened is known below redb, which only passes on that something did.
fn error_of(pages: &CheckedPages, error: &dyn std::error::Error) -> DiskError {
    pages.fault().unwrap_or_else(|| DiskError::PmapDamaged(error.to_string()))
}
