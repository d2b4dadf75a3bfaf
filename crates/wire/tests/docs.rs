//! The message table of docs/wire-protocol.md against the enum.

mod samples;

use petal_wire::validate::name;

/// The variants of `Body`, in order, read from the source: an enum cannot list itself.
fn variants() -> Vec<String> {
    let source = include_str!("../../petal/src/message.rs");
    let start = source.find("pub enum Body {").expect("message.rs has the enum");
    let body = &source[start..start + source[start..].find("\n}").unwrap()];
    let lines = body.lines().skip(1).map(str::trim).filter(|l| !l.starts_with("//"));
    lines.map(|l| l.split(['(', ',']).next().unwrap().to_string()).collect()
}

#[test]
fn the_document_has_a_heading_for_each_message_in_the_order_of_the_wire() {
    let document = include_str!("../../../docs/wire-protocol.md");
    let headings: Vec<&str> = document.lines().filter_map(|l| l.strip_prefix("### ")).collect();
    assert_eq!(headings, variants());
    for section in document.split("\n### ").skip(1) {
        let (heading, text) = section.split_once('\n').unwrap();
        assert!(text.starts_with("From: ") && text.contains(". To: "), "{heading}: from whom, to whom?");
        assert!(text.contains("Handler: "), "{heading}: which handler?");
    }
}

#[test]
fn there_is_a_sample_of_each_message_and_its_name_is_the_variants() {
    let mut names: Vec<&str> = samples::samples().iter().map(|m| name(&m.body)).collect();
    names.dedup();
    assert_eq!(names, variants());
}

#[test]
fn every_reject_code_is_in_the_table() {
    let document = include_str!("../../../docs/wire-protocol.md");
    for number in 1..100 {
        match petal_wire::RejectCode::from_number(number) {
            petal_wire::RejectCode::Other(_) => {}
            known => assert!(document.contains(&format!("| {number} | {known:?} |")), "{number} {known:?}"),
        }
    }
}
