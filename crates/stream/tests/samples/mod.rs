//! Streams to test with.

#![allow(dead_code)] // Each test file uses some of it.

use petal_stream::*;
use stdx::Prng;

/// What one call of the writer is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub number: u64,
    pub data: u16,
    pub zero: u16,
    pub bytes: Vec<u8>,
}

impl Blocks {
    /// With data drawn from a seed.
    pub fn drawn(number: u64, data: u16, zero: u16, seed: u64) -> Blocks {
        let mut prng = Prng::new(seed);
        let length = data.count_ones() as usize * BLOCK_SIZE;
        let bytes = (0..length / 8).flat_map(|_| prng.next_u64().to_le_bytes()).collect();
        Blocks { number, data, zero, bytes }
    }
}

pub fn full() -> Header {
    Header {
        kind: Kind::Full,
        cluster: 0x6d1f_0000_0000_0000_0000_0000_0000_0001,
        family: 12,
        to: Point { lineage: 1, epoch: 4 },
        disk: "vol0".into(),
        snapshot: "monday".into(),
        size: 4 << 30,
        stripe_unit: 1 << 20,
        copies: 2,
    }
}

pub fn incremental() -> Header {
    let kind = Kind::Incremental { from: full().to, from_snapshot: "monday".into() };
    Header { kind, to: Point { lineage: 1, epoch: 5 }, snapshot: "tuesday".into(), ..full() }
}

/// A few kilobytes with everything in it: data, zeros, both, three marks.
pub fn small() -> Vec<Blocks> {
    vec![Blocks::drawn(0, 0b1, 0, 1), Blocks::drawn(3, 0, 0x8001, 2), Blocks::drawn(65535, 1 << 15, 0b1, 3)]
}

/// A mark behind each element that has data.
pub const SMALL_MARK_EVERY: u64 = 4096;

pub fn write(header: &Header, blocks: &[Blocks], mark_every: u64) -> Vec<u8> {
    let mut writer = Writer::create(Vec::new(), header.clone()).unwrap().with_mark_every(mark_every);
    put(&mut writer, blocks);
    writer.finish().unwrap().0
}

pub fn small_stream() -> Vec<u8> {
    write(&incremental(), &small(), SMALL_MARK_EVERY)
}

pub fn put<W: std::io::Write>(writer: &mut Writer<W>, blocks: &[Blocks]) {
    for Blocks { number, data, zero, bytes } in blocks {
        writer.element(*number, *data, *zero, bytes).unwrap();
    }
}

/// What a stream says, if it is accepted.
pub fn read(bytes: &[u8]) -> Result<(Vec<Blocks>, Summary), StreamError> {
    let mut reader = Reader::open(bytes)?;
    let mut blocks = Vec::new();
    loop {
        match reader.next_item()? {
            Item::Element(Element { number, data, zero, bytes, .. }) => {
                blocks.push(Blocks { number, data, zero, bytes: bytes.to_vec() });
            }
            Item::Mark(_) => {}
            Item::End(summary) => return Ok((blocks, summary)),
        }
    }
}

/// A reader that gives as little as it may: one byte at a time.
pub struct Drops<'a>(pub &'a [u8]);

impl std::io::Read for Drops<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let length = bytes.len().min(1);
        std::io::Read::read(&mut self.0, &mut bytes[..length])
    }
}
