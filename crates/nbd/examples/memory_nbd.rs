//! Serves a sparse disk in memory: what the protocol costs without any storage behind it.
//!
//! ```text
//! cargo run --release -p petal-nbd --example memory_nbd -- unix:/tmp/m.sock [SIZE_IN_BYTES] [KIND]
//! nbdinfo 'nbd+unix:///?socket=/tmp/m.sock'
//! ```
//!
//! KIND is `memory`; `null`, which reads zeros and forgets; or `later`, which is `null` answered by
//! another task through a queue and a oneshot, as a client of a cluster is.

use bytes::Bytes;
use petal_nbd::*;
use std::path::Path;
use tokio::sync::{mpsc, oneshot};

/// Every request is answered by a task of its own.
#[derive(Clone)]
struct Later {
    null: NullExport,
    queue: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

impl Later {
    fn new(null: NullExport) -> Self {
        let (queue, mut requests) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
        tokio::task::spawn_local(async move {
            let mut batch = Vec::new();
            while requests.recv_many(&mut batch, 128).await > 0 {
                for answer in batch.drain(..) {
                    // A client that is gone no longer waits; that is fine.
                    let _ = answer.send(());
                }
            }
        });
        Later { null, queue }
    }

    async fn answered(&self) -> Result<(), ExportError> {
        let gone = || ExportError::new(Errno::Io, "the task that answers is gone");
        let (answer, answered) = oneshot::channel();
        self.queue.send(answer).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
}

impl Export for Later {
    fn size(&self) -> u64 {
        self.null.size()
    }
    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ExportError> {
        self.answered().await?;
        self.null.read(offset, length).await
    }
    async fn write(&self, _: u64, _: Bytes, _: bool) -> Result<(), ExportError> {
        self.answered().await
    }
    async fn zero(&self, _: u64, _: u64, _: Zeroing) -> Result<(), ExportError> {
        self.answered().await
    }
    async fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), ExportError> {
        self.answered().await
    }
    async fn flush(&self) -> Result<(), ExportError> {
        self.answered().await
    }
    async fn extents(&self, _: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError> {
        Ok(vec![(length, false)])
    }
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:10810".into());
    let size = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(1 << 30);
    let kind = arguments.next().unwrap_or_else(|| "memory".into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        match kind.as_str() {
            "null" => serve(address, NullExport { size }).await,
            "later" => serve(address, Later::new(NullExport { size })).await,
            _ => serve(address, MemoryExport::new(size)).await,
        }
    })
}

async fn serve<E: Export + Clone>(address: String, export: E) -> std::io::Result<()> {
    let listener = match address.strip_prefix("unix:") {
        Some(path) => Listener::bind_unix(Path::new(path))?,
        None => Listener::bind_tcp(address.parse().map_err(std::io::Error::other)?).await?,
    };
    let server = Server::new(StaticExports::new(vec![("vol0", "a disk in memory", export)]), Config::default());
    println!("serving vol0 on {address}");
    let serving = server.serve(listener);
    let stop = async {
        let _ = tokio::signal::ctrl_c().await;
        server.shutdown().await;
    };
    tokio::join!(serving, stop);
    Ok(())
}
