//! redb over a pretended disk that loses, tears and flips.

use super::pages::{PAGE, Region};
use super::*;
use std::collections::BTreeMap;
use std::sync::Mutex;
use stdx::Prng;

const LENGTH: u64 = 8 << 20;
const SECTOR: usize = 512;

/// A disk that remembers what was not yet synced.
#[derive(Clone)]
struct CrashRegion(Arc<Mutex<Crash>>);

struct Crash {
    durable: Vec<u8>,
    /// Writes since the last sync, in order.
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Writes and syncs so far.
    steps: u64,
    /// At this step the power goes: nothing works any more.
    dies_at: u64,
}

impl CrashRegion {
    fn new() -> CrashRegion {
        // Not zeros: what was on the disk before must not matter.
        let region = CrashRegion::of(vec![0xee; LENGTH as usize]);
        pages::format(&region).unwrap();
        region
    }
    fn of(durable: Vec<u8>) -> CrashRegion {
        CrashRegion(Arc::new(Mutex::new(Crash { durable, unsynced: Vec::new(), steps: 0, dies_at: u64::MAX })))
    }
    /// The disk after power came back: each sector holds what was synced, or any later write to it.
    /// The two heads may even be torn inside of a sector.
    fn after_power_loss(&self, random: &mut Prng) -> CrashRegion {
        let crash = self.0.lock().unwrap();
        let mut bytes = crash.durable.clone();
        let taste = random.below(4);
        for (offset, data) in &crash.unsynced {
            for (index, sector) in data.chunks(SECTOR).enumerate() {
                let lost = match taste {
                    0 => false,
                    1 => true,
                    _ => random.chance(1, 2),
                };
                let at = *offset as usize + index * SECTOR;
                let is_torn_head = at < 2 * PAGE && random.chance(1, 3);
                let length = if is_torn_head { random.below(SECTOR as u64) as usize } else { sector.len() };
                if !lost {
                    bytes[at..at + length].copy_from_slice(&sector[..length]);
                }
            }
        }
        CrashRegion::of(bytes)
    }
    fn steps(&self) -> u64 {
        self.0.lock().unwrap().steps
    }
    fn dies_at(&self, step: u64) {
        self.0.lock().unwrap().dies_at = step;
    }
}

impl Crash {
    fn step(&mut self) -> Result<(), DiskError> {
        self.steps += 1;
        if self.steps > self.dies_at { Err(DiskError::Io("no power".into())) } else { Ok(()) }
    }
}

impl Region for CrashRegion {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let crash = self.0.lock().unwrap();
        let offset = offset as usize;
        buffer.copy_from_slice(&crash.durable[offset..offset + buffer.len()]);
        for (at, data) in &crash.unsynced {
            let at = *at as usize;
            let (from, to) = (at.max(offset), (at + data.len()).min(offset + buffer.len()));
            if from < to {
                buffer[from - offset..to - offset].copy_from_slice(&data[from - at..to - at]);
            }
        }
        Ok(())
    }
    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        let mut crash = self.0.lock().unwrap();
        crash.step()?;
        crash.unsynced.push((offset, buffer.to_vec()));
        Ok(())
    }
    fn sync(&self) -> Result<(), DiskError> {
        let mut crash = self.0.lock().unwrap();
        crash.step()?;
        for (at, data) in std::mem::take(&mut crash.unsynced) {
            crash.durable[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }
    fn length(&self) -> u64 {
        LENGTH
    }
}

type Model = BTreeMap<(Table, Bytes), Bytes>;
type Changes = Vec<(Table, Bytes, Option<Bytes>)>;

fn random_changes(random: &mut Prng) -> Changes {
    let count = random.between(1, 60);
    (0..count)
        .map(|_| {
            let table = *random.pick(&TABLES);
            let key = Bytes::from(random.below(400).to_be_bytes().to_vec());
            let length = if random.chance(1, 20) { random.below(9000) } else { random.below(300) };
            let value = random.chance(3, 4).then(|| Bytes::from(vec![random.next_u64() as u8; length as usize]));
            (table, key, value)
        })
        .collect()
}

fn apply(model: &mut Model, changes: &Changes) {
    for (table, key, value) in changes {
        match value {
            Some(value) => model.insert((*table, key.clone()), value.clone()),
            None => model.remove(&(*table, key.clone())),
        };
    }
}

fn content(store: &mut Guarded) -> Result<Model, DiskError> {
    let mut model = Model::new();
    for table in TABLES {
        let (from, to, limit) = (Bytes::new(), Bytes::from(vec![255; 9]), usize::MAX);
        match store.answer(DiskCommand::PmapRange { table, from, to, limit }) {
            DiskResult::PmapRange(Ok(entries)) => model.extend(entries.into_iter().map(|(k, v)| ((table, k), v))),
            DiskResult::PmapRange(Err(error)) => return Err(error),
            other => panic!("{other:?}"),
        }
    }
    Ok(model)
}

fn commit(store: &mut Guarded, changes: Changes) -> Result<(), DiskError> {
    match store.answer(DiskCommand::PmapCommit { changes }) {
        DiskResult::PmapCommitted(result) => result,
        other => panic!("{other:?}"),
    }
}

fn open(region: &CrashRegion) -> Guarded {
    // A small cache, so that pages are written early and read again.
    Guarded::open(region.clone(), 64 << 10)
}

#[test]
fn what_was_committed_is_there_after_closing_and_opening() {
    let (region, mut random, mut model) = (CrashRegion::new(), Prng::new(1), Model::new());
    for _ in 0..10 {
        let mut store = open(&region);
        for _ in 0..5 {
            let changes = random_changes(&mut random);
            apply(&mut model, &changes);
            commit(&mut store, changes).unwrap();
        }
        assert_eq!(content(&mut store).unwrap(), model);
        store.close();
    }
}

#[test]
fn get_and_range_find_what_the_model_has() {
    let (region, mut random, mut model) = (CrashRegion::new(), Prng::new(2), Model::new());
    let mut store = open(&region);
    for _ in 0..20 {
        let changes = random_changes(&mut random);
        apply(&mut model, &changes);
        commit(&mut store, changes).unwrap();
        let (table, key) = (*random.pick(&TABLES), Bytes::from(random.below(400).to_be_bytes().to_vec()));
        let got = store.answer(DiskCommand::PmapGet { table, key: key.clone() });
        assert_eq!(got, DiskResult::PmapValue(Ok(model.get(&(table, key)).cloned())));
        let (from, to) = (random.below(400), random.below(400));
        let (from, to) = (Bytes::from(from.to_be_bytes().to_vec()), Bytes::from(to.to_be_bytes().to_vec()));
        let expected: Vec<_> = model
            .iter()
            .filter(|((t, k), _)| *t == table && *k >= from && *k < to)
            .map(|((_, k), v)| (k.clone(), v.clone()))
            .take(7)
            .collect();
        let got = store.answer(DiskCommand::PmapRange { table, from, to, limit: 7 });
        assert_eq!(got, DiskResult::PmapRange(Ok(expected)));
    }
}

/// One life: commits until the power goes at `dies_at`, or until all are done. Returns what is certain,
/// and what may be there as well.
fn live(region: &CrashRegion, random: &mut Prng, model: &mut Model, commits: u64) -> Option<Model> {
    let mut store = open(region);
    for _ in 0..commits {
        let changes = random_changes(random);
        let mut next = model.clone();
        apply(&mut next, &changes);
        if commit(&mut store, changes).is_err() {
            return Some(next);
        }
        *model = next;
    }
    store.close();
    None
}

#[test]
fn a_crash_at_any_step_leaves_the_last_commit_or_the_one_in_flight() {
    let rounds = std::env::var("PETAL_PMAP_CRASHES").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    for seed in 0..rounds {
        let mut random = Prng::new(seed);
        let mut region = CrashRegion::new();
        let mut model = Model::new();
        for _life in 0..4 {
            region.dies_at(region.steps() + random.between(1, 120));
            let in_flight = live(&region, &mut random, &mut model, 6);
            region = region.after_power_loss(&mut random);
            if random.chance(1, 2) {
                // The opening itself is cut off too.
                region.dies_at(random.below(12));
                drop(open(&region));
                region = region.after_power_loss(&mut random);
            }
            let found = content(&mut open(&region)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            if found != model {
                assert_eq!(Some(&found), in_flight.as_ref(), "seed {seed}: neither the old nor the next state");
                model = found;
            }
            if random.chance(1, 4) {
                // Either head may rot afterwards: the other one has the same state.
                drop(open(&region));
                let head = random.below(2) as usize * PAGE;
                region.0.lock().unwrap().durable[head + random.below(300) as usize] ^= 1;
                assert_eq!(content(&mut open(&region)).unwrap(), model, "seed {seed}: an older head answered");
            }
        }
    }
}

#[test]
fn opening_after_a_crash_does_not_walk_the_database() {
    let region = CrashRegion::new();
    let mut store = open(&region);
    for i in 0..200u64 {
        let changes = (0..20u64).map(|k| {
            (Table::Rows, Bytes::from((i * 20 + k).to_be_bytes().to_vec()), Some(Bytes::from(vec![i as u8; 200])))
        });
        commit(&mut store, changes.collect()).unwrap();
    }
    let region = region.after_power_loss(&mut Prng::new(1));
    std::mem::forget(store);
    let walked = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = walked.clone();
    let pages = CheckedPages::open(region).unwrap();
    redb::Builder::new()
        .set_repair_callback(move |_| seen.store(true, std::sync::atomic::Ordering::Relaxed))
        .create_with_backend(pages)
        .unwrap();
    assert!(!walked.load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_flipped_bit_anywhere_gives_an_error_or_the_right_answer() {
    let (region, mut random, mut model) = (CrashRegion::new(), Prng::new(3), Model::new());
    live(&region, &mut random, &mut model, 12);
    let clean = region.0.lock().unwrap().durable.clone();
    let used: Vec<usize> =
        (0..clean.len() / PAGE).filter(|p| clean[p * PAGE..][..PAGE].iter().any(|b| *b != 0xee)).collect();
    let (mut errors, rounds) = (0, 600);
    for _ in 0..rounds {
        let mut bytes = clean.clone();
        for _ in 0..random.between(1, 3) {
            let at = *random.pick(&used) * PAGE + random.below(PAGE as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        match content(&mut open(&CrashRegion::of(bytes))) {
            Ok(found) => assert_eq!(found, model, "a wrong answer"),
            Err(DiskError::PmapDamaged(_)) => errors += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(errors > rounds / 20, "only {errors} of {rounds} were noticed: the flips do not hit what is used");
}

#[test]
fn a_lost_page_or_table_sector_is_noticed() {
    let (region, mut random, mut model) = (CrashRegion::new(), Prng::new(4), Model::new());
    live(&region, &mut random, &mut model, 12);
    let clean = region.0.lock().unwrap().durable.clone();
    for page in 2..clean.len() / PAGE {
        if clean[page * PAGE..][..PAGE].iter().all(|b| *b == 0xee) {
            continue;
        }
        let mut bytes = clean.clone();
        let sector = random.below((PAGE / SECTOR) as u64) as usize * SECTOR;
        bytes[page * PAGE + sector..][..SECTOR].fill(0);
        if let Ok(found) = content(&mut open(&CrashRegion::of(bytes))) {
            assert_eq!(found, model, "page {page}: a wrong answer");
        }
    }
}

#[test]
fn after_damage_every_command_says_so() {
    let (region, mut random, mut model) = (CrashRegion::new(), Prng::new(5), Model::new());
    live(&region, &mut random, &mut model, 12);
    {
        let durable = &mut region.0.lock().unwrap().durable;
        let end = durable.len();
        // Heads and table stay, all pages rot.
        durable[5 * PAGE..end].iter_mut().for_each(|byte| *byte ^= 1);
    }
    let mut store = open(&region);
    for _ in 0..3 {
        let get = store.answer(DiskCommand::PmapGet { table: Table::Heads, key: Bytes::from_static(b"k") });
        assert!(matches!(get, DiskResult::PmapValue(Err(DiskError::PmapDamaged(_)))), "{get:?}");
        assert!(matches!(commit(&mut store, random_changes(&mut random)), Err(DiskError::PmapDamaged(_))));
    }
}

#[test]
fn a_full_region_is_an_error_and_what_was_committed_stays() {
    let region = CrashRegion::new();
    let mut store = open(&region);
    let mut committed = 0u64;
    let error = loop {
        let value = Bytes::from(vec![committed as u8; 200]);
        let key = |i: u64| Bytes::from((committed + i).to_be_bytes().to_vec());
        let changes = (0..100).map(|i| (Table::Rows, key(i), Some(value.clone()))).collect();
        match commit(&mut store, changes) {
            Ok(()) => committed += 100,
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("region is full"), "{error}");
    // With redb's own regions of 4 GiB it could not grow beyond half of the region.
    let used = committed * 208;
    assert!(used > LENGTH * 6 / 10, "{used} of {LENGTH} bytes could be used");
    store.close();
    assert_eq!(content(&mut open(&region)).unwrap().len() as u64, committed);
}

#[test]
fn a_panic_of_redb_is_a_failed_disk() {
    let mut store = open(&CrashRegion::new());
    let result: Result<(), DiskError> = store.run(|_| panic!("impossible page"));
    assert_eq!(result, Err(DiskError::PmapDamaged("redb panicked: impossible page".into())));
    assert!(content(&mut store).is_err());
}
