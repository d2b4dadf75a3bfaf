//! How answers look: tables for people, JSON for programs.

use anyhow::Result;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::io::Write;
use stdx::units::Size;

/// For people or for programs.
#[derive(clap::Args, Clone, Copy)]
pub struct Format {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints a line. Nobody may be there to read it any more: that is no failure of the command.
pub fn line(text: std::fmt::Arguments) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_fmt(text).and_then(|()| out.write_all(b"\n"));
}

/// A table without lines, as wide as the terminal.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.iter().map(|h| h.to_uppercase()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Numbers stand right.
pub fn right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Prints a table, without blanks at the ends of lines.
pub fn print_table(table: &Table) {
    table.lines().for_each(|line| println!("{}", line.trim_end()));
}

/// Prints JSON as a person can read it too.
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Bytes as a person would say them.
pub fn size(bytes: u64) -> String {
    Size(bytes).to_string()
}

/// Seconds since 1970, for people.
pub fn unix_seconds() -> u64 {
    petal_io::clock::unix_seconds()
}

/// A time as a person would say it, in one or two units.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

/// Reads the name of a server on the command line: `s3`.
pub fn parse_server(text: &str) -> Result<petal::ids::ServerId, String> {
    let number = text.strip_prefix('s').unwrap_or(text).parse().ok().filter(|n| *n > 0);
    number.map(petal::ids::ServerId).ok_or_else(|| "a server is named like s3".into())
}

/// Reads a size on the command line.
pub fn parse_size(text: &str) -> Result<u64, stdx::units::SizeError> {
    stdx::units::parse_size(text)
}
