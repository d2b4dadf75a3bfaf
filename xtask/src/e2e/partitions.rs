//! Partitions between real processes, each in a network namespace of its own: four servers, of which the first
//! three are the ring, and a client. While a link or several are cut, the client's I/O goes on; what its clients
//! saw is judged by the simulator's checker, and afterwards everything has all its copies again.

use super::chaos::judge;
use crate::cluster::Cluster;
use crate::network::Network;
use crate::run::read;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

pub(super) const SERVERS: [&str; 4] = ["s1", "s2", "s3", "s4"];
const CLIENT: &str = "client";
/// How long a partition lasts: several leases.
const CUT: Duration = Duration::from_secs(5);
/// Seconds for which the clients ask.
const HISTORY_SECONDS: u64 = 11;
/// I/O stands for two lease times at most (P3); a loaded machine may take longer, but not as long as the partition.
const GAP_MAX: Duration = Duration::from_secs(4);

pub fn cut_off_from_the_servers(cluster: &Cluster) -> Result<()> {
    // The client still reaches it, and must get nothing old from it.
    goes_on(cluster, "s4 cut off from the servers, not from the client", |lab| {
        lab.network.cut_off("s4", &["s1", "s2", "s3"])?;
        Ok(vec!["s4 is declared down"])
    })
}

pub fn leader_cut_off(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "the ring's leader cut off from everybody", |lab| {
        let leader = lab.leader()?;
        let others: Vec<&str> = SERVERS.iter().copied().filter(|s| *s != leader).chain([CLIENT]).collect();
        lab.network.cut_off(&leader, &others)?;
        Ok(vec!["is declared down"])
    })
}

pub fn leader_cut_off_from_the_servers(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "the ring's leader cut off from the servers, not from the client", |lab| {
        let leader = lab.leader()?;
        let others: Vec<&str> = SERVERS.iter().copied().filter(|s| *s != leader).collect();
        lab.network.cut_off(&leader, &others)?;
        Ok(vec!["is declared down"])
    })
}

pub fn speaks_and_does_not_hear(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "what the other servers send to s4 is lost", |lab| {
        ["s1", "s2", "s3"].iter().try_for_each(|other| lab.network.cut(other, "s4"))?;
        Ok(vec!["s4 is declared down"])
    })
}

pub fn hears_and_is_not_heard(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "what a member of the ring sends to the other servers is lost", |lab| {
        let leader = lab.leader()?;
        let member = ["s1", "s2", "s3"].into_iter().find(|s| *s != leader).context("a ring of three")?;
        let others = SERVERS.iter().filter(|s| **s != member);
        others.into_iter().try_for_each(|other| lab.network.cut(member, other))?;
        Ok(vec!["is declared down"])
    })
}

pub fn one_link_cut(cluster: &Cluster) -> Result<()> {
    // Both are heard by the ring: who acts in a slot takes the other one out of it.
    goes_on(cluster, "the link between s3 and s4 cut", |lab| {
        lab.network.cut_off("s3", &["s4"])?;
        Ok(vec![])
    })
}

pub fn one_link_refused(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "a firewall refuses between the ring's leader and s4", |lab| {
        let leader = lab.leader()?;
        lab.network.refuse(&leader, "s4")?;
        Ok(vec![])
    })
}

pub fn client_cut_off(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "the client cut off from s3, which all servers reach", |lab| {
        lab.network.cut_off(CLIENT, &["s3"])?;
        Ok(vec![])
    })
}

pub fn client_refused(cluster: &Cluster) -> Result<()> {
    goes_on(cluster, "a firewall refuses between the client and s3, which all servers reach", |lab| {
        lab.network.refuse(CLIENT, "s3")?;
        Ok(vec![])
    })
}

/// A cluster of four machines, and a client's.
pub(super) struct Lab<'a> {
    cluster: &'a Cluster,
    pub(super) network: Network,
    servers: BTreeMap<&'static str, Child>,
    addresses: String,
}

impl Drop for Lab<'_> {
    fn drop(&mut self) {
        for server in self.servers.values_mut() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

impl<'a> Lab<'a> {
    /// Four servers, and a disk for what is judged.
    pub(super) fn start(cluster: &'a Cluster) -> Result<Lab<'a>> {
        let mut machines = SERVERS.to_vec();
        machines.push(CLIENT);
        let network = Network::new(&machines)?;
        let address = |server: &str| -> Result<String> { Ok(format!("{}:7000", network.address(server)?)) };
        let addresses = SERVERS.iter().map(|s| address(s)).collect::<Result<Vec<String>>>()?;
        let mut lab = Lab { cluster, network, servers: BTreeMap::new(), addresses: addresses.join(",") };
        let ring = addresses[..3].join(",");
        let made = read(lab.petal().args(["init", "--ring", &ring, "--json"]).args(own_disk("s1")))?;
        let made: Value = serde_json::from_str(&made)?;
        let token = made["token"].as_str().context("init printed no join token")?.to_string();
        lab.run_server("s1")?;
        for (server, address) in SERVERS.into_iter().zip(&addresses).skip(1) {
            // s4 is made known to the running ring, so it must be asked from its machine.
            let mut join = lab.petal();
            join.args(["join", &token, "--listen", address, "--json"]).args(own_disk(server));
            read(&mut lab.network.on(server, &join))?;
            lab.run_server(server)?;
        }
        Cluster::wait_for("four servers are up", Duration::from_secs(20), || {
            lab.status().is_ok_and(|status| {
                let servers = status["servers"].as_array().cloned().unwrap_or_default();
                servers.len() == 4 && servers.iter().all(|s| s["state"] == "up")
            })
        })?;
        lab.ask(&["disk", "create", "judged", "1GiB"])?;
        // Who learns last may be the one that is asked next.
        Cluster::wait_for("every server knows the disk", Duration::from_secs(10), || {
            let knows = |s: &&str| lab.ask(&["--cluster", &lab.address_of(s), "disk", "info", "judged"]).is_ok();
            SERVERS.iter().all(knows)
        })?;
        Ok(lab)
    }

    fn address_of(&self, server: &str) -> String {
        let at = SERVERS.iter().position(|s| *s == server).expect("one of the servers");
        self.addresses.split(',').nth(at).expect("each has an address").to_string()
    }

    /// The program, told where the servers are.
    fn petal(&self) -> Command {
        let mut petal = self.cluster.petal();
        petal.env("PETAL_CLUSTER", &self.addresses);
        petal
    }

    /// Starts it; whatever it was before has ended.
    pub(super) fn run_server(&mut self, server: &'static str) -> Result<()> {
        let log = self.cluster.folder().join(format!("{server}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        let mut petal = self.petal();
        petal.args(["server", "--config"]).arg(self.cluster.folder().join(format!("{server}.toml")));
        let mut run = self.network.on(server, &petal);
        self.servers.insert(server, run.stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(())
    }

    /// Ends its process for good.
    pub(super) fn kill_server(&mut self, server: &str) -> Result<()> {
        let process = self.servers.get_mut(server).context("every server was started")?;
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// The process of a server.
    pub(super) fn pid_of(&self, server: &str) -> u32 {
        self.servers[server].id()
    }

    /// An error if a server ended without having been asked to.
    pub(super) fn all_run(&mut self) -> Result<()> {
        for (server, process) in &mut self.servers {
            if let Some(status) = process.try_wait()? {
                bail!("{server} ended by itself: {status}");
            }
        }
        Ok(())
    }

    /// Asks from the client's machine.
    pub(super) fn ask(&self, arguments: &[&str]) -> Result<String> {
        read(&mut self.network.on(CLIENT, self.petal().args(arguments)))
    }

    pub(super) fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ask(&["status", "--json"])?)?)
    }

    /// Clients on the client's machine, which write what they see into the record.
    pub(super) fn clients(&self, record: &Path, seconds: u64) -> Result<Child> {
        let mut history = self.petal();
        history.args(["history", "judged", "--clients", "4", "--seconds", &seconds.to_string(), "--out"]).arg(record);
        self.network.on(CLIENT, &history).spawn().context("cannot start `petal history`")
    }

    /// What the cluster decided, as each server remembers it: one that began a new life forgot what was before.
    fn log(&self) -> Result<String> {
        SERVERS.iter().map(|server| self.ask(&["log", "-n", "1024", "--server", server])).collect()
    }

    fn leader(&self) -> Result<String> {
        let status = self.status()?;
        let leads = status["servers"].as_array().into_iter().flatten().find(|s| s["leads"] == true);
        leads.and_then(|s| s["id"].as_str()).map(String::from).context("nobody leads the ring")
    }
}

/// Paths are relative to the cluster's folder.
fn own_disk(server: &str) -> [String; 6] {
    let config = format!("{server}.toml");
    ["--disk".into(), format!("{server}.disk"), "--disk-size".into(), "2GiB".into(), "--config".into(), config]
}

/// Clients read and write while `fail` has cut something; it returns what the cluster's log must say by the end.
/// Where it returns nothing, nobody may even have been suspected.
fn goes_on(cluster: &Cluster, what: &str, fail: impl FnOnce(&Lab) -> Result<Vec<&'static str>>) -> Result<()> {
    let lab = Lab::start(cluster)?;
    let record = cluster.folder().join("history.jsonl");
    let mut clients = lab.clients(&record, HISTORY_SECONDS)?;
    let cut = have_begun(&record).and_then(|()| {
        let cut = fail(&lab);
        std::thread::sleep(CUT);
        cut
    });
    let healed = lab.network.heal();
    let ended = end_of(&mut clients, HISTORY_SECONDS);
    let expected = cut?;
    healed?;
    ended?;
    let said = judge(&record)?;
    let gaps = Gaps::of(&std::fs::read_to_string(&record)?)?;
    println!("{what}: {}; without an answer at most {:?}, reads {:?}", said, gaps.all, gaps.reads);
    ensure!(gaps.all < GAP_MAX, "I/O stood for {:?} while the partition lasted", gaps.all);
    let start = Instant::now();
    Cluster::wait_for("everything is redundant again", Duration::from_secs(30), || {
        lab.status().is_ok_and(|s| s["redundancy"]["full"] == true)
    })?;
    println!("redundant again {:.1} s after the clients ended", start.elapsed().as_secs_f32());
    let log = lab.log()?;
    for words in &expected {
        ensure!(log.contains(words), "the cluster's log does not say '{words}':\n{log}");
    }
    let suspected = log.contains("is suspected");
    ensure!(suspected != expected.is_empty(), "suspected: {suspected}, which is wrong here:\n{log}");
    lab.ask(&["verify"]).map(|_| ())
}

/// Waits for the first of what the clients write down.
pub(super) fn have_begun(record: &Path) -> Result<()> {
    Cluster::wait_for("the clients have begun", Duration::from_secs(10), || {
        std::fs::metadata(record).is_ok_and(|m| m.len() > 0)
    })
}

/// Waits for the end of clients that ask for so many seconds at most.
pub(super) fn end_of(clients: &mut Child, seconds: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds) + Duration::from_secs(30);
    loop {
        if let Some(status) = clients.try_wait()? {
            ensure!(status.success(), "`petal history` ended with {status}");
            return Ok(());
        }
        if Instant::now() > end {
            clients.kill()?;
            clients.wait()?;
            bail!("the clients' last operations were not answered");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Longest times between two answers.
struct Gaps {
    all: Duration,
    reads: Duration,
}

impl Gaps {
    fn of(record: &str) -> Result<Gaps> {
        let mut all = Vec::new();
        let mut reads = Vec::new();
        for line in record.lines() {
            let line: Value = serde_json::from_str(line)?;
            if let Some(at) = line["return"].as_u64() {
                all.push(at);
                if line["op"] == "read" {
                    reads.push(at);
                }
            }
        }
        Ok(Gaps { all: longest(all), reads: longest(reads) })
    }
}

/// Longest distance of two neighbours.
fn longest(mut at: Vec<u64>) -> Duration {
    at.sort_unstable();
    Duration::from_micros(at.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0))
}
