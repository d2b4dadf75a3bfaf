//! `petal stream verify` as a person calls it.

use petal_stream::*;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn stream() -> Vec<u8> {
    let header = Header {
        kind: Kind::Incremental { from: Point { lineage: 1, epoch: 4 }, from_snapshot: "monday".into() },
        cluster: 0x6d1f << 112,
        family: 12,
        to: Point { lineage: 1, epoch: 5 },
        disk: "vol0".into(),
        snapshot: "tuesday".into(),
        size: 1 << 30,
        stripe_unit: 1 << 20,
        copies: 2,
    };
    let mut writer = Writer::create(Vec::new(), header).unwrap();
    writer.element(7, 0b11, 0b100, &[0x5a; 2 * BLOCK_SIZE]).unwrap();
    writer.mark().unwrap();
    writer.element(9, 0, 0xffff, &[]).unwrap();
    writer.finish().unwrap().0
}

/// Runs it on bytes at its standard input.
fn verify(bytes: &[u8], arguments: &[&str]) -> Output {
    let mut petal = Command::new(env!("CARGO_BIN_EXE_petal"));
    petal.args(["stream", "verify", "-"]).args(arguments);
    petal.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = petal.spawn().unwrap();
    // It may have refused the stream already, and be gone.
    let _ = child.stdin.take().unwrap().write_all(bytes);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// It fails with exit code 1, prints nothing to standard output, and these words to standard error.
fn refused(output: &Output, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(output.stdout.is_empty());
    words.iter().for_each(|word| assert!(error.contains(word), "no '{word}' in: {error}"));
}

#[test]
fn a_whole_stream_is_described() {
    let output = verify(&stream(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = text(&output.stdout);
    for words in ["vol0@tuesday", "vol0@monday", "f12 (l1, e5)", "f12 (l1, e4)", "1 GiB", "2 elements", "whole"] {
        assert!(lines.contains(words), "no '{words}' in: {lines}");
    }
    assert!(output.stderr.is_empty());
}

#[test]
fn a_file_gives_the_same_json_as_standard_input() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), stream()).unwrap();
    let petal = Command::new(env!("CARGO_BIN_EXE_petal"))
        .args(["stream", "verify", "--json"])
        .arg(file.path())
        .output()
        .unwrap();
    assert_eq!(petal.status.code(), Some(0), "{}", text(&petal.stderr));
    assert_eq!(petal.stdout, verify(&stream(), &["--json"]).stdout);
    let json: serde_json::Value = serde_json::from_slice(&petal.stdout).unwrap();
    let summary = petal_stream::verify(&stream()[..]).unwrap();
    assert_eq!(json["whole"], true);
    assert_eq!(json["kind"], "incremental");
    assert_eq!(json["from"]["point"], serde_json::json!({"lineage": 1, "epoch": 4}));
    assert_eq!(json["cluster"], "6d1f0000000000000000000000000000");
    assert_eq!([&json["elements"], &json["data_blocks"], &json["zero_blocks"], &json["marks"]], [2, 2, 17, 2]);
    assert_eq!(json["bytes"], stream().len());
    assert_eq!(json["hash"], summary.hash.to_string());
}

#[test]
fn a_stream_that_is_cut_or_damaged_is_refused_with_the_place() {
    let whole = stream();
    let cut = whole.len() - 40;
    refused(
        &verify(&whole[..cut], &[]),
        &["standard input", &format!("byte {cut}"), "the disk's first 655360 bytes", "cut"],
    );
    let mut flipped = whole.clone();
    let data = whole.len() - 72 - 24 - 72 - 2 * BLOCK_SIZE;
    flipped[data + 100] ^= 1;
    refused(&verify(&flipped, &[]), &[&format!("byte {data}"), "the data of byte 458752 of the disk", "checksum"]);
    refused(&verify(b"#!/bin/sh\n", &[]), &["byte 0", "not begin like a backup stream"]);
    refused(&verify(b"", &[]), &["byte 0", "it is empty"]);
    refused(&verify(&[&whole[..], b"x"].concat(), &[]), &["behind its end"]);
}

#[test]
fn json_tells_the_place_too() {
    let whole = stream();
    let output = verify(&whole[..whole.len() - 1], &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["whole"], false);
    assert_eq!(json["offset"], whole.len() - 1);
    assert_eq!(json["after_element"], 9);
}

#[test]
fn a_newer_format_names_both() {
    let mut newer = stream();
    newer[8] = 9;
    let crc = stdx::checksum::crc32c(&newer[..20]);
    newer[20..24].copy_from_slice(&crc.to_le_bytes());
    refused(&verify(&newer, &[]), &["format 9", "up to 1", "newer program"]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let petal =
        |file: &str| Command::new(env!("CARGO_BIN_EXE_petal")).args(["stream", "verify", file]).output().unwrap();
    refused(&petal("/nowhere/vol0.petal"), &["cannot open /nowhere/vol0.petal"]);
    refused(&petal("/"), &["cannot be read", "directory"]);
    let nothing = Command::new(env!("CARGO_BIN_EXE_petal")).args(["stream", "verify"]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2), "{}", text(&nothing.stderr));
}
