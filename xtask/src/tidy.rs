//! Rules of the house that no compiler checks. Each complaint names the file and what to do.

use crate::run::{cargo, command, read, root};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Lines at which a file is looked at again. Longer ones are in [`LONG_FILES`], with a number that may
/// only fall.
const FILE_LINES_MAX: usize = 1000;
/// The ratchet: `(file, lines at most)`.
const LONG_FILES: &[(&str, usize)] = &[
    ("crates/nbd/tests/protocol.rs", 1281),
    ("crates/petal/src/data_access/mod.rs", 1500),
    ("crates/petal/src/store/disk.rs", 1300),
    ("crates/petal/src/store/model_tests.rs", 1500),
];

/// What each crate may depend on within the workspace: cli, front ends -> io -> wire -> cores -> stdx;
/// sim -> wire and cores, never io; a stream is bytes that know nothing of the rest.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("stdx", &[]),
    ("petal", &["stdx"]),
    ("petal-wire", &["stdx", "petal"]),
    ("petal-io", &["stdx", "petal", "petal-wire"]),
    ("petal-nbd", &["stdx", "petal-io"]),
    ("petal-fuse", &["stdx", "petal-io"]),
    ("petal-stream", &["stdx"]),
    ("petal-cli", &["stdx", "petal", "petal-wire", "petal-io", "petal-nbd", "petal-fuse", "petal-stream"]),
    ("petal-sim", &["stdx", "petal", "petal-wire"]),
    ("petal-model", &[]),
    ("petal-fuzz", &["stdx", "petal", "petal-wire", "petal-nbd", "petal-stream"]),
    ("xtask", &[]),
];

/// Runs all checks; the error lists every complaint.
pub fn run() -> Result<()> {
    let mut complaints = Vec::new();
    let files = tracked_files()?;
    dependency_directions(&mut complaints)?;
    links(&files, &mut complaints)?;
    message_table(&mut complaints)?;
    file_lengths(&files, &mut complaints)?;
    forbidden_words(&files, &mut complaints)?;
    if !complaints.is_empty() {
        bail!("{} complaints:\n  {}", complaints.len(), complaints.join("\n  "));
    }
    println!("tidy: {} files are in order", files.len());
    Ok(())
}

/// Files that git knows or would add, by their path from the workspace.
fn tracked_files() -> Result<Vec<PathBuf>> {
    let list = read(command("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]))?;
    Ok(list.lines().map(PathBuf::from).filter(|p| root().join(p).is_file()).collect())
}

fn text_of(file: &Path) -> Result<String> {
    std::fs::read_to_string(root().join(file)).with_context(|| format!("cannot read {}", file.display()))
}

fn has_extension(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|e| e == extension)
}

fn dependency_directions(complaints: &mut Vec<String>) -> Result<()> {
    let text = read(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let names: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = DIRECTIONS.iter().find(|(n, _)| *n == name) else {
            complaints.push(format!("crate {name}: say in xtask/src/tidy.rs what it may depend on"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            if names.contains(on) && !allowed.contains(&on) {
                complaints.push(format!("crate {name} depends on {on}: against the direction (ARCHITECTURE.md)"));
            }
        }
    }
    Ok(())
}

/// Relative links in documents lead to files and headings that exist.
fn links(files: &[PathBuf], complaints: &mut Vec<String>) -> Result<()> {
    for file in files.iter().filter(|f| has_extension(f, "md")) {
        let text = text_of(file)?;
        for target in link_targets(&text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let folder = file.parent().unwrap_or(Path::new(""));
            let to = if path.is_empty() { file.clone() } else { folder.join(path) };
            if !root().join(&to).exists() {
                complaints.push(format!("{}: the link to {target} is dead", file.display()));
            } else if !anchor.is_empty() && has_extension(&to, "md") && !headings(&text_of(&to)?).contains(anchor) {
                complaints.push(format!("{}: no heading for the link to {target}", file.display()));
            }
        }
    }
    Ok(())
}

/// Targets of `[text](target)` outside of code.
fn link_targets(text: &str) -> Vec<String> {
    let mut targets = Vec::new();
    for line in outside_code(text) {
        let mut rest = line;
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            if let Some(end) = rest.find(')') {
                targets.push(rest[..end].to_string());
            }
        }
    }
    targets
}

fn outside_code(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// Anchors of a document's headings, as forges make them.
fn headings(text: &str) -> BTreeSet<String> {
    let heading = |line: &str| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    outside_code(text).filter(|l| l.starts_with('#')).map(heading).collect()
}

/// The messages of docs/wire-protocol.md are those of `Body`: each variant has a heading of its name in
/// the section "Messages", and each heading there is of a variant.
fn message_table(complaints: &mut Vec<String>) -> Result<()> {
    let variants = enum_variants(&text_of(Path::new("crates/petal/src/message.rs"))?, "pub enum Body {");
    let document = Path::new("docs/wire-protocol.md");
    if !root().join(document).exists() {
        complaints.push("docs/wire-protocol.md is missing: it describes the messages".into());
        return Ok(());
    }
    let described = described_messages(&text_of(document)?);
    for name in variants.difference(&described) {
        complaints.push(format!("docs/wire-protocol.md: no heading for the message {name}"));
    }
    for name in described.difference(&variants) {
        complaints.push(format!("docs/wire-protocol.md: the heading {name} is of no message"));
    }
    Ok(())
}

fn enum_variants(source: &str, head: &str) -> BTreeSet<String> {
    let body = source.split(head).nth(1).and_then(|rest| rest.split("\n}").next()).unwrap_or_default();
    let lines = body.lines().map(str::trim).filter(|l| l.starts_with(|c: char| c.is_ascii_uppercase()));
    lines.map(|l| l.chars().take_while(|c| c.is_ascii_alphanumeric()).collect()).collect()
}

/// Headings of the third level within the section "Messages".
fn described_messages(document: &str) -> BTreeSet<String> {
    let section = document.split("\n## Messages\n").nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    section.lines().filter_map(|line| line.strip_prefix("### ")).map(|name| name.trim_matches('`').into()).collect()
}

fn file_lengths(files: &[PathBuf], complaints: &mut Vec<String>) -> Result<()> {
    for file in files.iter().filter(|f| has_extension(f, "rs")) {
        let lines = text_of(file)?.lines().count();
        let listed = LONG_FILES.iter().find(|(name, _)| Path::new(name) == file);
        match listed {
            Some((_, most)) if lines > *most => {
                complaints.push(format!("{}: {lines} lines, more than the {most} it had: cut it", file.display()));
            }
            Some(_) if lines <= FILE_LINES_MAX => {
                complaints.push(format!("{}: short enough; take it off the list in xtask/src/tidy.rs", file.display()));
            }
            None if lines > FILE_LINES_MAX => {
                complaints.push(format!("{}: {lines} lines; look at it again near {FILE_LINES_MAX}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// No `unsafe` outside crates/io, and no paths of one machine anywhere.
fn forbidden_words(files: &[PathBuf], complaints: &mut Vec<String>) -> Result<()> {
    // Written apart, so that this file does not contain them.
    let machine_paths = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/tmp/", "wt")];
    for file in files {
        let Ok(text) = text_of(file) else { continue };
        for (number, line) in text.lines().enumerate() {
            let place = || format!("{}:{}", file.display(), number + 1);
            if let Some(path) = machine_paths.iter().find(|p| line.contains(**p)) {
                complaints.push(format!("{}: '{path}' is a path of one machine", place()));
            }
            if has_extension(file, "rs") && !file.starts_with("crates/io") && has_unsafe(line) {
                complaints.push(format!("{}: unsafe code belongs into crates/io", place()));
            }
        }
    }
    Ok(())
}

/// `unsafe` as a keyword that opens a block, function, trait or impl, outside of comments.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let keyword = concat!("un", "safe");
    code.match_indices(keyword).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + keyword.len()..].trim_start();
        !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | '"' | '`'))
            && ["{", "fn ", "impl ", "trait ", "extern "].iter().any(|s| after.starts_with(s))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_in_text_are_found_and_those_in_code_are_not() {
        let text = "see [a](b.md#c) and [d](e)\n```\n[x](y)\n```\n";
        assert_eq!(link_targets(text), ["b.md#c", "e"]);
    }

    #[test]
    fn headings_become_anchors_as_forges_make_them() {
        assert!(headings("## What we assume of `disks`\n").contains("what-we-assume-of-disks"));
    }

    #[test]
    fn messages_are_read_from_the_enum_and_from_the_headings() {
        let source = "pub enum Body {\n    /// Doc.\n    Read(Read),\n    Index,\n}\n";
        let document = "# T\n\n## Messages\n\n### Read\n\ntext\n\n### Index\n\n## After\n\n### Other\n";
        assert_eq!(enum_variants(source, "pub enum Body {"), described_messages(document));
    }

    #[test]
    fn unsafe_is_found_in_code_and_not_in_comments_or_names() {
        assert!(has_unsafe(concat!("let x = un", "safe { f() };")));
        assert!(!has_unsafe(concat!("// un", "safe { f() }")));
        assert!(!has_unsafe(concat!("#![allow(un", "safe_code)]")));
    }
}
