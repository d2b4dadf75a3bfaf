//! Every address in use is referred to by exactly one element, no other is taken (I8), and every block
//! of every element is readable (I9): the disks are opened once more, by the store itself, and read.

use crate::formatting;
use crate::host::ServerHost;
use crate::options::Options;
use petal::ids::{BLOCK_SIZE, ElementKey, Incarnation};
use petal::store::{BlockSum, ElementImage, Event, Loaded, OpenDisk, StoreConfig, Stores};
use std::collections::BTreeMap;

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

/// Opens and reads everything of a host that does not run.
pub fn examine(machine: &mut ServerHost, options: &Options) -> Examined {
    let opened: Result<Vec<OpenDisk>, String> =
        (0..machine.disks.len()).map(|disk| formatting::open(machine, disk)).collect();
    let disks = match opened {
        Ok(disks) => disks,
        Err(why) => return Examined { complaints: vec![why], ..Examined::default() },
    };
    let life = disks.iter().map(|d| d.superblock.incarnation.0).max().unwrap_or(0);
    let config = StoreConfig { cache_elements: options.cache_elements, ..StoreConfig::default() };
    let mut examiner =
        Examiner { stores: Stores::open(disks, Incarnation(life + 1), config), machine, found: Examined::default() };
    if let Err(why) = examiner.examine() {
        examiner.found.complaints.push(why);
    }
    examiner.found
}

struct Examiner<'a> {
    stores: Stores,
    machine: &'a mut ServerHost,
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

    /// Without snapshots every block that is not zero has one address, and nothing else has any.
    fn check_space(&mut self) {
        let rows = self.found.elements.values().flat_map(|e| &e.rows);
        let blocks = rows.flat_map(|r| &r.sums).filter(|s| **s != BlockSum::Zero).count() as u64;
        let used: u64 = self.stores.status().iter().map(|d| d.used).sum();
        if used != blocks * BLOCK_SIZE {
            let needed = blocks * BLOCK_SIZE;
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
