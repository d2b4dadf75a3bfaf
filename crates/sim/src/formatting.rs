//! Making a host's disks, and finding them again at a start.

use crate::host::{ServerHost, address_of};
use crate::options::Options;
use petal::server::ServerConfig;
use petal::store::{OpenDisk, StoreConfig};

/// Bytes of a new disk file.
pub const FIRST_FRONTIER: u64 = 64 << 20;

/// Formats one disk of a host that has an id.
pub fn format(_machine: &mut ServerHost, _disk: usize) {
    // (waits for the store's pure `format`)
}

/// Reads both copies of a disk's superblock and chooses.
pub fn open(_machine: &mut ServerHost, _disk: usize) -> Result<OpenDisk, String> {
    Err("the store cannot format yet".into())
}

/// What a server is started with.
pub fn server_config(options: &Options, host: usize) -> ServerConfig {
    ServerConfig { addresses: vec![address_of(host)], store: StoreConfig { cache_elements: options.cache_elements } }
}
