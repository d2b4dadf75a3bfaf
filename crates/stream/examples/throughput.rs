//! How fast a core writes and verifies a stream: `cargo run --release -p petal-stream --example throughput`.
//!
//! The stream is in memory, so these are the costs of checksum, hash and copying alone.

use petal_stream::*;
use std::time::Instant;

const ELEMENTS: u64 = 16384;

fn main() {
    // Whole elements, and single blocks as small random writes leave them.
    for (what, mask) in [("whole elements", 0xffff_u16), ("single blocks", 0x0100)] {
        let header = Header {
            kind: Kind::Full,
            cluster: 1,
            family: 1,
            to: Point { lineage: 1, epoch: 1 },
            disk: "vol0".into(),
            snapshot: "now".into(),
            size: 1 << 40,
            stripe_unit: 1 << 20,
            copies: 2,
        };
        let data: Vec<u8> = (0..mask.count_ones() as usize * BLOCK_SIZE).map(|n| (n * 7919) as u8).collect();
        let start = Instant::now();
        let length = write(std::io::sink(), &header, mask, &data).1.bytes;
        report(&format!("{what}, write"), length as usize, start);
        let bytes = write(Vec::new(), &header, mask, &data).0;
        let start = Instant::now();
        verify(&bytes[..]).expect("it was just written");
        report(&format!("{what}, verify"), bytes.len(), start);
    }
}

fn write<W: std::io::Write>(output: W, header: &Header, mask: u16, data: &[u8]) -> (W, Summary) {
    let mut writer = Writer::create(output, header.clone()).expect("a good header");
    for number in 0..ELEMENTS {
        writer.element(number, mask, 0, data).expect("memory takes it");
    }
    writer.finish().expect("memory takes it")
}

fn report(what: &str, bytes: usize, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    println!("{what:<24} {:.2} GB in {seconds:.2} s: {:.2} GB/s", bytes as f64 / 1e9, bytes as f64 / 1e9 / seconds);
}
