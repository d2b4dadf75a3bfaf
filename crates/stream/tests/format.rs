//! The bytes themselves, and docs/stream-format.md against them.

mod samples;

use petal_stream::*;
use samples::*;

const DOCUMENT: &str = include_str!("../../../docs/stream-format.md");

/// As `hexdump -C` without the letters.
fn dump(bytes: &[u8]) -> String {
    let hex = |line: &[u8]| line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).enumerate().map(|(n, line)| format!("{:04x}  {}\n", n * 16, hex(line))).collect()
}

/// An increment that says of one block that it is zeros.
fn golden() -> Vec<u8> {
    write(&incremental(), &[Blocks { number: 3, data: 0, zero: 0b1, bytes: Vec::new() }], MARK_EVERY)
}

#[test]
fn the_bytes_are_those_of_the_document() {
    let dump = dump(&golden());
    assert!(
        DOCUMENT.contains(&format!("```\n{dump}```")),
        "docs/stream-format.md shows other bytes than these:\n{dump}"
    );
}

#[test]
fn every_field_is_where_the_pictures_say() {
    let bytes = golden();
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let crc = stdx::checksum::crc32c;

    assert_eq!(&bytes[..8], b"PETALSTR");
    assert_eq!(u32_at(8), 1, "format");
    let body = 24..24 + u32_at(12) as usize;
    assert_eq!(u32_at(16), crc(&bytes[body.clone()]));
    assert_eq!(u32_at(20), crc(&bytes[..20]));

    let element = body.end;
    assert_eq!(bytes[element..element + 8], [1, 0, 0, 0, 0, 0, 1, 0], "kind, zeros, data mask, zero mask");
    assert_eq!(u64_at(element + 8), 3);
    assert_eq!(u32_at(element + 16), crc(&[]));
    assert_eq!(u32_at(element + 20), crc(&bytes[element..element + 20]));

    let end = element + 24;
    assert_eq!(bytes[end..end + 8], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!([u64_at(end + 8), u64_at(end + 24), u64_at(end + 32)], [1, 0, 1], "elements, data blocks, zero blocks");
    assert_eq!(u32_at(end + 16), crc(&bytes[end + 24..]));
    assert_eq!(bytes[end + 40..], *blake3::hash(&bytes[..end]).as_bytes(), "hash of everything before the mark");
    assert_eq!(bytes.len(), end + 72);
}

#[test]
fn a_later_hash_is_of_everything_from_the_mark_before_on() {
    let mut writer = Writer::create(Vec::new(), full()).unwrap();
    put(&mut writer, &[Blocks::drawn(0, 1, 0, 1)]);
    let mark = writer.mark().unwrap().unwrap();
    put(&mut writer, &[Blocks::drawn(1, 1, 0, 1)]);
    let (bytes, summary) = writer.finish().unwrap();
    let (mark, end) = (mark.offset as usize, bytes.len() - 72);
    assert_eq!(bytes[mark], 2);
    assert_eq!(bytes[mark + 40..mark + 72], *blake3::hash(&bytes[..mark]).as_bytes());
    assert_eq!(bytes[end + 40..], *blake3::hash(&bytes[mark..end]).as_bytes());
    assert_eq!(bytes[end + 40..], summary.hash.0);
    assert_eq!((summary.marks, summary.bytes), (2, bytes.len() as u64));
}

#[test]
fn marks_come_by_themselves() {
    let stream = |every| verify(&write(&incremental(), &small(), every)[..]).unwrap().marks;
    assert_eq!(stream(MARK_EVERY), 1, "the end mark alone");
    assert_eq!(stream(SMALL_MARK_EVERY), 3);
    assert_eq!(stream(1), 4);
}
