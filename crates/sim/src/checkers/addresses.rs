//! Every address in use is referred to by exactly one element, no other is taken (I8), and every block
//! of every element is readable (I9): the disks are opened once more, by the store itself, and read.

use crate::formatting;
use crate::host::ServerHost;
use crate::options::Options;
use petal::global_state::State;
use petal::ids::{BLOCK_SIZE, ElementKey, Incarnation};
use petal::store::{ElementImage, Event, Loaded, OpenDisk, StoreConfig, Stores};
use std::collections::{BTreeMap, BTreeSet};

/// What a server's disks hold.
#[derive(Default)]
pub struct Examined {
    /// Every element.
    pub elements: BTreeMap<ElementKey, ElementImage>,
    /// What is wrong with them.
    pub complaints: Vec<String>,
}

/// Commands after which opening or reading is said not to end.
const ROUNDS_MAX: usize = 100_000;

/// Rows that nobody sees any more are dropped before everything is at rest, and their blocks are free.
const RECLAIMS: bool = true;

/// Opens and reads everything of a host that does not run.
pub fn examine(machine: &mut ServerHost, options: &Options, state: &State) -> Examined {
    let opened: Result<Vec<OpenDisk>, String> =
        (0..machine.disks.len()).map(|disk| formatting::open(machine, disk)).collect();
    let disks = match opened {
        Ok(disks) => disks,
        Err(why) => return Examined { complaints: vec![why], ..Examined::default() },
    };
    let life = disks.iter().map(|d| d.superblock.incarnation.0).max().unwrap_or(0);
    let config = StoreConfig { cache_elements: options.cache_elements, ..StoreConfig::default() };
    let stores = Stores::open(disks, Incarnation(life + 1), config);
    let mut examiner = Examiner { stores, machine, state, blocks: 0, found: Examined::default() };
    if let Err(why) = examiner.examine() {
        examiner.found.complaints.push(why);
    }
    examiner.found
}

struct Examiner<'a> {
    stores: Stores,
    machine: &'a mut ServerHost,
    state: &'a State,
    /// Blocks that some row refers to, or, where rows are reclaimed, some row that is seen.
    blocks: u64,
    found: Examined,
}

impl Examiner<'_> {
    fn examine(&mut self) -> Result<(), String> {
        self.until(|e| matches!(e, Event::Opened).then_some(()))?;
        let mut after = None;
        loop {
            let scan = self.stores.scan_all(after, 256);
            let elements = self.until(|e| match e {
                Event::Scanned { scan: s, elements } if *s == scan => Some(elements.clone()),
                _ => None,
            })?;
            let elements = elements.map_err(|e| format!("a scan fails: {e}"))?;
            let Some((last, _)) = elements.last() else { break };
            after = Some(*last);
            for (key, _) in elements {
                self.examine_element(key)?;
            }
        }
        self.stores.check_invariants();
        self.check_space();
        Ok(())
    }

    fn examine_element(&mut self, key: ElementKey) -> Result<(), String> {
        match self.stores.load(key) {
            Loaded::Ready => {}
            Loaded::Pending => self.until(|e| (*e == Event::Loaded(key)).then_some(()))?,
            Loaded::Failed => return Err(format!("the entry of {key:?} cannot be read")),
        }
        let image = self.stores.image(key);
        let blocks = self.stores.stored(key);
        self.count_blocks(key, &image);
        self.found.elements.insert(key, image);
        if blocks.is_empty() {
            return Ok(());
        }
        let read = self.stores.read_places(key, &blocks);
        let result = self.until(|e| match e {
            Event::Read { read: r, result } if *r == read => Some(result.clone()),
            _ => None,
        })?;
        if let Err(why) = result {
            self.found.complaints.push(format!("{key:?} cannot be read: {why:?}"));
        }
        Ok(())
    }

    /// Rows of one element share the blocks that were not written between them.
    fn count_blocks(&mut self, key: ElementKey, image: &ElementImage) {
        let ids = image.rows.iter().map(|r| (r.lineage, r.epoch));
        let seen: Vec<bool> = match self.state.visible(key.family) {
            Some(visible) if RECLAIMS => visible.kept(ids).collect(),
            None if RECLAIMS => vec![false; image.rows.len()],
            _ => vec![true; image.rows.len()],
        };
        let rows = self.stores.addresses(key);
        let used: BTreeSet<u64> =
            rows.into_iter().zip(seen).filter(|(_, seen)| *seen).flat_map(|(row, _)| row).collect();
        self.blocks += used.len() as u64;
    }

    /// Nothing else is in use.
    fn check_space(&mut self) {
        let (used, needed) = (self.stores.status(false).iter().map(|d| d.used).sum::<u64>(), self.blocks * BLOCK_SIZE);
        if used != needed {
            self.found.complaints.push(format!("{used} bytes are in use, the elements have {needed}"));
        }
    }

    /// Carries out commands until an event answers.
    fn until<T>(&mut self, mut answer: impl FnMut(&Event) -> Option<T>) -> Result<T, String> {
        for _ in 0..ROUNDS_MAX {
            let mut found = None;
            while let Some(event) = self.stores.poll_event() {
                if let Event::DiskFailed { disk, reason } = &event {
                    return Err(format!("disk {disk}: {reason}"));
                }
                found = found.or_else(|| answer(&event));
            }
            if let Some(found) = found {
                return Ok(found);
            }
            self.stores.flush();
            while let Some((disk, op, command)) = self.stores.poll_command() {
                let result = self.machine.disks[disk].execute(command);
                self.stores.on_disk(disk, op, result);
            }
        }
        Err("the store does not answer".into())
    }
}
