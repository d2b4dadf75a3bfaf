//! Measures disks: what makes a pair of writes durable cheapest (`raw`), and what the engine makes of
//! it (`engine`). The numbers stand in docs/performance.md, "Disk engine".
//!
//! ```text
//! disk_bench raw FILE MODE DEPTH DATA_BYTES SECONDS     pairs (data + 4 KiB record) without the engine
//!     MODE: dsync | osync | drain | link | grouped | one-dsync | one-grouped | unsafe
//! disk_bench engine FILE KIND DEPTH DATA_BYTES SECONDS  the same pairs through the engine
//!     KIND: uring | uring-each | threads
//! disk_bench read FILE KIND DEPTH BYTES SECONDS         random reads through the engine
//! disk_bench extend FILE KIND DEPTH DATA_BYTES SECONDS  pairs while the file grows all the time
//! disk_bench pmap FILE KIND 1 CHANGES SECONDS           commits of CHANGES random rows of 200 bytes
//! ```
//!
//! FILE is made (1 GiB, written) if it does not exist. CPU is counted twice: of this process with its
//! kernel workers, and of the whole machine per operation (which includes interrupts and the kernel's
//! own threads: only meaningful when nothing else runs).

#![allow(unsafe_code, missing_docs)]

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue::Flags, types};
use petal::store::{DiskCommand, DiskResult, Table};
use petal_io::disk::{
    BufferPool, DirectIo, Durability, Engine, EngineDisk, EngineKind, EngineOptions, Format, format_disk, open_disk,
};
use petal_io::engine::DiskEngine;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 1 << 30;
const PMAP: std::ops::Range<u64> = 2 * MIB..256 * MIB;
const JOURNAL: std::ops::Range<u64> = 256 * MIB..320 * MIB;

struct Arguments {
    path: String,
    mode: String,
    depth: usize,
    bytes: u64,
    time: Duration,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [command, path, mode, depth, bytes, seconds] = words.as_slice() else {
        eprintln!("usage: disk_bench raw|engine|read|extend FILE MODE DEPTH BYTES SECONDS (see the source)");
        std::process::exit(2);
    };
    let arguments = Arguments {
        path: path.clone(),
        mode: mode.clone(),
        depth: depth.parse().expect("DEPTH"),
        bytes: bytes.parse().expect("BYTES"),
        time: Duration::from_secs_f64(seconds.parse().expect("SECONDS")),
    };
    make_disk(Path::new(path));
    let start = Cost::now();
    let mut latencies = match command.as_str() {
        "raw" => raw(&arguments),
        "engine" => engine(&arguments, false, false),
        "read" => engine(&arguments, true, false),
        "extend" => engine(&arguments, false, true),
        "pmap" => pmap(&arguments),
        other => panic!("no command {other}"),
    };
    latencies.sort();
    let percentile = |p: usize| latencies[(latencies.len() - 1) * p / 100].as_nanos() as f64 / 1e3;
    print!("{command:6} {mode:12} depth {depth:>2} bytes {bytes:>6}: ");
    start.print(latencies.len());
    println!("  p50 {:6.0} us  p99 {:6.0} us", percentile(50), percentile(99));
}

#[allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]
fn make_disk(path: &Path) {
    if !path.exists() {
        let all = [0..SIZE];
        let format =
            Format { size: SIZE, zeroed: &all, pmap: PMAP, writes: &[], force: false, direct: DirectIo::WherePossible };
        format_disk(path, &format).expect("a new disk");
    }
}

/// Where the next pair goes: data and record each run through their range.
struct Places {
    data: u64,
    record: u64,
}

impl Places {
    fn next(&mut self, bytes: u64) -> (u64, u64) {
        self.data = if self.data + bytes > SIZE { JOURNAL.end } else { self.data };
        self.record = if self.record + 4096 > JOURNAL.end { JOURNAL.start } else { self.record };
        let places = (self.data, self.record);
        (self.data, self.record) = (self.data + bytes, self.record + 4096);
        places
    }
}

const PLACES: Places = Places { data: JOURNAL.end, record: JOURNAL.start };

// ------------------------------------------------------------------------------------------------
// Without the engine.

fn raw(arguments: &Arguments) -> Vec<Duration> {
    let extra = if arguments.mode == "osync" { libc::O_DSYNC } else { 0 };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | extra)
        .open(&arguments.path)
        .expect("the file");
    let fd = types::Fd(file.as_raw_fd());
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun();
    let mut ring: IoUring = builder.build(256).expect("a ring");
    let mode = arguments.mode.as_str();
    let flags = if mode.ends_with("dsync") { libc::RWF_DSYNC } else { 0 };
    let (one, grouped) = (mode.starts_with("one-"), mode.ends_with("grouped"));
    let pool = BufferPool::new();
    let length = arguments.bytes as usize + 4096;
    let mut buffers: Vec<_> = (0..arguments.depth).map(|_| pool.take(length)).collect();
    let mut free: Vec<usize> = (0..arguments.depth).collect();
    let mut left = vec![0; arguments.depth];
    let mut begun = vec![Instant::now(); arguments.depth];
    let (mut ended, mut covered, mut latencies): (Vec<usize>, Vec<usize>, Vec<Duration>) = Default::default();
    let (mut syncing, mut in_flight, mut places) = (false, 0, PLACES);
    let start = Instant::now();
    loop {
        while start.elapsed() < arguments.time
            && let Some(slot) = free.pop()
        {
            (in_flight, begun[slot]) = (in_flight + 1, Instant::now());
            let (data, record) = places.next(if one { length as u64 } else { arguments.bytes });
            let at = buffers[slot].as_mut_ptr();
            let write = |at, length: u64, offset| {
                opcode::Write::new(fd, at, length as u32).offset(offset).rw_flags(flags).build().user_data(slot as u64)
            };
            let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build().user_data(slot as u64);
            let mut entries = if one {
                vec![write(at, length as u64, data)]
            } else {
                // SAFETY: the buffer holds the data and 4 KiB behind them.
                vec![write(at, arguments.bytes, data), write(unsafe { at.add(length - 4096) }, 4096, record)]
            };
            match mode {
                "drain" => entries.push(sync.flags(Flags::IO_DRAIN)),
                "link" => {
                    entries = entries.into_iter().map(|entry| entry.flags(Flags::IO_LINK)).collect();
                    entries.push(sync);
                }
                _ => {}
            }
            left[slot] = entries.len();
            // SAFETY: the buffers live until the loop has seen the end of everything in flight.
            unsafe { ring.submission().push_multiple(&entries).expect("room in the ring") };
        }
        if in_flight == 0 {
            return latencies;
        }
        ring.submit_and_wait(1).expect("the ring");
        for entry in ring.completion().map(|entry| (entry.user_data(), entry.result())).collect::<Vec<_>>() {
            assert!(entry.1 >= 0, "{}", std::io::Error::from_raw_os_error(-entry.1));
            let done = if entry.0 == u64::MAX {
                syncing = false;
                std::mem::take(&mut covered)
            } else {
                let slot = entry.0 as usize;
                left[slot] -= 1;
                match left[slot] {
                    0 if grouped => {
                        ended.push(slot);
                        vec![]
                    }
                    0 => vec![slot],
                    _ => vec![],
                }
            };
            for slot in done {
                latencies.push(begun[slot].elapsed());
                free.push(slot);
                in_flight -= 1;
            }
        }
        if !syncing && !ended.is_empty() {
            (syncing, covered) = (true, std::mem::take(&mut ended));
            let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build().user_data(u64::MAX);
            // SAFETY: a sync has no buffer.
            unsafe { ring.submission().push(&sync).expect("room in the ring") };
        }
    }
}

// ------------------------------------------------------------------------------------------------
// With the engine, on a reactor as in a server.

fn engine(arguments: &Arguments, read: bool, extend: bool) -> Vec<Duration> {
    let (kind, durability) = match arguments.mode.as_str() {
        "uring" => (EngineKind::Uring, Durability::Grouped),
        "uring-each" => (EngineKind::Uring, Durability::PerWrite),
        "threads" => (EngineKind::Threads, Durability::Grouped),
        other => panic!("no engine {other}"),
    };
    let found = open_disk(Path::new(&arguments.path), DirectIo::WherePossible).expect("the disk");
    let disk = EngineDisk { file: found.file, pmap: PMAP };
    let options = EngineOptions { kind, durability, ..EngineOptions::default() };
    let mut engine = Engine::start(vec![disk], &options).expect("the engine");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let data = Bytes::from(vec![0x5a; arguments.bytes as usize]);
    let record = data.slice(..4096);
    let (mut next_op, mut places, mut latencies, mut answers) = (0u64, PLACES, Vec::new(), Vec::new());
    let mut pairs: BTreeMap<u64, (u32, Instant)> = BTreeMap::new();
    let mut random = stdx::Prng::new(1);
    let (mut frontier, start) = (SIZE, Instant::now());
    const EXTEND: u64 = u64::MAX;
    if extend {
        engine.submit(0, EXTEND, DiskCommand::Extend { to: frontier, hurry: false });
    }
    runtime.block_on(async {
        loop {
            while pairs.len() < arguments.depth && start.elapsed() < arguments.time {
                next_op += 1;
                if read {
                    let offset = JOURNAL.end + random.below((SIZE - JOURNAL.end) / arguments.bytes) * arguments.bytes;
                    engine.submit(0, next_op * 2, DiskCommand::Read { offset, length: arguments.bytes });
                } else {
                    let (at, record_at) = places.next(arguments.bytes);
                    let write = |offset, bytes: &Bytes| DiskCommand::Write { offset, pieces: vec![bytes.clone()] };
                    engine.submit(0, next_op * 2, write(at, &data));
                    engine.submit(0, next_op * 2 + 1, write(record_at, &record));
                }
                pairs.insert(next_op, (if read { 1 } else { 2 }, Instant::now()));
            }
            if pairs.is_empty() {
                return;
            }
            engine.flush();
            engine.ready().await;
            engine.completions(&mut answers);
            for (_, op, result) in answers.drain(..) {
                assert!(matches!(
                    result,
                    DiskResult::Read(Ok(_)) | DiskResult::Written(Ok(())) | DiskResult::Extended(Ok(()))
                ));
                if op == EXTEND {
                    frontier = if frontier > 4 * SIZE { frontier } else { frontier + 64 * MIB };
                    engine.submit(0, EXTEND, DiskCommand::Extend { to: frontier, hurry: false });
                    continue;
                }
                let pair = pairs.get_mut(&(op / 2)).expect("an answer for what was asked");
                pair.0 -= 1;
                if pair.0 == 0 {
                    latencies.push(pair.1.elapsed());
                    pairs.remove(&(op / 2));
                }
            }
        }
    });
    drop(engine);
    if extend {
        println!("grew by {} MiB in {:?}", (frontier - SIZE) / MIB, start.elapsed());
        std::fs::OpenOptions::new().write(true).open(&arguments.path).and_then(|f| f.set_len(SIZE)).expect("shrunk");
    }
    latencies
}

fn pmap(arguments: &Arguments) -> Vec<Duration> {
    let found = open_disk(Path::new(&arguments.path), DirectIo::WherePossible).expect("the disk");
    let disk = EngineDisk { file: found.file, pmap: PMAP };
    let mut engine = Engine::start(vec![disk], &EngineOptions::default()).expect("the engine");
    let (mut random, start, mut latencies) = (stdx::Prng::new(1), Instant::now(), Vec::new());
    let (mut answers, mut gets) = (Vec::new(), Vec::new());
    let key = |random: &mut stdx::Prng| Bytes::from(random.below(100_000).to_be_bytes().to_vec());
    let mut run = |command| {
        let begun = Instant::now();
        engine.submit(0, 1, command);
        while answers.is_empty() {
            engine.wait();
            engine.completions(&mut answers);
        }
        let (_, _, result) = answers.remove(0);
        assert!(matches!(result, DiskResult::PmapCommitted(Ok(())) | DiskResult::PmapValue(Ok(_))), "{result:?}");
        begun.elapsed()
    };
    while start.elapsed() < arguments.time {
        let value = Bytes::from(vec![7; 200]);
        let changes = (0..arguments.bytes).map(|_| (Table::Rows, key(&mut random), Some(value.clone()))).collect();
        latencies.push(run(DiskCommand::PmapCommit { changes }));
        gets.push(run(DiskCommand::PmapGet { table: Table::Rows, key: key(&mut random) }));
    }
    gets.sort();
    println!("get beside it: p50 {:?} p99 {:?}", gets[gets.len() / 2], gets[gets.len() * 99 / 100]);
    latencies
}

// ------------------------------------------------------------------------------------------------

struct Cost {
    begun: Instant,
    user: f64,
    system: f64,
    machine: f64,
}

impl Cost {
    fn now() -> Cost {
        // SAFETY: zeroes are a valid `rusage`, which the call overwrites.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &mut usage);
            usage
        };
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks: Vec<f64> =
            stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
        // user, nice, system, (idle, iowait,) irq, softirq
        let machine = [0, 1, 2, 5, 6].iter().filter_map(|field| ticks.get(*field)).sum::<f64>() / 100.0;
        Cost { begun: Instant::now(), user: seconds(usage.ru_utime), system: seconds(usage.ru_stime), machine }
    }

    fn print(&self, count: usize) {
        let (now, count) = (Cost::now(), count as f64);
        let each = |seconds: f64| seconds * 1e6 / count;
        print!(
            "{:6.0}/s  process {:5.1} us ({:4.1} user)  machine {:5.1} us",
            count / self.begun.elapsed().as_secs_f64(),
            each(now.user + now.system - self.user - self.system),
            each(now.user - self.user),
            each(now.machine - self.machine)
        );
    }
}
