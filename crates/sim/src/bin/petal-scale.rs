//! `petal-scale SERVERS DISKS`: what a large cluster's global state costs. `cargo xtask bench-scale` calls it.

use petal::global_state::Command;
use petal::ids::{ServerId, VdiskId};
use petal::limits::{FRAME_BODY_MAX, HEARTBEAT};
use petal::mover::next_step;
use petal_sim::scale::{RING, Scale};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let numbers: Vec<u32> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let [servers @ 4..=1024, disks @ 1..=100_000] = numbers[..] else {
        eprintln!("petal-scale SERVERS DISKS: 4 to 1,024 servers, 1 to 100,000 disks");
        return ExitCode::from(2);
    };
    measure(servers as u16, disks);
    ExitCode::SUCCESS
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let done = work();
    (done, begun.elapsed())
}

fn row(what: &str, value: impl std::fmt::Display) {
    println!("| {what} | {value} |");
}

fn millis(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

fn measure(servers: u16, disks: u32) {
    println!("| {servers} servers, {disks} disks of two copies, a ring of {RING} | |\n|---|---:|");
    let mut scale = Scale::with_servers(servers);
    let ((), first) = timed(|| scale.add_disks(1));
    row("first disk: the map is planned and made", millis(first));
    let ((), others) = timed(|| scale.add_disks(disks - 1));
    row("one disk more, mean", millis(others / disks.max(2)));
    let slots = scale.state.gmaps[&scale.gmap()].slots.len();
    row("slots", slots);

    let (asks, answer) = scale.heartbeat_bytes();
    let rate = 1.0 / HEARTBEAT.as_secs_f64();
    row("heartbeat and its answer", format!("{asks} B and {answer} B"));
    let of_one = |bytes: usize| bytes as f64 * rate * f64::from(RING);
    row("a server sends, is sent", format!("{:.0} B/s, {:.0} B/s", of_one(asks), of_one(answer)));
    let of_ring = |bytes: usize| bytes as f64 * rate * f64::from(servers - 1) / 1000.0;
    row("a member of the ring is sent, sends", format!("{:.0} kB/s, {:.0} kB/s", of_ring(asks), of_ring(answer)));

    let (bytes, encoding) = timed(|| scale.encode());
    let percent = bytes.len() * 100 / FRAME_BODY_MAX;
    row("encoded state", format!("{:.2} MB ({percent} % of a frame)", bytes.len() as f64 / 1e6));
    row("encode", millis(encoding));
    let (decoded, decoding) = timed(|| Scale::decode(&bytes));
    row("decode, checks included", millis(decoding));
    assert!(decoded.is_ok_and(|state| state == scale.state), "it is another state");
    let (copy, copying) = timed(|| scale.state.clone());
    row("clone", millis(copying));
    drop(copy);

    let vdisk: VdiskId = *scale.state.vdisks.keys().next().expect("there is one");
    let (effects, attaching) = timed(|| scale.attach(vdisk));
    row("attach a disk: apply", millis(attaching));
    row("attach a disk: servers that settle it", effects.concerned.len());
    let (_, hints) = timed(|| scale.state.hints(vdisk));
    row("what a client is told of a disk", millis(hints));
    let (_, idle) = timed(|| next_step(&scale.state, scale.gmap()));
    row("the mover looks, nothing to do", millis(idle));

    let lost = ServerId(servers / 2);
    let (effects, losing) = timed(|| scale.lose(lost));
    row("one server is lost: Suspect and ServerDown", millis(losing));
    row("slots that get a new term", effects.slots.len());
    let (plan, planning) = timed(|| scale.plan_without(lost));
    row("Drain, and a plan without it", millis(planning));
    let moves = match &plan {
        Command::Reconfigure { moves, .. } => moves.len(),
        _ => 0,
    };
    row("slots that are to move", moves);
    let (result, applying) = timed(|| scale.run(plan).0);
    assert!(result.is_ok(), "{result:?}");
    row("apply the plan", millis(applying));
    let (fence, looking) = timed(|| next_step(&scale.state, scale.gmap()));
    row("the mover looks, and fences", millis(looking));
    let (result, applying) = timed(|| scale.run(fence.expect("something is to be fenced")).0);
    assert!(result.is_ok(), "{result:?}");
    row("apply that", millis(applying));
    let (complaint, checking) = timed(|| scale.state.complaint());
    assert_eq!(complaint, None);
    row("all checks of the state", millis(checking));
    row("memory of the process", resident());
}

/// As the kernel tells it.
fn resident() -> String {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    let kib: u64 = line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    format!("{} MiB", kib / 1024)
}
