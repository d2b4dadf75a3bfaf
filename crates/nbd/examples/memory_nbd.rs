//! Serves a sparse disk in memory: what the protocol costs without any storage behind it.
//!
//! ```text
//! cargo run --release -p petal-nbd --example memory_nbd -- unix:/tmp/m.sock [SIZE_IN_BYTES] [null]
//! nbdinfo 'nbd+unix:///?socket=/tmp/m.sock'
//! ```

use petal_nbd::{Config, Export, Listener, MemoryExport, NullExport, Server, StaticExports};
use std::path::Path;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:10810".into());
    let size = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(1 << 30);
    let null = arguments.next().is_some_and(|a| a == "null");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        match null {
            true => serve(address, NullExport { size }).await,
            false => serve(address, MemoryExport::new(size)).await,
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
