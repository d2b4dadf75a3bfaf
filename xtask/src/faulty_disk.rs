//! A server's disk on a block device that hangs or fails when it is told to: the program `faulty_disk` of `crates/fuse`,
//! built here, and taken down on every path.

use crate::cluster::Cluster;
use crate::run::{self, cargo, command, root};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

/// The program, as long as it runs.
pub struct FaultyDisk<'a> {
    cluster: &'a Cluster,
    program: Child,
    told: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// The file below it, with what the disk has.
    pub below: PathBuf,
}

impl FaultyDisk<'_> {
    /// Puts the first disk of a server that does not run on such a device of so many bytes.
    pub fn put_below<'a>(cluster: &'a Cluster, server: &str, size: u64) -> Result<FaultyDisk<'a>> {
        run::show(cargo().args(["build", "--release", "--quiet", "-p", "petal-fuse", "--example", "faulty_disk"]))?;
        let (below, on) = (cluster.folder().join("below"), cluster.folder().join("faulty"));
        let disk = cluster.data().join(server).join("disk1");
        std::fs::rename(&disk, &below)?;
        // A device has its size from the beginning, a file grows.
        std::fs::OpenOptions::new().write(true).open(&below)?.set_len(size)?;
        std::fs::create_dir(&on)?;
        let mut program = command(root().join("target/release/examples/faulty_disk"));
        program.args([&below, &on]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = program.spawn().context("cannot start faulty_disk")?;
        let told = program.stdin.take();
        let answers = BufReader::new(program.stdout.take().context("no pipe")?);
        let mut faulty = FaultyDisk { cluster, program, told, answers, below };
        let device = faulty.answer()?;
        std::os::unix::fs::symlink(&device, &disk)?;
        println!("{server} has its disk on {device}");
        Ok(faulty)
    }

    /// What it does from now on; returns how many requests what it did until now has held up or failed.
    pub fn tell(&mut self, mode: &str) -> Result<u64> {
        writeln!(self.told.as_mut().context("it was told to end")?, "{mode}")?;
        self.answer()?.parse().context("faulty_disk answered no number")
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "faulty_disk has ended");
        Ok(line.trim().to_string())
    }
}

impl Drop for FaultyDisk<'_> {
    fn drop(&mut self) {
        // Whoever uses the device must be gone, and can go only when it answers.
        let _ = self.tell("pass");
        let _ = run::output(self.cluster.petal().arg("down"));
        self.told = None;
        let _ = self.program.wait();
    }
}
