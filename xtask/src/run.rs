//! Running other programs: a failure shows the command and the end of what it said.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Characters of a failed program's output that are shown.
const SHOWN: usize = 4000;

/// How long a program may run whose output is read: several times what the longest of a scenario takes.
const LIMIT: Duration = Duration::from_secs(300);

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

/// Runs it and returns all of what became of it; see [`output_within`].
pub fn output(command: &mut Command) -> Result<Output> {
    output_within(command, LIMIT)
}

/// Runs it and returns all of what became of it. A program that has hung is ended at the limit and told
/// as such: a run of everything must come to its end, and say what hung.
pub fn output_within(command: &mut Command, limit: Duration) -> Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("cannot start {}", words(command)))?;
    let pid = child.id().to_string();
    let (done, hung) = mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        let late = hung.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
        if late {
            // What it has started holds the same pipes.
            let _ = Command::new("pkill").args(["-KILL", "-P", &pid]).status();
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
        late
    });
    let output = child.wait_with_output();
    drop(done);
    let late = guard.join().expect("the guard does not panic");
    let output = output.with_context(|| format!("cannot read what {} says", words(command)))?;
    if late {
        bail!("{} did not end within {limit:?}\n{}", words(command), tail(&output));
    }
    Ok(output)
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
