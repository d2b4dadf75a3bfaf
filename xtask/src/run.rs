//! Running other programs: a failure shows the command and the end of what it said.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Characters of a failed program's output that are shown.
const SHOWN: usize = 4000;

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// A command whose folder is the workspace.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).stdin(Stdio::null());
    command
}

/// nbdsh: its module belongs to the distribution's Python, whatever other Python comes first.
pub fn nbdsh() -> Command {
    let mut nbdsh = command("nbdsh");
    nbdsh.env("PATH", "/usr/bin:/bin");
    nbdsh
}

/// Cargo, as the one that runs this.
pub fn cargo() -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs it with our output; an exit other than zero is an error.
pub fn show(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", words(command));
    let status = command.status().with_context(|| format!("cannot start {}", words(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", words(command));
    }
    Ok(())
}

/// Runs it and returns what it wrote to its standard output; an exit other than zero is an error.
pub fn read(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!("{} ended with {}\n{}", words(command), output.status, tail(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs it and expects a failure; returns everything that it said.
pub fn read_failure(command: &mut Command) -> Result<(i32, String)> {
    let output = output(command)?;
    let Some(code) = output.status.code() else { bail!("{} was ended by a signal", words(command)) };
    if code == 0 {
        bail!("{} should have failed\n{}", words(command), tail(&output));
    }
    Ok((code, tail(&output)))
}

/// Runs it and returns all of what became of it.
pub fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot start {}", words(command)))
}

/// The end of what a program said.
pub fn tail(output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let start = text.char_indices().rev().nth(SHOWN).map_or(0, |(i, _)| i);
    text[start..].to_string()
}

/// The command as a person would type it.
pub fn words(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let mut text = program.to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
