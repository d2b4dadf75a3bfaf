//! NBD clients that mean well, and some that do not.

use crate::cluster::Cluster;
use crate::run::{command, nbdsh, read};
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Seconds of the verified load; the "must show" asks for 60 (`PETAL_E2E_SECONDS=60`).
const FIO_SECONDS: &str = "10";

pub fn fio_verifies(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    let seconds = std::env::var("PETAL_E2E_SECONDS").unwrap_or(FIO_SECONDS.into());
    let mut fio = command("fio");
    fio.args(["--ioengine=nbd", "--rw=randrw", "--bsrange=512-1m", "--bs_unaligned=0", "--blockalign=512"]);
    fio.args(["--iodepth=32", "--size=1g", "--time_based", "--verify=crc32c", "--verify_backlog=256"]);
    fio.args(["--verify_fatal=1", "--randrepeat=0", "--serialize_overlap=1"]);
    fio.args([format!("--runtime={seconds}"), format!("--uri={uri}")]);
    fio.args(["--name=first", "--offset=0", "--name=second", "--offset=2g"]);
    read(&mut fio)?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn illegal_requests(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    legal_commands(&uri)?;
    let script = "\
import nbd
h.set_strict_mode(0)
size = h.get_size()
def refused(what, f):
    try:
        f()
    except nbd.Error as e:
        return
    raise SystemExit(what + ' was not refused')
refused('read beyond the end', lambda: h.pread(4096, size))
refused('write beyond the end', lambda: h.pwrite(b'x' * 4096, size - 512))
refused('trim beyond the end', lambda: h.trim(4096, size))
refused('zero beyond the end', lambda: h.zero(4096, size - 1))
assert h.pread(512, 0) is not None
";
    read(nbdsh().args(["-u", &uri, "-c", script]))?;
    let unknown = crate::run::read_failure(command("nbdinfo").arg(uri.replace("/vol0?", "/nothing?")))?;
    ensure!(!unknown.1.is_empty(), "an unknown export must be refused with words");

    let socket = uri.split("socket=").nth(1).context("no socket in the URI")?;
    let harmless = |bytes: &[u8]| -> Result<()> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 16).read_to_end(&mut answer);
        read(nbdsh().args(["-u", &uri, "-c", "h.pread(512, 0)"]))?;
        Ok(())
    };
    harmless(b"GET / HTTP/1.0\r\n\r\n")?;
    harmless(&[0xff; 4096])?;
    let mut options = Vec::from(3u32.to_be_bytes());
    options.extend(b"IHAVEOPT");
    harmless(&[options.as_slice(), &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat())?; // huge option
    harmless(
        &[options.as_slice(), &1u32.to_be_bytes(), &4u32.to_be_bytes(), b"vol0", b"bad magic, not a request.."]
            .concat(),
    )?;
    harmless(&[options.as_slice(), &1u32.to_be_bytes(), &4u32.to_be_bytes(), b"vo"].concat())?; // half an option
    legal_commands(&uri)?;
    cluster.down()
}

/// Every command that the front end offers, once.
fn legal_commands(uri: &str) -> Result<()> {
    let script = "\
import nbd
data = bytes(range(256)) * 64
h.pwrite(data, 1 << 20)
assert h.pread(len(data), 1 << 20) == data
h.pwrite(data, 3 << 20, nbd.CMD_FLAG_FUA)
h.flush()
h.zero(4096, 1 << 20)
assert h.pread(8192, 1 << 20) == bytes(4096) + data[4096:8192]
h.zero(4096, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, 3 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 1 << 20)
h.cache(65536, 1 << 20)
h.pwrite(b'z' * 777, (5 << 20) + 33)
assert h.pread(779, (5 << 20) + 32)[1:778] == b'z' * 777
";
    read(nbdsh().args(["-u", uri, "-c", script]))?;
    let extents = "\
import nbd
h = nbd.NBD()
h.add_meta_context('base:allocation')
h.connect_uri(URI)
h.pwrite(b'q' * 4096, 7 << 20)
seen = []
h.block_status(16 << 20, 0, lambda context, offset, entries, error: seen.append(entries))
assert seen and sum(seen[0][::2]) > 0, seen
"
    .replace("URI", &format!("'{uri}'"));
    read(nbdsh().args(["-n", "-c", &extents]))?;
    Ok(())
}

pub fn idle_connections(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = cluster.nbd_uri("vol0")?;
    let nbd = uri.split("socket=").nth(1).context("no socket in the URI")?.to_string();
    let status = cluster.status()?;
    let server = status["servers"][0]["address"].as_str().context("no address")?;
    let server = server.strip_prefix("unix:").map(String::from);
    let mut idle = Vec::new();
    for socket in [Some(nbd), server].into_iter().flatten() {
        for _ in 0..2000 {
            // Refusing some of them is fine; falling over is not.
            if let Ok(stream) = UnixStream::connect(&socket) {
                idle.push(stream);
            }
        }
    }
    println!("{} idle connections", idle.len());
    drop(idle.split_off(idle.len() / 2));
    read(cluster.petal().args(["status"]))?;
    drop(idle);
    legal_commands(&uri)?;
    cluster.down()
}
