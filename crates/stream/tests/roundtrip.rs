//! What was written is what is read, whole or continued.

mod samples;

use petal_stream::*;
use proptest::prelude::*;
use samples::*;
use std::io::Write;

/// Elements of a disk of 4 MiB: ascending, with masks that fit together, data from seeds.
fn elements() -> impl Strategy<Value = Vec<Blocks>> {
    let one = (1u64..12, any::<u16>(), any::<u16>(), any::<u64>(), 0..4u8);
    prop::collection::vec(one, 0..12).prop_map(|drawn| {
        let mut number = 0;
        let mut blocks = Vec::new();
        for (step, data, zero, seed, sparse) in drawn {
            let (data, zero) = if sparse == 0 { (data, zero & !data) } else { (data & 0x11, zero & !(data & 0x11)) };
            if number + step < 64 && data | zero != 0 {
                number += step;
                blocks.push(Blocks::drawn(number, data, zero, seed));
            }
        }
        blocks
    })
}

fn header() -> Header {
    Header { size: 4 << 20, ..incremental() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read(blocks in elements(), mark_every in 1u64..200_000) {
        let bytes = write(&header(), &blocks, mark_every);
        let (found, summary) = read(&bytes).unwrap();
        prop_assert_eq!(&found, &blocks);
        prop_assert_eq!(summary.header, header());
        prop_assert_eq!(summary.bytes, bytes.len() as u64);
        prop_assert_eq!(summary.counts.elements, blocks.len() as u64);
        let ones = |mask: fn(&Blocks) -> u16| blocks.iter().map(|b| u64::from(mask(b).count_ones())).sum::<u64>();
        prop_assert_eq!(summary.counts.data_blocks, ones(|b| b.data));
        prop_assert_eq!(summary.counts.zero_blocks, ones(|b| b.zero));
    }

    #[test]
    fn runs_do_what_the_masks_say(blocks in elements()) {
        let bytes = write(&header(), &blocks, MARK_EVERY);
        let mut disk = vec![0xee; 4 << 20];
        let mut expected = disk.clone();
        for Blocks { number, data, zero, bytes } in &blocks {
            let mut data_blocks = bytes.chunks(BLOCK_SIZE);
            for block in 0..BLOCKS_PER_ELEMENT {
                let at = *number as usize * ELEMENT_SIZE + block * BLOCK_SIZE;
                match (data >> block & 1, zero >> block & 1) {
                    (1, _) => expected[at..at + BLOCK_SIZE].copy_from_slice(data_blocks.next().unwrap()),
                    (_, 1) => expected[at..at + BLOCK_SIZE].fill(0),
                    _ => {}
                }
            }
        }
        let mut reader = Reader::open(&bytes[..]).unwrap();
        loop {
            match reader.next_item().unwrap() {
                Item::Element(element) => for run in element.runs() {
                    let range = run.offset as usize..(run.offset + run.length) as usize;
                    match run.data {
                        Some(data) => disk[range].copy_from_slice(data),
                        None => disk[range].fill(0),
                    }
                },
                Item::Mark(_) => {}
                Item::End(_) => break,
            }
        }
        prop_assert!(disk == expected);
    }

    /// At any length, with any rest behind it that a crash may have left.
    #[test]
    fn an_interrupted_export_goes_on_to_the_same_bytes(
        blocks in elements(),
        mark_every in 1u64..200_000,
        cut in any::<prop::sample::Index>(),
        rest in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let whole = write(&header(), &blocks, mark_every);
        let left = cut.index(whole.len() + 1);
        let mut file = whole[..left].to_vec();
        file.extend(&rest);
        match scan(&file[..]) {
            Ok(Scan::Whole(_)) => prop_assert_eq!(file, whole),
            Ok(Scan::Interrupted(interrupted)) => {
                prop_assert_eq!(interrupted.header(), &header());
                file.truncate(interrupted.offset() as usize);
                let last = interrupted.last_element();
                let mut writer = Writer::resume(file, interrupted).with_mark_every(mark_every);
                let from = blocks.iter().position(|b| last.is_none_or(|l| b.number > l)).unwrap_or(blocks.len());
                put(&mut writer, &blocks[from..]);
                let (file, summary) = writer.finish().unwrap();
                prop_assert_eq!(verify(&file[..]).unwrap(), summary);
                prop_assert!(file == whole);
            }
            Err(refused) => {
                prop_assert_eq!(refused.place, Place::Header);
                prop_assert!(left < 24 + 200);
            }
        }
    }
}

/// Cut at every byte of a small stream: what stays ends with the last whole mark, and is never more than there is.
#[test]
fn at_every_cut_the_last_mark_is_found() {
    let whole = small_stream();
    let mut reader = Reader::open(&whole[..]).unwrap();
    let mut good = vec![(reader.offset(), None)];
    loop {
        match reader.next_item().unwrap() {
            Item::Element(_) => {}
            Item::Mark(mark) => good.push((reader.offset(), mark.last_element)),
            Item::End(_) => break,
        }
    }
    assert_eq!(good.len(), 3);
    for cut in good[0].0 as usize..whole.len() {
        let expected = good.iter().rev().find(|(offset, _)| *offset as usize <= cut).unwrap();
        match scan(&whole[..cut]) {
            Ok(Scan::Interrupted(found)) => {
                assert_eq!((found.offset(), found.last_element()), *expected, "cut at {cut}");
                assert_eq!(found.refused().offset as usize, cut);
            }
            _ => panic!("cut at {cut}: not seen as interrupted"),
        }
    }
}

#[test]
fn damage_in_the_middle_of_a_file_costs_what_is_behind_the_mark_before() {
    let mut file = small_stream();
    let whole = file.clone();
    let mut reader = Reader::open(&file[..]).unwrap();
    reader.next_item().unwrap();
    assert!(matches!(reader.next_item().unwrap(), Item::Mark(_)));
    let mark = reader.offset();
    file[mark as usize + 30] ^= 1;
    let Ok(Scan::Interrupted(interrupted)) = scan(&file[..]) else { panic!("a damaged stream") };
    assert_eq!((interrupted.offset(), interrupted.last_element()), (mark, Some(0)));
    assert!(matches!(interrupted.refused().fault, Fault::Damaged(_)));
    file.truncate(mark as usize);
    let mut writer = Writer::resume(file, interrupted).with_mark_every(SMALL_MARK_EVERY);
    put(&mut writer, &small()[1..]);
    assert!(writer.finish().unwrap().0 == whole);
}

/// Reads so much, then fails as a disk does.
struct Failing<'a>(&'a [u8]);

impl std::io::Read for Failing<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        match std::io::Read::read(&mut self.0, bytes)? {
            0 => Err(std::io::Error::from_raw_os_error(5)),
            length => Ok(length),
        }
    }
}

#[test]
fn a_file_that_cannot_be_read_is_not_taken_for_an_interrupted_one() {
    let whole = small_stream();
    for length in [0, 30, 150, 5000, whole.len()] {
        match scan(Failing(&whole[..length])) {
            Err(StreamError { fault: Fault::Io(_), .. }) => {}
            Err(other) => panic!("at {length}: {other}"),
            Ok(_) => panic!("at {length}: taken for what was read of it"),
        }
    }
}

/// Takes so many bytes, then has no space.
struct Full(Vec<u8>, usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = bytes.len().min(self.1 - self.0.len());
        self.0.extend(&bytes[..length]);
        if length == 0 { Err(std::io::Error::from_raw_os_error(28)) } else { Ok(length) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn after_a_failed_write_nothing_more_is_written_and_what_arrived_is_continued() {
    let whole = small_stream();
    let room = whole.len() - 100;
    let mut output = Full(Vec::new(), room);
    let mut writer = Writer::create(&mut output, incremental()).unwrap().with_mark_every(SMALL_MARK_EVERY);
    let [first, second, third] = &small()[..] else { panic!("three elements") };
    put(&mut writer, &[first.clone(), second.clone()]);
    let failed = writer.element(third.number, third.data, third.zero, &third.bytes);
    assert!(matches!(failed, Err(WriteError::Io { .. })), "{failed:?}");
    assert!(matches!(writer.mark(), Err(WriteError::FailedBefore)));
    assert!(matches!(writer.finish(), Err(WriteError::FailedBefore)));
    assert!(output.0 == whole[..room]);

    let Ok(Scan::Interrupted(interrupted)) = scan(&output.0[..]) else { panic!("it is interrupted") };
    assert_eq!(interrupted.last_element(), Some(first.number));
    output.0.truncate(interrupted.offset() as usize);
    let mut writer = Writer::resume(output.0, interrupted).with_mark_every(SMALL_MARK_EVERY);
    put(&mut writer, &[second.clone(), third.clone()]);
    assert!(writer.finish().unwrap().0 == whole);
}

#[test]
fn items_are_the_same_however_the_bytes_come() {
    let bytes = small_stream();
    assert_eq!(verify(Drops(&bytes)).unwrap(), verify(&bytes[..]).unwrap());
}

#[test]
fn an_empty_stream_is_whole() {
    for header in [full(), incremental()] {
        let (found, summary) = read(&write(&header, &[], MARK_EVERY)).unwrap();
        assert_eq!((found.len(), summary.counts, summary.marks), (0, Counts::default(), 1));
    }
}

#[test]
fn the_end_is_told_again_when_asked_again() {
    let bytes = small_stream();
    let mut reader = Reader::open(&bytes[..]).unwrap();
    let mut ends = 0;
    for _ in 0..12 {
        ends += u32::from(matches!(reader.next_item().unwrap(), Item::End(_)));
    }
    assert_eq!(ends, 12 - 3 - 2);
}
