//! What was cut, damaged or made up is refused, with the place, and never panics.

mod samples;

use petal_stream::*;
use proptest::prelude::*;
use samples::*;
use stdx::Prng;
use stdx::checksum::crc32c;

#[test]
fn a_stream_cut_anywhere_is_refused_where_it_ends() {
    let whole = small_stream();
    assert!(verify(&whole[..]).is_ok());
    let header = Reader::open(&whole[..]).unwrap().offset();
    for length in 0..whole.len() as u64 {
        let refused = verify(&whole[..length as usize]).expect_err("a stream that was cut");
        match refused.fault {
            Fault::Empty => assert_eq!(length, 0),
            Fault::NoHeader => assert!(length < header, "{length}: {refused}"),
            Fault::Cut { good } => {
                assert!(length >= header && (header..=length).contains(&good), "{length}: {refused}")
            }
            _ => panic!("{length}: {refused}"),
        }
        assert_eq!(refused.offset, length);
    }
}

/// Where the records begin, and which element comes last before each: from a stream that is right.
fn places(bytes: &[u8]) -> Vec<(u64, Place)> {
    let mut reader = Reader::open(bytes).unwrap();
    let mut places = vec![(0, Place::Header), (reader.offset(), Place::BeforeFirst)];
    while !matches!(reader.next_item().unwrap(), Item::End(_)) {
        places.push((reader.offset(), reader.last_element().map_or(Place::BeforeFirst, Place::After)));
    }
    places
}

#[test]
fn any_flipped_bit_is_refused_in_the_record_that_it_is_in() {
    let whole = small_stream();
    let places = places(&whole);
    let mut bytes = whole.clone();
    for bit in 0..whole.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let refused = verify(&bytes[..]).expect_err("a flipped bit");
        bytes[bit / 8] ^= 1 << (bit % 8);
        let at = bit as u64 / 8;
        let record = places.iter().rposition(|(begin, _)| *begin <= at).unwrap();
        let end = places.get(record + 1).map_or(whole.len() as u64, |(begin, _)| *begin);
        assert_eq!(refused.place, places[record].1, "bit {bit}: {refused}");
        assert!((places[record].0..end).contains(&refused.offset), "bit {bit}: {refused}");
        assert!(matches!(refused.fault, Fault::Damaged(_) | Fault::NotAStream), "bit {bit}: {refused}");
    }
}

/// Lies that no checksum of a record shows: whole records go missing, come twice, or change places.
#[test]
fn records_that_are_missing_doubled_or_moved_are_found_at_the_next_mark_at_the_latest() {
    let blocks: Vec<Blocks> = (0..4).map(|n| Blocks::drawn(n * 2, 1, 0, n)).collect();
    let whole = write(&full(), &blocks, MARK_EVERY);
    let record = 24 + BLOCK_SIZE;
    let first = whole.len() - 72 - 4 * record;
    let (header, rest) = whole.split_at(first);
    let (records, end) = rest.split_at(4 * record);
    let record = |n: usize| &records[n * record..(n + 1) * record];
    let refused = |parts: &[&[u8]]| verify(&[header, &parts.concat(), end].concat()[..]).unwrap_err();

    let missing = refused(&[record(0), record(1), record(3)]);
    assert!(matches!(missing.fault, Fault::Miscounted { since: 0, .. }), "{missing}");
    assert_eq!((missing.offset as usize, missing.place), (whole.len() - 72 - record(0).len(), Place::After(6)));
    let doubled = refused(&[record(0), record(1), record(1), record(2), record(3)]);
    assert!(matches!(doubled.fault, Fault::Order { before: 2, element: 2 }), "{doubled}");
    let moved = refused(&[record(0), record(2), record(1), record(3)]);
    assert!(matches!(moved.fault, Fault::Order { before: 4, element: 2 }), "{moved}");
    assert_eq!(moved.offset as usize, first + 2 * record(0).len());

    let other = write(&full(), &[Blocks::drawn(4, 1, 0, 77)], MARK_EVERY);
    let foreign = &other[first..first + record(0).len()];
    let replaced = refused(&[record(0), record(1), foreign, record(3)]);
    assert!(matches!(replaced.fault, Fault::Hash { since: 0 }), "{replaced}");
    assert_eq!(replaced.place, Place::After(6));
    let nothing = refused(&[]);
    assert!(matches!(nothing.fault, Fault::Miscounted { .. }), "{nothing}");
}

/// The section of another stream between marks that are both right.
#[test]
fn a_hash_stands_for_everything_before_it() {
    let stream = |seed| {
        let mut writer = Writer::create(Vec::new(), full()).unwrap();
        put(&mut writer, &[Blocks::drawn(0, 1, 0, seed)]);
        let mark = writer.mark().unwrap().unwrap();
        put(&mut writer, &[Blocks::drawn(1, 1, 0, 5)]);
        (writer.finish().unwrap().0, mark.offset as usize + 72)
    };
    let ((one, begin), (other, same)) = (stream(1), stream(2));
    assert_eq!(begin, same);
    let spliced = [&one[..begin], &other[begin..]].concat();
    let refused = verify(&spliced[..]).unwrap_err();
    assert!(matches!(refused.fault, Fault::Hash { since } if since == begin as u64 - 72), "{refused}");
}

#[test]
fn something_behind_the_end_is_refused() {
    let whole = small_stream();
    let refused = verify(&[&whole[..], b"\n"].concat()[..]).unwrap_err();
    assert!(matches!(refused.fault, Fault::Trailing), "{refused}");
    assert_eq!(refused.offset, whole.len() as u64);
    assert!(matches!(verify(&[&whole[..], &whole[..]].concat()[..]).unwrap_err().fault, Fault::Trailing));
}

#[test]
fn what_was_refused_stays_refused() {
    let mut bytes = small_stream();
    let at = bytes.len() - 72 - 4000;
    bytes[at] ^= 1;
    let mut reader = Reader::open(&bytes[..]).unwrap();
    while reader.next_item().is_ok() {}
    let again = reader.next_item().unwrap_err();
    assert!(matches!(again.fault, Fault::RefusedBefore), "{again}");
}

/// Puts right the checksum of a stream's head.
fn seal_head(bytes: &mut [u8]) {
    let crc = crc32c(&bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_newer_format_is_told_from_damage_and_names_both() {
    let mut bytes = small_stream();
    bytes[8] = 2;
    assert!(matches!(verify(&bytes[..]).unwrap_err().fault, Fault::Damaged(Part::Header)));
    seal_head(&mut bytes);
    let refused = verify(&bytes[..]).unwrap_err();
    assert!(matches!(refused.fault, Fault::NewerFormat { found: 2, known: 1 }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("format 2") && text.contains("up to 1"), "{text}");
    bytes[8] = 0;
    seal_head(&mut bytes);
    assert!(matches!(verify(&bytes[..]).unwrap_err().fault, Fault::OlderFormat { found: 0, known: 1 }));
}

/// Counts what is asked of it, and never ends.
struct Endless<'a> {
    begin: &'a [u8],
    taken: usize,
}

impl std::io::Read for &mut Endless<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let begin = self.begin.get(self.taken..).unwrap_or_default();
        let length = begin.len().min(bytes.len());
        bytes[..length].copy_from_slice(&begin[..length]);
        bytes[length..].fill(0);
        self.taken += bytes.len();
        Ok(bytes.len())
    }
}

#[test]
fn a_claimed_length_is_not_believed() {
    let mut head = small_stream()[..24].to_vec();
    head[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    seal_head(&mut head);
    let mut input = Endless { begin: &head, taken: 0 };
    let refused = verify(&mut input).unwrap_err();
    assert!(matches!(refused.fault, Fault::HeaderTooLong { length: 0xffff_ffff, .. }), "{refused}");
    assert!(input.taken <= 1 << 20, "{} bytes were asked for", input.taken);
}

#[test]
fn endless_zeros_behind_a_good_beginning_are_refused_at_once() {
    let whole = small_stream();
    for length in [0, 10, 24, 150, 5000, whole.len()] {
        let mut input = Endless { begin: &whole[..length], taken: 0 };
        assert!(verify(&mut input).is_err());
        assert!(input.taken <= 1 << 20, "{} bytes were asked for", input.taken);
    }
}

fn draw(prng: &mut Prng, bound: usize) -> usize {
    prng.below(bound as u64) as usize
}

/// A record with right checksums, whatever it says.
fn record(kind: u8, reserved: u8, masks: [u16; 2], number: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, reserved];
    masks.iter().for_each(|mask| bytes.extend(mask.to_le_bytes()));
    bytes.extend(number.to_le_bytes());
    bytes.extend(crc32c(body).to_le_bytes());
    bytes.extend(crc32c(&bytes).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Records with right checksums and drawn content, often nearly right; then often an end mark with the right hash.
fn made_up(prng: &mut Prng) -> Vec<u8> {
    let header = if prng.chance(1, 2) { full() } else { incremental() };
    let mut bytes = write(&header, &[], MARK_EVERY);
    bytes.truncate(bytes.len() - 72);
    let (mut number, mut counts) = (0, [0; 3]);
    for _ in 0..prng.below(4) {
        let kind = if prng.chance(1, 8) { prng.below(5) as u8 } else { 1 };
        let mask = |prng: &mut Prng| [0, 0, 1, 0x8000, prng.below(65536) as u16][draw(prng, 5)];
        let masks = [mask(prng), mask(prng)];
        number = if prng.chance(1, 16) { prng.next_u64() } else { number + prng.below(4) };
        let length = if kind == 1 { masks[0].count_ones() as usize * BLOCK_SIZE } else { 48 };
        let body: Vec<u8> = (0..length).map(|n| n as u8).collect();
        bytes.extend(record(kind, u8::from(prng.chance(1, 16)), masks, number, &body));
        counts = [counts[0] + 1, counts[1] + masks[0].count_ones(), counts[2] + masks[1].count_ones()];
    }
    if prng.chance(3, 4) {
        let hash = blake3::hash(&bytes);
        let counts = counts.map(|count| u64::from(count) + u64::from(prng.chance(1, 16)));
        let body = [&counts[1].to_le_bytes()[..], &counts[2].to_le_bytes(), hash.as_bytes()].concat();
        bytes.extend(record(3, 0, [0; 2], counts[0], &body));
    }
    bytes
}

/// A stream that is right, changed somehow.
fn mutated(prng: &mut Prng) -> Vec<u8> {
    let mut bytes = small_stream();
    for _ in 0..=prng.below(3) {
        let at = draw(prng, bytes.len());
        let length = draw(prng, (bytes.len() - at).min(300));
        match prng.below(5) {
            0 => bytes[at] = prng.below(256) as u8,
            1 => drop(bytes.drain(at..at + length)),
            2 => {
                let again = bytes[at..at + length].to_vec();
                bytes.splice(at..at, again);
            }
            3 => bytes[at..at + length].fill(0),
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes
}

/// S1, the other way round: what is accepted is, bit for bit, what a writer makes of the same items.
fn accepted_only_if_a_writer_wrote_it(bytes: &[u8]) -> bool {
    let Ok(mut reader) = Reader::open(bytes) else { return false };
    let mut writer = Writer::create(Vec::new(), reader.header().clone()).unwrap().with_mark_every(u64::MAX);
    loop {
        match reader.next_item() {
            Ok(Item::Element(e)) => writer.element(e.number, e.data, e.zero, e.bytes).unwrap(),
            Ok(Item::Mark(mark)) => assert_eq!(writer.mark().unwrap(), Some(mark)),
            Ok(Item::End(summary)) => {
                let (written, same) = writer.finish().unwrap();
                assert!(written == bytes);
                assert_eq!(same, summary);
                return true;
            }
            Err(_) => return false,
        }
    }
}

#[test]
fn made_up_and_mutated_streams_are_refused_or_what_a_writer_would_have_written() {
    let mut prng = Prng::new(4711);
    let (mut made, mut changed) = (0, 0);
    for _ in 0..20_000 {
        made += u32::from(accepted_only_if_a_writer_wrote_it(&made_up(&mut prng)));
        changed += u32::from(accepted_only_if_a_writer_wrote_it(&mutated(&mut prng)));
    }
    assert!((1_000..19_000).contains(&made), "{made} of 20,000 were accepted: both must happen often");
    assert!(changed < 2_000, "{changed} of 20,000 were accepted: they are hardly changed");
    assert!(accepted_only_if_a_writer_wrote_it(&small_stream()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(verify(&bytes[..]).is_err());
    }

    /// With right checksums around it, as if the program that wrote it were broken or mean.
    #[test]
    fn any_body_of_a_header_is_refused_or_a_header(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = small_stream()[..24].to_vec();
        bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
        bytes[16..20].copy_from_slice(&crc32c(&body).to_le_bytes());
        seal_head(&mut bytes);
        bytes.extend(&body);
        match Reader::open(&bytes[..]) {
            Ok(reader) => prop_assert!(write(reader.header(), &[], MARK_EVERY).starts_with(&bytes)),
            Err(refused) => {
                prop_assert!(matches!(refused.fault, Fault::Header(_)), "{}", refused);
                prop_assert_eq!(refused.offset, 24);
            }
        }
    }
}
