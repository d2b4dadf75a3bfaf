//! Single situations of the store, on the pretended disk of the walks.

use super::*;

/// A disk of ample blocks, open.
fn calm(journal: u64, blocks: u64) -> Walk {
    grown(journal, blocks, blocks)
}

/// The same, with so many blocks that need no growing of the file.
fn grown(journal: u64, blocks: u64, frontier: u64) -> Walk {
    let prng = Prng::new(1);
    let options = Options {
        disks: 1,
        journal,
        blocks,
        frontier,
        cache: 1000,
        elements: 12,
        steps: 0,
        crash: 0,
        error: 0,
        answers: 1,
        flushes: 1,
        sabotage: Sabotage::None,
    };
    let mut walk = Walk::with(prng, options);
    walk.start().unwrap();
    walk
}

/// The same, with a few batches in its journal.
fn written() -> Walk {
    let mut walk = calm(MIB, 1000);
    for _ in 0..5 {
        let key = walk.any_key();
        walk.ready(key).unwrap();
        walk.write(key).unwrap();
        walk.quiet().unwrap();
    }
    walk
}

/// Repair (P7): the entry stays what it was, and the block is at another place and readable again.
#[test]
fn a_rotten_block_that_is_given_again_is_written_to_another_place() {
    let mut walk = calm(64 << 10, 60_000);
    let key = walk.any_key();
    let place = loop {
        walk.ready(key).unwrap();
        walk.write(key).unwrap();
        walk.quiet().unwrap();
        walk.ready(key).unwrap();
        let rows = walk.stores.image(key).rows;
        let blocks = rows.iter().enumerate().flat_map(|(r, row)| row.sums.iter().enumerate().map(move |s| (r, s)));
        let mut data = blocks.filter_map(|(r, (b, sum))| match sum {
            BlockSum::Crc(crc) => Some((r, b, *crc)),
            BlockSum::Zero => None,
        });
        if let Some(place) = data.next_back() {
            break place;
        }
    };
    let (r, b, crc) = place;
    let address = |walk: &Walk| walk.stores.disks[0].entry(key).unwrap().rows[r].addresses[b];
    let before = address(&walk);
    let page = walk.stores.disks[0].superblock.layout.data.offset / PAGE as u64 + before;
    walk.disks[0].pages.get_mut(&page).unwrap()[7] ^= 1;
    let bytes = contents().iter().find(|(_, c)| *c == crc).unwrap().0.clone();
    let element = walk.present(key).unwrap().clone();
    let (image, slot) = (walk.stores.image(key), element.slot);
    let watermark = walk.next_watermark(slot);
    let change = Change::Replace {
        element: key,
        slot,
        image,
        data: vec![(r as u16, b as u8, bytes)],
        twins: Vec::new(),
        again: true,
        watermark,
    };
    walk.stage(key, change, Some(element)).unwrap();
    walk.quiet().unwrap();
    walk.ready(key).unwrap();
    assert_ne!(address(&walk), before);
    walk.read_everything(key).unwrap();
}

#[test]
fn what_the_journal_cannot_hold_is_refused_and_the_rest_becomes_stable() {
    let mut walk = calm(64 << 10, 60_000);
    for round in 0..20 {
        let before = walk.coverage.no_space;
        while walk.coverage.no_space == before {
            let key = walk.any_key();
            if walk.stores.load(key) == Loaded::Ready {
                walk.write(key).unwrap();
            } else {
                walk.ready(key).unwrap();
            }
            if round % 2 == 0 {
                walk.flush().unwrap();
            }
        }
        // The journal is full, not the disk; what keeps a server going still finds room.
        let meta = Change::Meta { key: "k".into(), value: None };
        let ticket = walk.stores.stage(meta).unwrap();
        walk.log_step(0, ticket, Step::Meta("k".into(), None));
        walk.quiet().unwrap();
        assert_eq!(walk.logs[0].stable, walk.logs[0].steps.len());
    }
    walk.finish().unwrap();
}

#[test]
fn a_record_that_no_journal_holds_is_refused() {
    let mut walk = calm(64 << 10, 100);
    let value = Some(Bytes::from(vec![0; 9000]));
    assert_eq!(walk.stores.stage(Change::Meta { key: "k".into(), value }), Err(StageError::NoSpace));
    let large = Some(Bytes::from(vec![1; 8000]));
    for n in 0..200u64 {
        let key = Bytes::from(vec![(n % 3) as u8]);
        let ticket = walk.stores.stage(Change::Meta { key: key.clone(), value: large.clone() }).unwrap();
        walk.log_step(0, ticket, Step::Meta(key, large.clone()));
        walk.quiet().unwrap();
    }
    walk.die();
    walk.start().unwrap();
}

#[test]
fn a_disk_that_is_started_again_and_again_can_always_be_opened() {
    let mut walk = calm(64 << 10, 100);
    for _ in 0..200 {
        walk.die();
        walk.start().unwrap();
    }
}

/// All that is left says that the journal ends at the last checkpoint; only the superblock knows better.
#[test]
fn a_journal_that_was_written_over_is_refused_once_it_was_noted_how_far_it_went() {
    for noted in [false, true] {
        let mut walk = written();
        if noted {
            walk.stores.mark_journals();
            assert!(!walk.stores.are_labelled(), "it is being written");
            walk.quiet().unwrap();
            walk.stores.mark_journals();
            assert!(walk.stores.are_labelled(), "nothing more to note");
        }
        walk.die();
        let journal = walk.stores.disks[0].superblock.layout.journal;
        // Behind the open record, which is noted when it is durable.
        let junk = vec![0xa5; journal.length as usize - PAGE];
        walk.disks[0].write(journal.offset + PAGE as u64, &junk, || true);
        let why = walk.start().unwrap_err();
        assert_eq!(why.contains("was durable once"), noted, "{why}");
    }
}

/// A file that ends before something that is in use is not taken for one that has yet to grow.
#[test]
fn a_disk_file_that_was_cut_is_refused() {
    let mut walk = written();
    walk.die();
    let end = walk.disks[0].frontier;
    let start = walk.stores.disks[0].superblock.layout.data.offset;
    walk.disks[0].frontier = start;
    let why = walk.start().unwrap_err();
    assert!(why.contains("was truncated") && why.contains("rejoin s1 --lost disk0"), "{why}");
    walk.disks[0].frontier = end;
    walk.start().unwrap();
}

/// One bad sector costs the disk only where the journal may go on in it.
#[test]
fn a_block_of_the_journal_that_cannot_be_read_matters_only_where_the_journal_is() {
    let mut walk = written();
    walk.die();
    let journal = walk.stores.disks[0].superblock.layout.journal;
    let pages = journal.offset / PAGE as u64..journal.end() / PAGE as u64;
    let opens: Vec<bool> = pages
        .map(|page| {
            walk.disks[0].unreadable = BTreeSet::from([page]);
            let opened = walk.start().is_ok();
            assert_eq!(opened, walk.failed.is_none());
            walk.die();
            opened
        })
        .collect();
    assert!(!opens[..8].contains(&true), "there it is");
    assert!(opens[200..].iter().all(|opened| *opened), "there it never was");
    let first = journal.offset / PAGE as u64;
    walk.disks[0].unreadable = (first + 200..first + 220).collect();
    assert!(walk.start().unwrap_err().contains("at many places"));
}

/// Stages a write of all blocks of each element.
fn stage_whole(walk: &mut Walk, elements: impl IntoIterator<Item = u64>) {
    for element in elements {
        let key = ElementKey { family: FamilyId(1), element };
        walk.ready(key).unwrap();
        let (bytes, crc) = contents()[0].clone();
        let slot = slot(0);
        let version = walk.next_version(slot);
        let rows = Rows::from([((LineageId(1), Epoch(0)), [BlockSum::Crc(crc); 16])]);
        let change = Change::Write {
            element: key,
            slot,
            version,
            lineage: LineageId(1),
            epoch: Epoch(0),
            parents: Vec::new(),
            id: None,
            finished_below: 0,
            ended: Vec::new(),
            first_block: 0,
            blocks: vec![BlockData::Data { crc, bytes }; 16],
            watermark: version,
        };
        walk.stage(key, change, Some(Element { slot, version, ids: BTreeSet::new(), rows })).unwrap();
    }
}

/// Zeros ahead of large batches would be as many bytes again.
#[test]
fn a_file_grows_with_zeros_for_small_batches_and_without_for_large_ones() {
    let steps = |per_batch: u64, host_room: u64| {
        let mut walk = grown(4 * MIB, 200_000, 120 * MIB / BLOCK_SIZE);
        walk.disks[0].host_end = Some(walk.disks[0].frontier + host_room);
        for first in (0..1500).step_by(per_batch as usize) {
            stage_whole(&mut walk, first..first + per_batch);
            walk.quiet().unwrap();
        }
        walk.disks[0].steps.clone()
    };
    let (short, long) = (64 * MIB, 256 * MIB);
    assert_eq!(steps(1, 1 << 40), [(short, false, true), (short, false, true)]);
    assert_eq!(steps(30, 1 << 40), [(short, false, true), (long, true, true)]);
    // Where a long step does not fit a short one is tried at once.
    assert_eq!(steps(30, 200 * MIB)[..3], [(short, false, true), (long, true, false), (short, false, true)]);
}

#[test]
fn a_group_larger_than_a_batch_is_split_and_stays_in_order() {
    let mut walk = calm(MIB, 4000);
    let mut elements: Vec<u64> = (0..200).collect();
    walk.prng.shuffle(&mut elements);
    stage_whole(&mut walk, elements);
    walk.flush().unwrap();
    let issued = walk.stores.disks[0].tickets_on_their_way().count();
    assert_eq!(issued, 4, "12.5 MiB are four batches of at most 4 MiB");
    walk.quiet().unwrap();
    assert_eq!(walk.logs[0].stable, 200);
    walk.finish().unwrap();
}

/// What a copy does to an element that has a thousand snapshots.
#[test]
fn an_element_with_a_thousand_rows_is_replaced_by_the_same() {
    let mut walk = calm(16 * MIB, 60_000);
    let key = ElementKey { family: FamilyId(1), element: 0 };
    walk.ready(key).unwrap();
    let (bytes, crc) = contents()[0].clone();
    let slot = slot(0);
    let mut rows = Rows::new();
    for epoch in (1..=1000).map(Epoch) {
        let version = walk.next_version(slot);
        rows.insert((LineageId(1), epoch), [BlockSum::Crc(crc); 16]);
        let change = Change::Write {
            element: key,
            slot,
            version,
            lineage: LineageId(1),
            epoch,
            parents: Vec::new(),
            id: None,
            finished_below: 0,
            ended: Vec::new(),
            first_block: 0,
            blocks: vec![BlockData::Data { crc, bytes: bytes.clone() }; 16],
            watermark: version,
        };
        walk.stage(key, change, Some(Element { slot, version, ids: BTreeSet::new(), rows: rows.clone() })).unwrap();
        if epoch.0 % 50 == 0 {
            walk.quiet().unwrap();
            walk.ready(key).unwrap();
        }
    }
    let version = walk.next_version(slot);
    let mut image = walk.stores.image(key);
    image.version = version;
    let watermark = walk.next_watermark(slot);
    let (data, twins, again) = (Vec::new(), Vec::new(), false);
    let change = Change::Replace { element: key, slot, image, data, twins, again, watermark };
    let addresses = walk.stores.addresses(key);
    walk.stores.stage(change).unwrap();
    assert_eq!(walk.stores.addresses(key), addresses, "nothing moves");
    assert_eq!(walk.stores.image(key).version, version);
}

/// What is known of a family's slots goes with it to the GMap that it gets, and what is known of others stays.
#[test]
fn a_family_that_gets_slots_of_its_own_takes_along_what_is_newer_than_the_watermark() {
    for die in [false, true] {
        let mut walk = calm(64 << 10, 60_000);
        let mut slots = BTreeSet::new();
        for _ in 0..40 {
            let key = walk.any_key();
            walk.ready(key).unwrap();
            walk.write(key).unwrap();
            walk.quiet().unwrap();
            slots.extend(walk.stores.disks[0].entry(key).map(|entry| entry.slot));
        }
        let family = walk.any_key().family;
        let from = slots.first().unwrap().gmap;
        let term = slots.iter().map(|s| walk.stores.watermark(*s).term).max().unwrap() + 1;
        let newest = walk.stores.disks[0].changes.values().filter_map(|c| c.keys().next_back()).max().unwrap().term;
        let to = GmapId(term.max(newest + 1));
        let known = |walk: &Walk, gmap: GmapId| -> Vec<(u32, Version, Option<Vec<ElementKey>>)> {
            let of = |slot: &SlotId| {
                let slot = SlotId { gmap, ..*slot };
                (slot.slot, walk.stores.watermark(slot), walk.stores.newer(slot, Version::ZERO))
            };
            slots.iter().map(of).collect()
        };
        let before = known(&walk, from);
        assert!(
            before.iter().any(|(_, _, newer)| newer.as_ref().is_some_and(|n| n.iter().any(|k| k.family == family)))
        );
        let ticket = walk.stores.split(family, from, to).expect("it is new");
        walk.watermark_tickets.insert(ticket, (SlotId { gmap: to, ..*slots.first().unwrap() }, Version::ZERO));
        walk.gone = Some(family);
        if die {
            // Its record is durable like any other.
            walk.flush().unwrap();
            walk.quiet().unwrap();
            walk.die();
            walk.start().unwrap();
        }
        let of_family = |keep: bool| {
            let only = |(slot, w, newer): &(u32, Version, Option<Vec<ElementKey>>)| {
                let newer =
                    newer.as_ref().map(|n| n.iter().copied().filter(|k| (k.family == family) == keep).collect());
                (*slot, *w, newer)
            };
            before.iter().map(only).collect::<Vec<(u32, Version, Option<Vec<ElementKey>>)>>()
        };
        assert_eq!(known(&walk, to), of_family(true), "die: {die}");
        assert_eq!(known(&walk, from), of_family(false), "die: {die}");
        // What the old slots learn from then on is not about it.
        let slot = *slots.first().unwrap();
        let later = Version { term: to.0, sequence: 9 };
        walk.stores.stage(Change::Watermark { slot, watermark: later }).unwrap();
        walk.stores.split(family, from, to);
        assert!(walk.stores.watermark(SlotId { gmap: to, ..slot }) < later);
    }
}
