//! The README's deployment, word for word, on machines that are network namespaces: its commands are read from the README,
//! and only addresses, devices and paths are other ones. Then what a deployment is for: one machine is cut off while a file
//! system is used, and another takes its place.

use crate::cluster::Cluster;
use crate::network::Network;
use crate::run::{command, nbdsh, output_within, read, root};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::cell::RefCell;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

const SECTION: &str = "## A real deployment";
const MACHINES: [&str; 5] = ["m1", "m2", "m3", "m4", "client"];
const PATIENCE: Duration = Duration::from_secs(60);

/// Processes that do not end by themselves.
struct Running(RefCell<Vec<Child>>);

impl Drop for Running {
    fn drop(&mut self) {
        for child in self.0.get_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Lab<'a> {
    cluster: &'a Cluster,
    network: Network,
    running: Running,
    /// What `export PETAL_CLUSTER=` says.
    servers: String,
}

impl Lab<'_> {
    /// A line of the README, or of what a command printed, as it is to be said on that machine here.
    fn here(&self, machine: &str, line: &str) -> Result<String> {
        let folder = self.cluster.folder().display().to_string();
        let network = self.network.address("m1")?;
        let network = network.strip_suffix(".1").context("the first machine has the first address")?;
        let config = format!("{folder}/{machine}.toml");
        Ok(line
            .replace("10.0.0", network)
            .replace("/dev/sdb", &format!("{folder}/{machine}.disk --disk-size 2GiB"))
            .replace("/etc/petal/server.toml", &config)
            .replace("/run/petal/", &format!("{folder}/")))
    }

    fn words(&self, machine: &str, line: &str) -> Result<Command> {
        let line = self.here(machine, line)?;
        println!("{machine}$ {line}");
        let mut words = line.split_whitespace();
        ensure!(words.next() == Some("petal"), "no command of ours: {line}");
        let mut petal = self.cluster.petal();
        petal.env("PETAL_CLUSTER", &self.servers).args(words);
        Ok(self.network.on_with_mounts(machine, &petal))
    }

    fn say(&self, machine: &str, line: &str) -> Result<String> {
        read(&mut self.words(machine, line)?)
    }

    /// Begins what does not end by itself.
    fn run(&self, machine: &str, line: &str) -> Result<()> {
        let log = self.cluster.folder().join(format!("{machine}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        let child = self.words(machine, line)?.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.running.0.borrow_mut().push(child);
        Ok(())
    }

    fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut petal = self.cluster.petal();
        petal.env("PETAL_CLUSTER", &self.servers).args(arguments).arg("--json");
        Ok(serde_json::from_str(&read(&mut self.network.on("client", &petal))?)?)
    }

    fn until(&self, what: &str, arguments: &[&str], is_so: impl Fn(&Value) -> bool) -> Result<()> {
        Cluster::wait_for(what, PATIENCE, || self.ask(arguments).is_ok_and(|answer| is_so(&answer)))
    }
}

/// The commands of the README's section, one a line.
fn commands() -> Result<Vec<String>> {
    let readme = std::fs::read_to_string(root().join("README.md"))?;
    let (_, section) = readme.split_once(SECTION).context("the README has no such section")?;
    let section = section.split("\n## ").next().expect("something");
    let blocks = section.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let lines = blocks.map(|block| block.replace("\\\n", " ")).collect::<String>();
    Ok(lines.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

fn is_up(status: &Value, server: &str) -> bool {
    status["servers"].as_array().into_iter().flatten().any(|s| s["id"] == server && s["state"] == "up")
}

fn slots(list: &Value, server: &str) -> Option<u64> {
    list["servers"].as_array().into_iter().flatten().find(|s| s["server"] == server)?["copies"].as_u64()
}

/// Unmounts and detaches on every path, while there are servers.
struct Mounted<'a> {
    lab: &'a Lab<'a>,
    folder: &'a Path,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = self.lab.network.heal();
        let _ = output_within(command("umount").arg(self.folder), PATIENCE);
        if let Ok(mut detach) = self.lab.words("client", "petal detach vm1") {
            let _ = output_within(&mut detach, PATIENCE);
        }
    }
}

pub fn deployment(cluster: &Cluster) -> Result<()> {
    let said = commands()?;
    let [init, server, export, create, nbd] = &said[..] else { anyhow::bail!("other commands: {said:#?}") };
    let servers = export.strip_prefix("export PETAL_CLUSTER=").context("where the servers are")?;
    let network = Network::new(&MACHINES)?;
    let mut lab = Lab { cluster, network, running: Running(RefCell::default()), servers: String::new() };
    lab.servers = lab.here("client", servers)?;

    let printed = lab.say("m1", init)?;
    lab.run("m1", server)?;
    let joins: Vec<&str> = printed.lines().map(str::trim).filter(|line| line.starts_with("petal join ")).collect();
    let [second, third, more] = &joins[..] else { anyhow::bail!("init printed {printed}") };
    let own = |line: &str| {
        line.replace("DISK", "/dev/sdb").replace("--config server.toml", "--config /etc/petal/server.toml")
    };
    for (machine, join) in [("m2", second), ("m3", third)] {
        lab.say(machine, &own(join))?;
        lab.run(machine, server)?;
    }
    lab.until("three servers are up", &["status"], |s| ["s1", "s2", "s3"].iter().all(|id| is_up(s, id)))?;
    lab.say("client", create)?;
    lab.run("client", nbd)?;
    let socket = lab.cluster.folder().join("nbd.sock");
    Cluster::wait_for("the NBD server listens", PATIENCE, || socket.exists())?;
    let uri = format!("nbd+unix:///vm1?socket={}", socket.display());
    read(nbdsh().args(["-u", &uri, "-c", "h.pwrite(b'w' * 4096, 1 << 30); h.flush()"]))?;

    // A file system on one machine, in use.
    let attached = lab.say("client", "petal attach vm1")?;
    let device =
        attached.split_whitespace().find(|word| word.starts_with("/dev/loop")).context("no device is named")?;
    read(command("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=1"]).arg(device))?;
    let folder = cluster.folder().join("mnt");
    std::fs::create_dir(&folder)?;
    read(command("mount").arg(device).arg(&folder))?;
    let mounted = Mounted { lab: &lab, folder: &folder };
    let put = |name: &str| -> Result<()> {
        std::fs::write(folder.join(name), name.repeat(1 << 20))?;
        read(command("sync").arg("-f").arg(&folder)).map(drop)
    };
    put("before")?;
    let others = ["m1", "m2", "m4", "client"];
    lab.network.cut_off("m3", &others)?;
    put("while-it-is-cut-off")?;
    let is_down =
        |s: &Value| s["servers"].as_array().into_iter().flatten().any(|s| s["id"] == "s3" && s["down"] == true);
    lab.until("s3 is declared down", &["status"], is_down)?;

    // Another machine, and it takes the place.
    let join = own(&format!("{more} --config server.toml")).replace("ADDRESS", "10.0.0.4:7000");
    lab.say("m4", &join)?;
    lab.run("m4", server)?;
    lab.say("client", "petal server replace-after 1s")?;
    lab.until("s4 has what s3 had", &["server", "list"], |l| {
        slots(l, "s3") == Some(0) && slots(l, "s4").is_some_and(|slots| slots > 0)
    })?;
    lab.until("everything is redundant", &["status"], |s| s["redundancy"]["full"] == true)?;
    put("after")?;
    lab.network.heal()?;
    lab.until("s3 has its share again", &["server", "list"], |l| slots(l, "s3").is_some_and(|slots| slots > 0))?;
    let is_at_rest = |s: &Value| {
        let moves = s["reconfiguration"]["moving"].as_array().is_none_or(|moving| !moving.is_empty());
        s["redundancy"]["full"] == true && !moves && s["reconfiguration"]["to_plan"] == 0
    };
    lab.until("everything is redundant, and nothing moves", &["status"], is_at_rest)?;

    for name in ["before", "while-it-is-cut-off", "after"] {
        let text = std::fs::read_to_string(folder.join(name))?;
        ensure!(text == name.repeat(1 << 20), "{name} is not what was written");
    }
    read(command("umount").arg(&folder))?;
    read(command("e2fsck").args(["-f", "-n"]).arg(device))?;
    lab.say("client", "petal detach vm1")?;
    drop(mounted);
    lab.say("client", "petal verify").map(drop)
}
