//! Attaches a disk of a running cluster, writes to it, reads it back, and shows what is stored.
//!
//! ```text
//! petal up --detach
//! petal disk create scratch 1GiB
//! cargo run -p petal-io --example hello_disk -- scratch unix:petal-data/s1/sock
//! ```
//!
//! It overwrites the first bytes of the disk. docs/client-library.md explains the calls.

use petal_io::client::{Attachment, Client, Config};
use std::error::Error;
use stdx::units::Size;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let disk = arguments.next().ok_or("usage: hello_disk DISK [ADDRESS ...]")?;
    let mut addresses: Vec<String> = arguments.collect();
    if addresses.is_empty() {
        addresses.push("unix:petal-data/s1/sock".into());
    }
    // Everything on this thread. In a program with another runtime: `Client::connect(..).await`.
    petal_io::run(hello(disk, addresses))?
}

async fn hello(name: String, addresses: Vec<String>) -> Result<(), Box<dyn Error>> {
    // One address is enough: the first server tells of the others.
    let client = Client::connect_here(Config::new(addresses)).await?;
    let disk = client.disk(name).holder("hello_disk").attach(Attachment::Exclusive).await?;
    println!("attached {}: {}", disk.name(), Size(disk.size()));

    // Any offset and length. When this returns, the bytes are on stable storage on every copy.
    let text = "Hello, distributed disk!";
    disk.write(1000, text).await?;

    // Requests may run at the same time: on a runtime's tasks, or like this.
    let (a, b) = tokio::try_join!(disk.read(1000, text.len() as u64), disk.read(0, 4096))?;
    println!("read back: {}", String::from_utf8_lossy(&a.concat()));
    println!("the block around it has {} bytes that are not zero", b.concat().iter().filter(|n| **n != 0).count());

    for extent in disk.extents(0, disk.size().min(1 << 20)).await? {
        println!("{:>10} {}", Size(extent.length).to_string(), if extent.allocated { "stored" } else { "zeros" });
    }

    // Gives the space back. `zero` would be exact to the byte; this is about whole blocks.
    disk.discard(0, 4096).await?;
    disk.detach().await?;
    Ok(())
}
