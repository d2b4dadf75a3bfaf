//! Making a host's disks, and finding them again at a start.

use crate::host::{ServerHost, address_of};
use crate::options::Options;
use bytes::Bytes;
use petal::ids::{BLOCK_SIZE, DiskId, Incarnation};
use petal::limits::HALF_LEASE;
use petal::scrub::ScrubConfig;
use petal::server::ServerConfig;
use petal::store::superblock::{FormatParams, SUPERBLOCK_SIZE, Superblock};
use petal::store::{DiskCommand, DiskResult, OpenDisk, StoreConfig};
use stdx::Instant;

/// Formats one disk of a host that has an id. The PMap store of a pretended disk is empty from the
/// start.
pub fn format(machine: &mut ServerHost, disk: usize, options: &Options) {
    format_for(machine, disk, (Incarnation(0), 0), options);
}

/// Makes the host's disks those of a server with these: new ones are formatted, kept ones come first and are told.
pub fn replace(
    machine: &mut ServerHost,
    disks: Vec<DiskId>,
    incarnation: Incarnation,
    votes_from: u32,
    options: &Options,
) {
    let old = std::mem::replace(&mut machine.disk_ids, disks.clone());
    for (at, id) in disks.iter().enumerate() {
        if !old.contains(id) {
            format_for(machine, at, (incarnation, votes_from), options);
            continue;
        }
        let superblock = open(machine, at).expect("it was not lost").superblock;
        let (_, (offset, bytes)) = superblock.regroup(disks.clone(), votes_from).expect("as many as before");
        machine.disks[at].execute(DiskCommand::Write { offset, pieces: vec![bytes] });
    }
}

fn format_for(machine: &mut ServerHost, disk: usize, (incarnation, votes_from): (Incarnation, u32), options: &Options) {
    let params = FormatParams {
        genesis: machine.genesis.clone(),
        server: machine.id.expect("it has been given an id"),
        disk: machine.disk_ids[disk],
        disks: machine.disk_ids.clone(),
        size: machine.disks[disk].size(),
        incarnation,
        votes_from,
    };
    let (mut superblock, _) = Superblock::format(params).expect("the options draw disks that can be formatted");
    let layout = &mut superblock.layout;
    layout.journal.length = options.journal.unwrap_or(layout.journal.length);
    layout.data.length = options.data.unwrap_or(layout.data.length);
    layout.check().expect("shorter regions do not overlap");
    let (journal, data) = (layout.journal.offset, layout.data.offset);
    let disk = &mut machine.disks[disk];
    disk.data_start = data;
    disk.lies = options.faults.lie > 0;
    disk.execute(DiskCommand::Extend { to: data, hurry: false });
    let before = Superblock { generation: 0, ..superblock.clone() };
    for (offset, bytes) in [
        (journal, Bytes::from(vec![0; BLOCK_SIZE as usize])),
        (Superblock::copy_offset(0), before.encode()),
        (Superblock::copy_offset(1), superblock.encode()),
    ] {
        disk.execute(DiskCommand::Write { offset, pieces: vec![bytes] });
    }
}

/// Reads both copies of a disk's superblock and chooses.
pub fn open(machine: &mut ServerHost, disk: usize) -> Result<OpenDisk, String> {
    let disk = &mut machine.disks[disk];
    let length = 2 * SUPERBLOCK_SIZE as u64;
    let DiskResult::Read(Ok(bytes)) = disk.execute(DiskCommand::Read { offset: 0, length }) else {
        return Err("its first bytes cannot be read".into());
    };
    let (a, b) = bytes.split_at(SUPERBLOCK_SIZE);
    let superblock = Superblock::choose(a, b).map_err(|e| e.to_string())?;
    Ok(OpenDisk { path: format!("disk {}", superblock.disk), superblock, frontier: disk.frontier() })
}

/// What a server is started with.
pub fn server_config(options: &Options, host: usize, life: u64, now: Instant) -> ServerConfig {
    ServerConfig {
        addresses: vec![address_of(host)],
        store: StoreConfig { cache_elements: options.cache_elements, ..StoreConfig::default() },
        scrub: ScrubConfig { period: options.scrub_period, unix_seconds: now.as_nanos() / 1_000_000_000 },
        sabotage: options.sabotage,
        witness: false,
        disk_patience: HALF_LEASE,
        salt: (host as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ life.wrapping_mul(0xbf58_476d_1ce4_e5b9),
    }
}
