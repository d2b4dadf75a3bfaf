//! The cluster's disks as NBD exports: attached when the first connection wants one, detached after the
//! last.

use crate::connect::{Connection, Disk};
use bytes::Bytes;
use petal::client::RequestError;
use petal::global_state::{Attachment, Command, CommandError, State, split_name};
use petal::ids::SessionId;
use petal::message::{AdminError, Refusal};
use petal::translator::vdir::Vdisk;
use petal_nbd::{Errno, Export, ExportError, ExportInfo, Exports, OpenError, Piece, Zeroing};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

/// All disks of a cluster, or some, and their snapshots.
pub struct ClusterExports {
    connection: Connection,
    /// Who attaches, in words. A session of the same holder that is not one of `sessions` is one of an earlier
    /// life, and is ended.
    holder: String,
    sessions: Rc<RefCell<BTreeSet<SessionId>>>,
    only: Vec<String>,
    read_only: bool,
    take_over: bool,
}

impl ClusterExports {
    /// All disks, writable; `holder` attaches them.
    pub fn new(connection: Connection, holder: String) -> ClusterExports {
        let (sessions, only) = (Rc::default(), Vec::new());
        ClusterExports { connection, holder, sessions, only, read_only: false, take_over: false }
    }

    /// Only these disks, each with its snapshots, or snapshots; empty = all.
    pub fn only(self, only: Vec<String>) -> ClusterExports {
        ClusterExports { only, ..self }
    }

    /// Nothing may be written.
    pub fn read_only(self, read_only: bool) -> ClusterExports {
        ClusterExports { read_only, ..self }
    }

    /// End the sessions of others.
    pub fn take_over(self, take_over: bool) -> ClusterExports {
        ClusterExports { take_over, ..self }
    }

    fn serves(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|n| n == name || n == split_name(name).0)
    }

    fn info(&self, disk: &Vdisk) -> ExportInfo {
        ExportInfo {
            name: disk.name.clone(),
            description: String::new(),
            size: disk.size,
            read_only: disk.is_snapshot() || self.read_only,
        }
    }

    async fn state(&self) -> Result<State, OpenError> {
        self.connection.state().await.map_err(|e| OpenError::Failed(format!("{e:#}")))
    }

    /// Sessions that an earlier life of this front end left on what it only read: they are in nobody's way there,
    /// and would keep a snapshot from being deleted for ever.
    async fn end_earlier_readers(&self, name: &str) -> Result<(), OpenError> {
        let state = self.state().await?;
        let sessions = state.vdisk_named(name).map_or(&[][..], |d| &d.sessions);
        for id in sessions {
            let is_own = state.session(*id).is_some_and(|s| s.holder == self.holder && s.mode == Attachment::ReadOnly);
            if is_own && !self.sessions.borrow().contains(id) {
                // One that somebody else has ended meanwhile is as good.
                let _ = self.connection.execute(Command::Detach { session: *id }).await;
            }
        }
        Ok(())
    }
}

impl Exports for ClusterExports {
    type Export = DiskExport;

    /// Disks first: the first is the default export.
    async fn list(&self) -> Result<Vec<ExportInfo>, OpenError> {
        let state = self.state().await?;
        let served = |snapshots: bool| {
            let all = state.vdisks.values().filter(move |d| d.is_snapshot() == snapshots);
            all.filter(|d| self.serves(&d.name)).map(|d| self.info(d))
        };
        Ok(served(false).chain(served(true)).collect())
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let found = self.connection.disk(name).await.map_err(|e| OpenError::Failed(e.to_string()))?;
        let disk = found.filter(|_| self.serves(name));
        disk.map(|d| self.info(&d)).ok_or_else(|| OpenError::NotFound(name.into()))
    }

    async fn open(&self, name: &str) -> Result<DiskExport, OpenError> {
        if !self.serves(name) {
            return Err(OpenError::NotFound(name.into()));
        }
        let read_only = self.read_only || split_name(name).1.is_some();
        if read_only {
            self.end_earlier_readers(name).await?;
        }
        let mode = if read_only { Attachment::ReadOnly } else { Attachment::Exclusive };
        let attach = |take_over| self.connection.attach(name, mode, &self.holder, take_over);
        let mut result = attach(self.take_over).await;
        // Our own session of an earlier life, which ended without a detach.
        if matches!(&result, Err(RequestError::Admin(AdminError::Refused(CommandError::InUse { holder, .. })))
            if *holder == self.holder)
        {
            result = attach(true).await;
        }
        match result {
            Ok(disk) => {
                self.sessions.borrow_mut().insert(disk.session());
                Ok(DiskExport { disk, read_only, sessions: self.sessions.clone() })
            }
            Err(RequestError::Admin(AdminError::NoSuchDisk(name))) => Err(OpenError::NotFound(name)),
            Err(e @ RequestError::Admin(AdminError::Refused(CommandError::InUse { .. }))) => {
                Err(OpenError::Busy(e.to_string()))
            }
            Err(e) => Err(OpenError::Failed(e.to_string())),
        }
    }
}

/// One attached disk.
pub struct DiskExport {
    disk: Disk,
    read_only: bool,
    sessions: Rc<RefCell<BTreeSet<SessionId>>>,
}

impl Export for DiskExport {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ExportError> {
        let pieces = self.disk.read(offset, length).await.map_err(refused)?;
        Ok(pieces.into_iter().map(Piece::from).collect())
    }
    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), ExportError> {
        // What Petal acknowledges is stable: FUA and flush cost nothing (2.11, "flush is free").
        self.disk.write(offset, data).await.map_err(refused)
    }
    async fn zero(&self, offset: u64, length: u64, _how: Zeroing) -> Result<(), ExportError> {
        self.disk.zero(offset, length).await.map_err(refused)
    }
    async fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), ExportError> {
        self.disk.discard(offset, length).await.map_err(refused)
    }
    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError> {
        let extents = self.disk.extents(offset, length).await.map_err(refused)?;
        Ok(extents.into_iter().map(|e| (e.length, e.allocated)).collect())
    }
    async fn close(&self) {
        let session = self.disk.session();
        if let Err(error) = self.disk.detach().await {
            tracing::warn!("a disk could not be detached: {error}; the next attachment takes it over");
        }
        self.sessions.borrow_mut().remove(&session);
    }
}

fn refused(error: RequestError) -> ExportError {
    let errno = match &error {
        RequestError::Refused(Refusal::NoSpace) => Errno::NoSpace,
        RequestError::Refused(Refusal::ReadOnly) => Errno::NotPermitted,
        RequestError::Refused(Refusal::BeyondEnd) => Errno::Invalid,
        RequestError::Refused(Refusal::SessionEnded) | RequestError::NotAttached => Errno::ShuttingDown,
        _ => Errno::Io,
    };
    ExportError::new(errno, error.to_string())
}
