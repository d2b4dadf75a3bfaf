//! `petal inspect`: what is on a server's disk, as the program reads it.

use super::verify::Findings;
use crate::offline::Offline;
use crate::output;
use crate::{connect, disk_files};
use anyhow::{Context, Result};
use bytes::Bytes;
use clap::ValueEnum;
use petal::ids::BLOCK_SIZE;
use petal::store::Table;
use petal::store::element::{Entry, Row};
use petal::store::journal::{self, Header, Record};
use petal::store::keys;
use serde_json::json;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `petal inspect`
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  petal inspect superblock petal-data/s1/disk1
  petal inspect superblock /dev/sdb --json
  petal inspect journal petal-data/s1/disk1 --batches 3
  petal inspect pmap petal-data/s1/disk1 --table heads")]
pub enum Command {
    /// Whose disk it is, and where its regions are; the server may run
    Superblock {
        /// The disk
        disk: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// The newest batches of the journal; the server may run
    Journal {
        /// The disk
        disk: PathBuf,
        /// So many batches
        #[arg(long, default_value_t = 10)]
        batches: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Where elements are; the server must be stopped
    Pmap {
        /// All disks of the server
        #[arg(required = true)]
        disks: Vec<PathBuf>,
        /// Only this table
        #[arg(long)]
        table: Option<TableName>,
        /// So many entries of each table
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Shows it.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Superblock { disk, json } => superblock(&disk, json),
        Command::Journal { disk, batches, json } => journal(&disk, batches, json),
        Command::Pmap { disks, table, limit, json } => pmap(&disks, table, limit, json),
    }
}

fn superblock(path: &Path, json: bool) -> Result<()> {
    let block = disk_files::read_superblock(path)?;
    let layout = &block.layout;
    let regions = [("journal", layout.journal), ("pmap", layout.pmap), ("data", layout.data)];
    if json {
        let region = |(name, r): &(&str, petal::store::layout::Region)| json!({"name": name, "offset": r.offset, "length": r.length});
        return output::print_json(&json!({
            "cluster": block.genesis.cluster.to_string(),
            "name": block.genesis.name,
            "server": block.server.to_string(),
            "incarnation": block.incarnation.0,
            "taken": block.taken.0,
            "journal_mark": block.journal_mark,
            "generation": block.generation,
            "disk": block.disk.to_string(),
            "disks": block.disks.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ring": block.genesis.ring.iter().map(|m| json!({
                "server": m.server.to_string(), "addresses": m.addresses,
            })).collect::<Vec<_>>(),
            "size": layout.size,
            "regions": regions.iter().map(region).collect::<Vec<_>>(),
        }));
    }
    println!("cluster      {} ({})", block.genesis.name, block.genesis.cluster);
    for member in &block.genesis.ring {
        println!("first ring   {} at {}", member.server, member.addresses.join(", "));
    }
    println!("server       {}, life {} (the cluster took {})", block.server, block.incarnation, block.taken);
    println!("disk         {}", block.disk);
    for disk in block.disks.iter().filter(|d| **d != block.disk) {
        println!("with         {disk}");
    }
    println!("size         {}", output::size(layout.size));
    println!("durable      the journal, up to batch {} at least", block.journal_mark);
    for (name, region) in regions {
        println!("{name:<12} {} at byte {}", output::size(region.length), region.offset);
    }
    println!("generation   {}", block.generation);
    Ok(())
}

/// Checks the disks of a stopped server by themselves.
pub fn verify_disks(disks: &[PathBuf]) -> Result<Findings> {
    let disks = disks.to_vec();
    connect::block_on(async move {
        let mut offline = Offline::open(&disks).await?;
        let mut findings = Findings::default();
        findings.add(&offline.disks[0].superblock.server.to_string(), offline.verify().await?);
        Ok(findings)
    })
}

/// The newest batches of the journal, whatever the PMap store has taken over already.
fn journal(path: &Path, batches: usize, json: bool) -> Result<()> {
    let superblock = disk_files::read_superblock(path)?;
    let region = superblock.layout.journal;
    let mut ring = vec![0; region.length as usize];
    let read = std::fs::File::open(path).and_then(|f| f.read_exact_at(&mut ring, region.offset));
    read.with_context(|| format!("cannot read the journal of {}", path.display()))?;
    let step = BLOCK_SIZE as usize;
    let at = |offset: usize| journal::decode_batch(superblock.disk, &ring[offset..]).map(|b| (offset, b));
    let mut found: Vec<_> = (0..ring.len()).step_by(step).filter_map(at).collect();
    found.sort_by_key(|(_, (header, _, _))| header.number);
    let newest = &found[found.len().saturating_sub(batches)..];
    if json {
        let describe = |(offset, (header, records, hash)): &(usize, (Header, &[u8], u64))| {
            json!({
                "offset": region.offset + *offset as u64, "number": header.number, "run": header.run,
                "durable_through": header.durable_through, "hash": format!("{hash:016x}"),
                "hash_before": format!("{:016x}", header.hash_before),
                "records": records_of(records),
            })
        };
        return output::print_json(&newest.iter().map(describe).collect::<Vec<_>>().into());
    }
    println!("{} whole batches in {} of journal; the newest:", found.len(), output::size(region.length));
    for (offset, (header, records, _)) in newest {
        let Header { run, number, durable_through, .. } = header;
        println!(
            "batch {number} at byte {} of the disk: run {run}, durable through {durable_through}",
            region.offset + *offset as u64
        );
        records_of(records).iter().for_each(|r| println!("  {r}"));
    }
    Ok(())
}

fn records_of(bytes: &[u8]) -> Vec<String> {
    match journal::decode_records(bytes) {
        Some(records) => records.iter().map(describe_record).collect(),
        None => vec!["records of a newer format".into()],
    }
}

/// A record on one line. Metadata is the ring's log: its length is enough.
fn describe_record(record: &Record) -> String {
    match record {
        Record::Write { element, slot, version, first_block, blocks, id, .. } => {
            let zeros = blocks.iter().filter(|b| b.is_none()).count();
            let (last, by) = (usize::from(*first_block) + blocks.len() - 1, id.map(|i| format!(" by {i:?}")));
            let by = by.unwrap_or_default();
            format!(
                "write {element:?} in {slot:?}, version {version:?}, blocks {first_block}..={last} ({zeros} zero){by}"
            )
        }
        other => {
            let text = format!("{other:?}");
            let end = text.char_indices().nth(160).map_or(text.len(), |(at, _)| at);
            if end < text.len() { format!("{}...", &text[..end]) } else { text }
        }
    }
}

/// Tables of the PMap store of a stopped server.
fn pmap(disks: &[PathBuf], table: Option<TableName>, limit: usize, json: bool) -> Result<()> {
    let disks = disks.to_vec();
    connect::block_on(async move {
        let mut offline = Offline::open(&disks).await?;
        let mut report = Vec::new();
        for number in 0..offline.disks.len() {
            let path = offline.disks[number].path.clone();
            for name in TableName::value_variants().iter().filter(|n| table.is_none_or(|t| t == **n)) {
                let entries = offline.range(number, name.table(), Bytes::new(), limit).await?;
                let lines: Vec<String> = entries.iter().map(|(k, v)| name.describe(k, v)).collect();
                report.push(json!({"disk": path, "table": name.word(), "entries": lines}));
            }
        }
        if json {
            return output::print_json(&report.into());
        }
        println!("What the journal holds since the last checkpoint is not in these tables yet.");
        for part in &report {
            let entries = part["entries"].as_array().map(Vec::as_slice).unwrap_or_default();
            let more = if entries.len() == limit { " (and perhaps more: --limit)" } else { "" };
            println!(
                "{} {}: {} entries{more}",
                part["disk"].as_str().unwrap_or_default(),
                part["table"],
                entries.len()
            );
            entries.iter().filter_map(|e| e.as_str()).for_each(|line| println!("  {line}"));
        }
        Ok(())
    })
}

/// A table of the PMap store.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq)]
pub enum TableName {
    /// Element: version, request ids
    Heads,
    /// Element, lineage, epoch: 16 blocks
    Rows,
    /// Slot, version: element
    Changes,
    /// Chunks of the free map
    Free,
    /// Watermarks, journal number, metadata of the ring
    Meta,
}

impl TableName {
    fn table(self) -> Table {
        match self {
            TableName::Heads => Table::Heads,
            TableName::Rows => Table::Rows,
            TableName::Changes => Table::Changes,
            TableName::Free => Table::Free,
            TableName::Meta => Table::Meta,
        }
    }

    fn word(self) -> &'static str {
        match self {
            TableName::Heads => "heads",
            TableName::Rows => "rows",
            TableName::Changes => "changes",
            TableName::Free => "free",
            TableName::Meta => "meta",
        }
    }

    /// An entry on one line.
    fn describe(self, key: &[u8], value: &[u8]) -> String {
        let unknown = || format!("{} bytes under a key of {}", value.len(), key.len());
        match self {
            TableName::Heads => match (keys::element(key), Entry::decode_head(value)) {
                (Some(element), Some(head)) => format!("{element:?}: version {:?}", head.image().version),
                _ => unknown(),
            },
            TableName::Rows => match keys::element(key).zip(keys::row_ids(key)) {
                Some((element, (lineage, epoch))) => match Row::decode(lineage, epoch, value) {
                    Some(row) => {
                        format!("{element:?} {lineage} {epoch}: blocks at {:?}", row.used().collect::<Vec<_>>())
                    }
                    None => unknown(),
                },
                None => unknown(),
            },
            TableName::Changes => match keys::change_parts(key) {
                Some((slot, version, element)) => format!("{slot:?} {version:?}: {element:?}"),
                None => unknown(),
            },
            TableName::Free => unknown(),
            TableName::Meta => match (keys::watermark_slot(key), keys::versions_from(value)) {
                (Some(slot), Some((watermark, floor))) => {
                    format!("watermark of {slot:?}: {watermark:?}, floor {floor:?}")
                }
                _ => format!("{}: {} bytes", key.escape_ascii(), value.len()),
            },
        }
    }
}
