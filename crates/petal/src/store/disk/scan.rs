//! Walking the elements of a disk: pages of the PMap store, and what only memory knows.

use super::*;

/// A scan in progress.
#[derive(Debug)]
pub(super) struct ScanJob {
    from: ElementKey,
    end: Option<ElementKey>,
    limit: usize,
    /// Found in earlier pages.
    found: BTreeMap<ElementKey, Version>,
}

impl Disk {
    /// Elements from `from` (inclusive) to `end` (exclusive), ascending, at most `limit`.
    pub fn scan(&mut self, scan: ReadId, from: ElementKey, end: Option<ElementKey>, limit: usize) {
        self.scan_page(scan, ScanJob { from, end, limit, found: BTreeMap::new() });
    }

    fn scan_page(&mut self, scan: ReadId, job: ScanJob) {
        let last = job.end.unwrap_or(ElementKey { family: FamilyId(u64::MAX), element: u64::MAX });
        let (from, to, limit) = (keys::head(job.from), keys::head(last), job.limit);
        self.scans.insert(scan, job);
        self.issue(Pending::Scan(scan), DiskCommand::PmapRange { table: Table::Heads, from, to, limit });
    }

    pub(super) fn on_scanned(&mut self, scan: ReadId, result: Result<Vec<(Bytes, Bytes)>, DiskError>) {
        let mut job = self.scans.remove(&scan).expect("a range belongs to a scan");
        let elements = match result.and_then(|page| self.merge_page(&mut job, page)) {
            Ok(Some(next)) if job.found.len() < job.limit => {
                // A full page of which some elements are gone by now must not look like the end.
                job.from = next;
                return self.scan_page(scan, job);
            }
            Ok(_) => Ok(job.found.into_iter().take(job.limit).collect()),
            Err(error) => {
                // That store is dead after the first error.
                self.fail(format!("its elements cannot be listed: {error}"));
                Err(error)
            }
        };
        self.events.push_back(DiskEvent::Scanned { scan, elements });
    }

    /// Adds a page of the PMap store, and what only memory knows of its range. `Some`: where the next
    /// page begins.
    fn merge_page(&self, job: &mut ScanJob, page: Vec<(Bytes, Bytes)>) -> Result<Option<ElementKey>, DiskError> {
        let is_full = page.len() >= job.limit;
        let mut all: BTreeMap<ElementKey, Version> = BTreeMap::new();
        for (key, value) in page {
            let damaged = || DiskError::PmapDamaged("a head of the PMap cannot be read".into());
            let key = keys::element(&key).ok_or_else(damaged)?;
            all.insert(key, Entry::decode_head(&value).ok_or_else(damaged)?.version);
        }
        let bound = if is_full { all.last_key_value().map(|(k, _)| *k) } else { None };
        let in_range =
            |key: &&ElementKey| job.end.is_none_or(|end| **key < end) && bound.is_none_or(|bound| **key <= bound);
        // Commands of the PMap store are answered in the order in which they were given: what a checkpoint
        // has made not fresh is in every page that is answered after it.
        for key in self.fresh.range(job.from..).take_while(in_range).take(job.limit) {
            all.insert(*key, Version::ZERO); // Its version is in memory, see below.
        }
        all.retain(|key, version| match self.cache.get(key) {
            Some(cached) => {
                *version = cached.entry.version;
                !cached.entry.is_absent()
            }
            None => true,
        });
        job.found.append(&mut all);
        Ok(bound.map(|b| match b.element.checked_add(1) {
            Some(element) => ElementKey { family: b.family, element },
            None => ElementKey { family: FamilyId(b.family.0.saturating_add(1)), element: 0 },
        }))
    }
}
