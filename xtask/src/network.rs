//! Machines that are network namespaces, joined by a bridge in a namespace of its own, so that single links can
//! be cut: packets from one machine to another are lost, or answered with a reset as firewalls do it.
//!
//! Everything is made here and removed when the network is dropped; what a killed run left behind is removed by
//! the next. Nothing outside of these namespaces is touched. Needs root, `ip` and `nft`.

use crate::run::{command, output, read};
use anyhow::{Context, Result};
use std::process::Command;

/// What the names of all namespaces begin with; the process id follows.
const PREFIX: &str = "petal-e2e-";
/// The machines' addresses, which exist in these namespaces only.
const NETWORK: &str = "10.77.0";

/// Some machines on one network.
pub struct Network {
    prefix: String,
    machines: Vec<String>,
}

impl Network {
    /// Makes the machines; the first has the address 10.77.0.1.
    pub fn new(machines: &[&str]) -> Result<Network> {
        remove_leftovers()?;
        let prefix = format!("{PREFIX}{}-", std::process::id());
        // From here on, dropping it removes what there is.
        let network = Network { prefix, machines: machines.iter().map(ToString::to_string).collect() };
        let hub = network.namespace("hub");
        ip(&["netns", "add", &hub]).context("cannot make a network namespace: root is needed")?;
        ip(&["-n", &hub, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "bridge", "up"])?;
        for machine in &network.machines {
            network.plug_in(&hub, machine)?;
        }
        Ok(network)
    }

    fn plug_in(&self, hub: &str, machine: &str) -> Result<()> {
        let name = self.namespace(machine);
        let address = format!("{}/24", self.address(machine)?);
        ip(&["netns", "add", &name])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        ip(&["-n", hub, "link", "add", machine, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
        ip(&["-n", hub, "link", "set", machine, "master", "bridge", "up"])?;
        ip(&["-n", &name, "address", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        self.nft(machine, "add table inet petal")?;
        self.nft(machine, "add chain inet petal input { type filter hook input priority 0; }")
    }

    fn namespace(&self, machine: &str) -> String {
        format!("{}{machine}", self.prefix)
    }

    /// The address of a machine.
    pub fn address(&self, machine: &str) -> Result<String> {
        let place = self.machines.iter().position(|m| m == machine);
        Ok(format!("{NETWORK}.{}", place.with_context(|| format!("there is no machine {machine}"))? + 1))
    }

    /// A program as it would run on that machine. Its process is the program's own.
    pub fn on(&self, machine: &str, program: &Command) -> Command {
        let mut on = command("ip");
        on.args(["netns", "exec", &self.namespace(machine)]);
        Network::with(on, program)
    }

    /// The same, where it shares what is mounted with this process: `ip` gives each program mounts of its own.
    pub fn on_with_mounts(&self, machine: &str, program: &Command) -> Command {
        let mut on = command("nsenter");
        on.arg(format!("--net=/run/netns/{}", self.namespace(machine)));
        Network::with(on, program)
    }

    fn with(mut on: Command, program: &Command) -> Command {
        on.arg(program.get_program()).args(program.get_args());
        if let Some(folder) = program.get_current_dir() {
            on.current_dir(folder);
        }
        for (key, value) in program.get_envs() {
            match value {
                Some(value) => on.env(key, value),
                None => on.env_remove(key),
            };
        }
        on
    }

    fn nft(&self, machine: &str, rule: &str) -> Result<()> {
        read(&mut self.on(machine, command("nft").arg(rule))).map(|_| ())
    }

    /// What `from` sends to `to` is lost, without a word. The other direction works.
    pub fn cut(&self, from: &str, to: &str) -> Result<()> {
        self.nft(to, &format!("add rule inet petal input ip saddr {} drop", self.address(from)?))
    }

    /// Both directions between each pair.
    pub fn cut_off(&self, machine: &str, others: &[&str]) -> Result<()> {
        others.iter().try_for_each(|other| self.cut(machine, other).and_then(|()| self.cut(other, machine)))
    }

    /// A firewall between the two answers every packet with a reset, either way.
    pub fn refuse(&self, a: &str, b: &str) -> Result<()> {
        for (from, to) in [(a, b), (b, a)] {
            let from = self.address(from)?;
            let rule = format!("add rule inet petal input ip saddr {from} tcp flags & rst != rst");
            self.nft(to, &format!("{rule} reject with tcp reset"))?;
        }
        Ok(())
    }

    /// Everything arrives again.
    pub fn heal(&self) -> Result<()> {
        self.machines.iter().try_for_each(|machine| self.nft(machine, "flush chain inet petal input"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in self.machines.iter().map(String::as_str).chain(["hub"]) {
            // Some may not have been made.
            let _ = output(command("ip").args(["netns", "delete", &self.namespace(machine)]));
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    read(command("ip").args(arguments)).map(|_| ())
}

/// Namespaces of runs whose process is gone.
fn remove_leftovers() -> Result<()> {
    let list = read(command("ip").args(["netns", "list"]))?;
    for name in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            ip(&["netns", "delete", name])?;
        }
    }
    Ok(())
}
