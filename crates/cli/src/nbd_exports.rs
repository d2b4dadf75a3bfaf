//! The cluster's disks as NBD exports: attached when the first connection wants one, detached after the
//! last.

use crate::connect::{Connection, Disk};
use bytes::Bytes;
use petal::client::RequestError;
use petal::global_state::{Attachment, CommandError, split_name};
use petal::message::{AdminError, Refusal};
use petal_nbd::{Errno, Export, ExportError, ExportInfo, Exports, OpenError, Piece, Zeroing};

/// All disks of a cluster, or some.
pub struct ClusterExports {
    /// How the cluster is reached.
    pub connection: Connection,
    /// Who attaches, in words. A session of the same holder is one of an earlier life, and is taken over.
    pub holder: String,
    /// Only these disks; empty = all.
    pub only: Vec<String>,
    /// Nothing may be written.
    pub read_only: bool,
    /// End the sessions of others.
    pub take_over: bool,
}

impl ClusterExports {
    fn serves(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|n| n == name)
    }
}

impl Exports for ClusterExports {
    type Export = DiskExport;

    async fn list(&self) -> Result<Vec<ExportInfo>, OpenError> {
        let state = self.connection.state().await.map_err(|e| OpenError::Failed(format!("{e:#}")))?;
        let disks = state.vdisks.values().filter(|d| self.serves(&d.name));
        let info = |disk: &petal::translator::vdir::Vdisk| ExportInfo {
            name: disk.name.clone(),
            description: String::new(),
            size: disk.size,
            read_only: disk.is_snapshot() || self.read_only,
        };
        Ok(disks.map(info).collect())
    }

    async fn open(&self, name: &str) -> Result<DiskExport, OpenError> {
        if !self.serves(name) {
            return Err(OpenError::NotFound(name.into()));
        }
        let read_only = self.read_only || split_name(name).1.is_some();
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
            Ok(disk) => Ok(DiskExport { disk, read_only }),
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
        if let Err(error) = self.disk.detach().await {
            tracing::warn!("a disk could not be detached: {error}; the next attachment takes it over");
        }
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
