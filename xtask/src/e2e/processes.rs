//! Starting, stopping, killing: `up`, `down`, `server`, `init`, `join`, and the disks' commands.

use crate::cluster::{Cluster, kill9};
use crate::run::{command, nbdsh, read, read_failure};
use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};

/// Bytes of the disk that `up` makes.
const VOL0_SIZE: u64 = 10 << 30;

pub fn up_and_down(cluster: &Cluster) -> Result<()> {
    let start = Instant::now();
    cluster.up(&[])?;
    let ready = start.elapsed();
    println!("ready after {ready:?}");
    // On a quiet machine it is under 5 s; a busy one fails nobody.
    ensure!(ready < Duration::from_secs(30), "`petal up --detach` took {ready:?}");

    let info = read(command("nbdinfo").args(["--json", &cluster.nbd_uri("vol0")?]))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let export = &info["exports"][0];
    ensure!(export["export-size"] == VOL0_SIZE, "nbdinfo sees another size: {export}");
    for ability in ["can_trim", "can_zero", "can_fua", "can_flush", "can_multi_conn", "can_cache", "can_df"] {
        ensure!(export[ability] == true, "nbdinfo: {ability} is missing: {export}");
    }
    let status = cluster.status()?;
    let servers = status["servers"].as_array().context("no servers")?;
    ensure!(servers.len() == 4, "4 servers were expected: {status}");
    for server in servers {
        ensure!(server["state"] == "up", "a server is not up: {server}");
        ensure!(server["id"].is_string() && server["address"].is_string(), "id and address are missing: {server}");
    }
    cluster.down()?;
    ensure!(cluster.processes().is_empty(), "processes are left");
    // What is stopped can be stopped again, and says so.
    read(cluster.petal().arg("down"))?;
    Ok(())
}

pub fn disk_commands(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3"])?;
    let petal = |arguments: &[&str]| read(cluster.petal().args(arguments));
    petal(&["disk", "create", "db", "1GiB"])?;
    let info: serde_json::Value = serde_json::from_str(&petal(&["disk", "info", "db", "--json"])?)?;
    ensure!(info["size"] == 1u64 << 30 && info["copies"] == 2, "wrong info: {info}");
    petal(&["disk", "resize", "db", "2GiB"])?;
    petal(&["disk", "rename", "db", "database"])?;
    let list: serde_json::Value = serde_json::from_str(&petal(&["disk", "list", "--json"])?)?;
    let names: Vec<&str> = list.as_array().into_iter().flatten().filter_map(|d| d["name"].as_str()).collect();
    ensure!(names.contains(&"database") && names.contains(&"vol0") && names.len() == 2, "wrong list: {names:?}");
    let size = read(command("nbdinfo").args(["--size", &cluster.nbd_uri("database")?]))?;
    ensure!(size.trim() == (2u64 << 30).to_string(), "the new size is not served: {size}");
    petal(&["disk", "resize", "database", "512MiB", "--shrink"])?;
    petal(&["disk", "delete", "database", "--yes"])?;
    let (code, text) = read_failure(cluster.petal().args(["disk", "info", "database"]))?;
    ensure!(code == 1 && text.contains("database"), "the deleted disk is still there: {text}");
    cluster.down()
}

pub fn second_up_starts_what_is_missing(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let before = cluster.server_pids()?;
    kill9(before[1])?;
    Cluster::wait_for("the status shows the loss", Duration::from_secs(10), || {
        cluster.status().is_ok_and(|s| s["servers"][1]["state"] != "up")
    })?;
    let uri = cluster.nbd_uri("vol0")?;
    // Needs the server that is gone for a part: it waits, and goes on when the server is back.
    let mut writer =
        nbdsh().args(["-u", &uri, "-c", "[h.pwrite(b'x' * 65536, i << 20) for i in range(200)]; h.flush()"]).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    cluster.up(&[])?;
    let after = cluster.server_pids()?;
    ensure!(after[1] != before[1] && after[0] == before[0], "only the killed server was to be started");
    let end = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = writer.try_wait()? {
            break status;
        }
        if Instant::now() > end {
            let _ = writer.kill();
            let _ = writer.wait();
            bail!("the writer did not go on within 30 s after the server was back");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    ensure!(status.success(), "the writer failed: {status}");
    read(cluster.petal().args(["verify"]))?;
    cluster.down()
}

pub fn everything_killed_comes_back(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    read(nbdsh().args(["-u", &uri, "-c", "h.pwrite(b'petal' * 1000, 12345); h.flush()"]))?;
    for (pid, _) in cluster.processes() {
        kill9(pid)?;
    }
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    read(nbdsh().args(["-u", &uri, "-c", "assert h.pread(5000, 12345) == b'petal' * 1000"]))?;
    cluster.down()?;
    for id in 1..=4 {
        read(cluster.petal().args(["verify", "--offline", &format!("s{id}")]))?;
    }
    Ok(())
}

pub fn killed_supervisor_is_replaced(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    // A connection that is open when its server dies: its session stays behind.
    let code = "import time; h.pwrite(b'a' * 4096, 0); open('connected', 'w').close(); time.sleep(60)";
    let mut client = nbdsh().current_dir(cluster.folder()).args(["-u", &uri, "-c", code]).spawn()?;
    let mark = cluster.folder().join("connected");
    let connected = Cluster::wait_for("the client is connected", Duration::from_secs(10), || mark.exists());
    let before = cluster.server_pids()?;
    let supervisor = cluster.status()?["nbd"]["pid"].as_u64().context("no supervisor")?;
    kill9(supervisor as u32)?;
    let _ = client.kill();
    let _ = client.wait();
    connected?;
    cluster.up(&[])?;
    ensure!(cluster.server_pids()? == before, "servers that ran were started again");
    read(nbdsh().args(["-u", &uri, "-c", "assert h.pread(4096, 0) == b'a' * 4096; h.pwrite(b'b' * 4096, 0)"]))?;
    cluster.down()
}

pub fn one_server_without_its_disk(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB", "--size", "1GiB"])?;
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", "h.pwrite(b'k' * (16 << 20), 0)"]))?;
    cluster.down()?;
    for server in ["s2", "s4"] {
        let (disk, away) = (cluster.data().join(server).join("disk1"), cluster.folder().join("away"));
        std::fs::rename(&disk, &away)?;
        let text = read(cluster.petal().args(["up", "--detach"]))?;
        ensure!(text.contains(&format!("{server} did not start")), "the loss is not told: {text}");
        ensure!(!disk.exists(), "a disk that is away was made anew");
        let (code, text) = read_failure(cluster.petal().arg("up"))?;
        ensure!(code == 1 && text.contains("disk1"), "a second up must say what is missing: {text}");
        std::fs::rename(&away, &disk)?;
        cluster.up(&[])?;
        let code = "assert h.pread(16 << 20, 0) == b'k' * (16 << 20)";
        read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", code]))?;
        cluster.down()?;
    }
    Ok(())
}

pub fn no_majority(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB", "--size", "1GiB"])?;
    let pids = cluster.server_pids()?;
    kill9(pids[0])?;
    kill9(pids[2])?;
    let status = cluster.status()?;
    let states: Vec<&str> =
        status["servers"].as_array().into_iter().flatten().filter_map(|s| s["state"].as_str()).collect();
    ensure!(states.iter().filter(|s| **s == "down").count() == 2, "two servers are down: {states:?}");
    let (code, text) = read_failure(cluster.petal().args(["disk", "create", "x", "1GiB"]))?;
    ensure!(code == 1 && text.contains("majority"), "the reason is not told: {text}");
    cluster.up(&[])?;
    read(cluster.petal().args(["disk", "create", "y", "1GiB"]))?;
    cluster.down()
}

pub fn ctrl_c_stops_everything(cluster: &Cluster) -> Result<()> {
    let log = std::fs::File::create(cluster.folder().join("foreground"))?;
    let mut up = cluster.petal();
    let mut up = up.args(["up", "--nbd-port", "0"]).stdout(log.try_clone()?).stderr(log).spawn()?;
    let started = Cluster::wait_for("it is up", Duration::from_secs(20), || {
        cluster.status().is_ok_and(|s| s["nbd"]["state"] == "up")
    });
    read(command("kill").args(["-INT", &up.id().to_string()]))?;
    let status = up.wait()?;
    started?;
    ensure!(status.success(), "Ctrl-C is a way to stop, not a failure: {status}");
    ensure!(cluster.processes().is_empty(), "processes are left: {:?}", cluster.processes());
    Ok(())
}

pub fn moved_and_deep_folders(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3", "--disk-size", "2GiB", "--size", "1GiB"])?;
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", "h.pwrite(b'm' * 4096, 4096)"]))?;
    cluster.down()?;
    // Deeper than the address of a unix socket may be long.
    let deep = cluster.folder().join("deep".repeat(30));
    std::fs::create_dir(&deep)?;
    let moved = deep.join("elsewhere");
    std::fs::rename(cluster.data(), &moved)?;
    let petal = |arguments: &[&str]| read(cluster.petal().env("PETAL_CLUSTER", &moved).args(arguments));
    petal(&["up", "--detach"])?;
    let status: serde_json::Value = serde_json::from_str(&petal(&["status", "--json"])?)?;
    let socket = status["nbd"]["socket"].as_str().context("no socket")?;
    let uri = format!("nbd+unix:///vol0?socket={socket}");
    let result = read(nbdsh().args(["-u", &uri, "-c", "assert h.pread(4096, 4096) == b'm' * 4096"]));
    petal(&["down"])?;
    result.map(|_| ())
}

pub fn busy_port(cluster: &Cluster) -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let text = read(cluster.petal().args(["up", "--detach", "--servers", "1", "--nbd-port", &port]))?;
    ensure!(text.contains("--nbd-port") && text.contains(&port), "the busy port is not told: {text}");
    read(command("nbdinfo").arg(cluster.nbd_uri("vol0")?))?;
    cluster.down()?;
    drop(listener);
    let text = read(cluster.petal().args(["up", "--detach"]))?;
    ensure!(text.contains(&format!("nbd://127.0.0.1:{port}/vol0")), "the port is free now: {text}");
    read(command("nbdinfo").arg(format!("nbd://127.0.0.1:{port}/vol0")))?;
    cluster.down()
}

pub fn two_disks_three_copies(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disks-per-server", "2", "--copies", "3", "--size", "1GiB", "--disk-size", "4GiB"])?;
    let uri = cluster.nbd_uri("vol0")?;
    let code = "[h.pwrite(bytes([i]) * 4096, i << 22) for i in range(250)]\n\
                assert all(h.pread(4096, i << 22) == bytes([i]) * 4096 for i in range(250))";
    read(nbdsh().args(["-u", &uri, "-c", code]))?;
    read(cluster.petal().args(["verify"]))?;
    cluster.down()
}

pub fn init_and_join(cluster: &Cluster) -> Result<()> {
    let folder = cluster.folder();
    let port = |n: usize| format!("127.0.0.1:{}", free_port(n));
    let addresses: Vec<String> = (0..4).map(port).collect();
    let disk = |n: usize| folder.join(format!("disk{n}")).display().to_string();
    let config = |n: usize| folder.join(format!("s{n}.toml")).display().to_string();
    let ring = addresses[..3].join(",");
    let first =
        ["init", "--name", "real", "--ring", &ring, "--disk", &disk(1), "--disk-size", "2GiB", "--config", &config(1)]
            .map(String::from);
    let out = read(cluster.petal().args(first).arg("--json"))?;
    let out: serde_json::Value = serde_json::from_str(&out)?;
    let token = out["token"].as_str().context("init printed no join token")?.to_string();
    let mut servers = Servers::default();
    let log = |n: usize| -> Result<std::process::Stdio> {
        Ok(std::fs::File::create(folder.join(format!("server{n}.log")))?.into())
    };
    let start = |servers: &mut Servers, n: usize| -> Result<()> {
        let mut server = cluster.petal();
        server.args(["server", "--config", &config(n)]).stdout(log(n)?).stderr(log(n)?);
        servers.0.push(server.spawn()?);
        Ok(())
    };
    let join = |n: usize| {
        let arguments = [
            "join",
            &token,
            "--listen",
            &addresses[n - 1],
            "--disk",
            &disk(n),
            "--disk-size",
            "2GiB",
            "--config",
            &config(n),
        ]
        .map(String::from);
        read(cluster.petal().args(arguments))
    };
    start(&mut servers, 1)?;
    join(2)?;
    start(&mut servers, 2)?;
    join(3)?;
    start(&mut servers, 3)?;
    join(4)?;
    start(&mut servers, 4)?;
    let at = |arguments: &[&str]| read(cluster.petal().args(["--cluster", &addresses[0]]).args(arguments));
    Cluster::wait_for("four servers are up", Duration::from_secs(20), || {
        let status = at(&["status", "--json"]).ok().and_then(|t| serde_json::from_str::<serde_json::Value>(&t).ok());
        let servers = status.as_ref().and_then(|s| s["servers"].as_array()).cloned().unwrap_or_default();
        servers.len() == 4 && servers.iter().all(|s| s["state"] == "up")
    })?;
    at(&["disk", "create", "d", "1GiB"])?;
    let socket = folder.join("nbd.sock");
    let socket = socket.to_str().context("the folder's name is not text")?;
    let mut nbd = cluster.petal();
    nbd.args(["--cluster", &addresses[0], "nbd", "--socket", socket]).stdout(log(9)?).stderr(log(9)?);
    servers.0.push(nbd.spawn()?);
    Cluster::wait_for("NBD is served", Duration::from_secs(10), || std::path::Path::new(socket).exists())?;
    let uri = format!("nbd+unix:///d?socket={socket}");
    read(nbdsh().args(["-u", &uri, "-c", "h.pwrite(b'a'*9000, 5); assert h.pread(9000, 5) == b'a'*9000"]))?;
    Ok(())
}

/// A ring of three of which one has no data: two copies on two machines, and any one of the three may fail.
pub fn two_machines_and_a_witness(cluster: &Cluster) -> Result<()> {
    let folder = cluster.folder();
    let addresses: Vec<String> = (0..3).map(|n| format!("127.0.0.1:{}", free_port(n))).collect();
    let path = |name: String| folder.join(name).display().to_string();
    let own = |n: usize| -> Vec<String> {
        let mut words = vec!["--disk".into(), path(format!("disk{n}")), "--config".into(), path(format!("s{n}.toml"))];
        words.extend(if n == 3 { vec!["--witness".into()] } else { vec!["--disk-size".into(), "2GiB".into()] });
        words
    };
    let out = read(cluster.petal().args(["init", "--json", "--ring", &addresses.join(",")]).args(own(1)))?;
    let out: serde_json::Value = serde_json::from_str(&out)?;
    let token = out["token"].as_str().context("init printed no join token")?.to_string();
    for n in [2, 3] {
        read(cluster.petal().args(["join", &token, "--listen", &addresses[n - 1]]).args(own(n)))?;
    }
    let log = |n: usize| -> Result<std::process::Stdio> {
        Ok(std::fs::OpenOptions::new().create(true).append(true).open(folder.join(format!("server{n}.log")))?.into())
    };
    let start = |n: usize| -> Result<std::process::Child> {
        let mut server = cluster.petal();
        server.args(["server", "--config", &path(format!("s{n}.toml"))]).stdout(log(n)?).stderr(log(n)?);
        Ok(server.spawn()?)
    };
    let mut servers = Servers((1..=3).map(start).collect::<Result<_>>()?);
    let at = |arguments: &[&str]| read(cluster.petal().args(["--cluster", &addresses.join(",")]).args(arguments));
    let status = || -> Result<serde_json::Value> { Ok(serde_json::from_str(&at(&["status", "--json"])?)?) };
    let all = |state: &str| {
        let state = state.to_string();
        Cluster::wait_for("all three serve, with all data on two copies", Duration::from_secs(30), || {
            status().is_ok_and(|s| {
                let servers = s["servers"].as_array().cloned().unwrap_or_default();
                servers.len() == 3 && servers.iter().all(|s| s["state"] == state) && s["redundancy"]["full"] == true
            })
        })
    };
    Cluster::wait_for("three servers are up", Duration::from_secs(20), || {
        status().is_ok_and(|s| {
            s["servers"].as_array().is_some_and(|all| all.len() == 3 && all.iter().all(|s| s["state"] == "up"))
        })
    })?;
    at(&["disk", "create", "d", "1GiB"])?;
    let three = cluster
        .petal()
        .args(["--cluster", &addresses[0], "disk", "create", "three", "1GiB", "--copies", "3"])
        .output()?;
    ensure!(!three.status.success(), "three copies need three servers with room");
    let socket = path("nbd.sock".into());
    let mut nbd = cluster.petal();
    nbd.args(["--cluster", &addresses.join(","), "nbd", "--socket", &socket]).stdout(log(9)?).stderr(log(9)?);
    servers.0.push(nbd.spawn()?);
    Cluster::wait_for("NBD is served", Duration::from_secs(10), || std::path::Path::new(&socket).exists())?;
    let uri = format!("nbd+unix:///d?socket={socket}");
    for victim in [2, 3, 1] {
        let child = &mut servers.0[victim - 1];
        child.kill()?;
        child.wait()?;
        let code = format!("[h.pwrite(b'{victim}' * 65536, i << 20) for i in range(64)]");
        read(nbdsh().args(["-u", &uri, "-c", &code]))?;
        servers.0[victim - 1] = start(victim)?;
        all("up")?;
    }
    let status = status()?;
    let witness =
        status["servers"].as_array().into_iter().flatten().find(|s| s["id"] == "s3").cloned().context("s3")?;
    ensure!(witness["witness"] == true && witness["slots_acting"] == 0, "it votes and has no data: {witness}");
    let code = "assert all(h.pread(65536, i << 20) == b'1' * 65536 for i in range(64)), 'a write is lost'";
    read(nbdsh().args(["-u", &uri, "-c", code]))?;
    at(&["verify"])?;
    Ok(())
}

/// Servers of a scenario; ended with it.
#[derive(Default)]
struct Servers(Vec<std::process::Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.0 {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// A TCP port that was free a moment ago.
fn free_port(_: usize) -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_or(0, |a| a.port())
}
