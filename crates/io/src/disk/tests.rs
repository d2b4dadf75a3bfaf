//! The same tests for both engines, on files of the machine's temporary directory.

use super::*;
use bytes::Bytes;
use petal::store::{DiskResult, Table};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use stdx::Prng;

const MIB: u64 = 1 << 20;
const PMAP: Range<u64> = MIB..9 * MIB;
/// Where the tests write: behind the PMap store.
const DATA: u64 = 9 * MIB;

/// An engine over disks in a directory of its own, driven without a reactor.
struct Bench {
    engine: Engine,
    paths: Vec<std::path::PathBuf>,
    next_op: OpId,
    _directory: tempfile::TempDir,
}

fn all_engines(test: impl Fn(EngineOptions)) {
    for kind in [EngineKind::Uring, EngineKind::Threads] {
        for durability in [Durability::Grouped, Durability::PerWrite] {
            test(EngineOptions { kind, durability, ..EngineOptions::default() });
        }
    }
}

fn format(path: &Path) {
    let format = Format {
        size: 1 << 30,
        zeroed: &[0..MIB, DATA..DATA + MIB],
        pmap: PMAP,
        writes: &[],
        force: false,
        direct: DirectIo::WherePossible,
    };
    format_disk(path, &format).unwrap();
}

fn engine_disk(path: &Path, direct: DirectIo) -> EngineDisk {
    EngineDisk { file: open_disk(path, direct).unwrap().file, pmap: PMAP }
}

impl Bench {
    fn new(disks: usize, options: &EngineOptions, direct: DirectIo) -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..disks).map(|disk| directory.path().join(format!("disk{disk}"))).collect();
        paths.iter().for_each(|path| format(path));
        let engine = Bench::start(&paths, options, direct);
        Bench { engine, paths, next_op: 0, _directory: directory }
    }

    fn start(paths: &[std::path::PathBuf], options: &EngineOptions, direct: DirectIo) -> Engine {
        let disks = paths.iter().map(|path| engine_disk(path, direct)).collect();
        Engine::start(disks, options).unwrap()
    }

    fn submit(&mut self, disk: usize, command: DiskCommand) -> OpId {
        self.next_op += 1;
        self.engine.submit(disk, self.next_op, command);
        self.next_op
    }

    /// Waits for `count` answers.
    fn collect(&mut self, count: usize) -> BTreeMap<OpId, (usize, DiskResult)> {
        self.engine.flush();
        let (mut out, mut answers) = (Vec::new(), BTreeMap::new());
        loop {
            self.engine.completions(&mut out);
            for (disk, op, result) in out.drain(..) {
                assert!(answers.insert(op, (disk, result)).is_none(), "operation {op} was answered twice");
            }
            if answers.len() >= count {
                assert_eq!(answers.len(), count, "more answers than commands");
                return answers;
            }
            self.engine.wait();
        }
    }

    fn run(&mut self, disk: usize, command: DiskCommand) -> DiskResult {
        let op = self.submit(disk, command);
        let (from, result) = self.collect(1).remove(&op).unwrap();
        assert_eq!(from, disk);
        result
    }

    fn read(&mut self, offset: u64, length: u64) -> Bytes {
        match self.run(0, DiskCommand::Read { offset, length }) {
            DiskResult::Read(Ok(bytes)) => bytes,
            other => panic!("{other:?}"),
        }
    }
}

fn write(offset: u64, pieces: Vec<Bytes>) -> DiskCommand {
    DiskCommand::Write { offset, pieces }
}

#[test]
fn pieces_of_any_alignment_are_written_one_behind_the_other() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        let all = Bytes::from((0..8193u32 + 4095).map(|i| i as u8).collect::<Vec<u8>>());
        let pieces = vec![all.slice(..1), all.slice(1..4097), all.slice(4097..4097), all.slice(4097..)];
        assert_eq!(bench.run(0, write(DATA, pieces)), DiskResult::Written(Ok(())));
        assert_eq!(bench.read(DATA, 12288), all);
        assert_eq!(bench.read(DATA + 4096, 4096), all.slice(4096..8192));
    });
}

#[test]
fn reads_behind_the_end_are_zeros() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        bench.run(0, write(DATA + MIB - 4096, vec![Bytes::from(vec![3; 4096])]));
        let bytes = bench.read(DATA + MIB - 4096, 65536);
        assert_eq!(&bytes[..4096], &[3; 4096]);
        assert_eq!(&bytes[4096..], &[0; 61440]);
        drop(bytes);
        assert_eq!(bench.read(500 * MIB, 8192), vec![0; 8192], "far behind, in a buffer that was used before");
    });
}

#[test]
fn a_file_that_ends_inside_of_a_block_reads_up_to_there() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        bench.run(0, write(DATA, vec![Bytes::from(vec![3; 8192])]));
        let file = std::fs::OpenOptions::new().write(true).open(&bench.paths[0]).unwrap();
        file.set_len(DATA + 5000).unwrap();
        let bytes = bench.read(DATA, 12288);
        assert_eq!(&bytes[..5000], &[3; 5000]);
        assert_eq!(&bytes[5000..], &[0; 7288]);
    });
}

/// Random reads and writes, many at a time, against a model; overlapping ones are never in flight
/// together, as the store sees to it.
#[test]
fn random_operations_do_what_a_model_does() {
    all_engines(|options| {
        for direct in [DirectIo::WherePossible, DirectIo::Never] {
            let mut bench = Bench::new(2, &options, direct);
            let mut random = Prng::new(7);
            let blocks = 600usize;
            let mut models = vec![vec![0u8; blocks]; 2];
            for _ in 0..20 {
                random_round(&mut bench, &mut random, &mut models, blocks);
            }
            for (disk, model) in models.iter().enumerate() {
                check_reopened(&mut bench, disk, model, &options, direct);
            }
        }
    });
}

fn random_round(bench: &mut Bench, random: &mut Prng, models: &mut [Vec<u8>], blocks: usize) {
    let mut expected = BTreeMap::new();
    let mut touched = vec![vec![false; blocks]; models.len()];
    for _ in 0..random.between(1, 700) {
        let (disk, first) = (random.below(models.len() as u64) as usize, random.below(blocks as u64) as usize);
        let count = random.between(1, 32).min((blocks - first) as u64) as usize;
        if touched[disk][first..first + count].contains(&true) {
            continue;
        }
        touched[disk][first..first + count].fill(true);
        let (offset, length) = (DATA + first as u64 * 4096, count as u64 * 4096);
        if random.chance(1, 2) {
            let value = random.next_u64() as u8;
            models[disk][first..first + count].fill(value);
            let pieces = (0..count).map(|_| Bytes::from(vec![value; 4096])).collect();
            let op = bench.submit(disk, write(offset, pieces));
            expected.insert(op, (disk, DiskResult::Written(Ok(()))));
        } else {
            let op = bench.submit(disk, DiskCommand::Read { offset, length });
            let bytes = models[disk][first..first + count].iter().flat_map(|value| [*value; 4096]).collect::<Vec<u8>>();
            expected.insert(op, (disk, DiskResult::Read(Ok(Bytes::from(bytes)))));
        }
    }
    let got = bench.collect(expected.len());
    assert!(got == expected, "some answer differs");
}

fn check_reopened(bench: &mut Bench, disk: usize, model: &[u8], options: &EngineOptions, direct: DirectIo) {
    let none = Engine::start(Vec::new(), options).unwrap();
    drop(std::mem::replace(&mut bench.engine, none));
    bench.engine = Bench::start(&bench.paths, options, direct);
    let op = bench.submit(disk, DiskCommand::Read { offset: DATA, length: model.len() as u64 * 4096 });
    let (_, result) = bench.collect(1).remove(&op).unwrap();
    let DiskResult::Read(Ok(bytes)) = result else { panic!("{result:?}") };
    assert!(bytes.chunks(4096).zip(model).all(|(block, value)| block.iter().all(|byte| byte == value)));
}

#[test]
fn large_operations_and_full_queues_work() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        let big = Bytes::from((0..(9 * MIB)).map(|i| (i / 4096) as u8).collect::<Vec<u8>>());
        bench.run(0, write(DATA, vec![big.clone()]));
        let ops: Vec<(OpId, u64)> = (0..2000)
            .map(|i| (i * 37 % 2304) * 4096)
            .map(|at| (bench.submit(0, DiskCommand::Read { offset: DATA + at, length: 4096 }), at))
            .collect();
        let got = bench.collect(ops.len());
        for (op, at) in ops {
            assert_eq!(got[&op].1, DiskResult::Read(Ok(big.slice(at as usize..at as usize + 4096))));
        }
        assert_eq!(bench.read(DATA, 9 * MIB), big);
    });
}

#[test]
fn extending_makes_the_file_longer_and_keeps_what_is_there() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        bench.run(0, write(DATA, vec![Bytes::from(vec![5; 4096])]));
        assert_eq!(
            bench.run(0, DiskCommand::Extend { to: DATA + 8 * MIB, hurry: false }),
            DiskResult::Extended(Ok(()))
        );
        assert_eq!(std::fs::metadata(&bench.paths[0]).unwrap().len(), DATA + 8 * MIB);
        // A frontier that was reached before is fine.
        assert_eq!(bench.run(0, DiskCommand::Extend { to: DATA + MIB, hurry: false }), DiskResult::Extended(Ok(())));
        assert_eq!(bench.read(DATA, 4096), vec![5; 4096]);
        assert_eq!(bench.read(DATA + 8 * MIB - 4096, 4096), vec![0; 4096]);
        // In a hurry nothing is written: what is there reads as zeros, and can be written.
        assert_eq!(
            bench.run(0, DiskCommand::Extend { to: DATA + 256 * MIB, hurry: true }),
            DiskResult::Extended(Ok(()))
        );
        assert_eq!(bench.read(DATA + 256 * MIB - 4096, 4096), vec![0; 4096]);
        bench.run(0, write(DATA + 128 * MIB, vec![Bytes::from(vec![6; 4096])]));
        assert_eq!(bench.read(DATA + 128 * MIB, 4096), vec![6; 4096]);
        assert_eq!(bench.read(DATA + 128 * MIB + 4096, 4096), vec![0; 4096]);
    });
}

#[test]
fn a_full_file_system_is_told_and_what_was_taken_is_given_back() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        let length = std::fs::metadata(&bench.paths[0]).unwrap().len();
        // 1 EiB: more than any file system here has, less than a file may be.
        let result = bench.run(0, DiskCommand::Extend { to: 1 << 60, hurry: false });
        assert!(matches!(&result, DiskResult::Extended(Err(_))), "{result:?}");
        assert_eq!(std::fs::metadata(&bench.paths[0]).unwrap().len(), length);
        assert_eq!(bench.run(0, write(DATA, vec![Bytes::from(vec![5; 4096])])), DiskResult::Written(Ok(())));
    });
}

#[test]
fn an_error_of_the_disk_is_an_answer() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        // Offsets that no file system takes.
        let far = i64::MAX as u64 / 4096 * 4096;
        let result = bench.run(0, write(far - 4096, vec![Bytes::from(vec![5; 8192])]));
        assert!(matches!(result, DiskResult::Written(Err(DiskError::Io(_)))), "{result:?}");
        let result = bench.run(0, write(DATA, vec![Bytes::from(vec![5; 8192])]));
        assert_eq!(result, DiskResult::Written(Ok(())), "the disk goes on");
    });
}

#[test]
fn the_pmap_store_answers_beside_reads_and_writes() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        let key = |i: u64| Bytes::from(i.to_be_bytes().to_vec());
        let changes = (0..100).map(|i| (Table::Rows, key(i), Some(key(i * i)))).collect();
        let commit = bench.submit(0, DiskCommand::PmapCommit { changes });
        let get = bench.submit(0, DiskCommand::PmapGet { table: Table::Rows, key: key(7) });
        let missing = bench.submit(0, DiskCommand::PmapGet { table: Table::Heads, key: key(7) });
        let written = bench.submit(0, write(DATA, vec![Bytes::from(vec![5; 4096])]));
        let got = bench.collect(4);
        assert_eq!(got[&commit].1, DiskResult::PmapCommitted(Ok(())));
        assert_eq!(got[&get].1, DiskResult::PmapValue(Ok(Some(key(49)))));
        assert_eq!(got[&missing].1, DiskResult::PmapValue(Ok(None)));
        assert_eq!(got[&written].1, DiskResult::Written(Ok(())));
    });
}

#[test]
fn a_disk_without_a_pmap_store_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![1; 9 << 20]).unwrap();
    let engine = Bench::start(std::slice::from_ref(&path), &EngineOptions::default(), DirectIo::WherePossible);
    let mut bench = Bench { engine, paths: vec![path], next_op: 0, _directory: directory };
    let get = DiskCommand::PmapGet { table: Table::Rows, key: Bytes::new() };
    assert!(matches!(bench.run(0, get), DiskResult::PmapValue(Err(DiskError::PmapDamaged(_)))));
}

#[test]
fn dropping_an_engine_with_work_in_flight_frees_the_disk() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        for i in 0..600 {
            bench.submit(0, write(DATA + i * 65536, vec![Bytes::from(vec![1; 65536])]));
            bench.submit(0, DiskCommand::Read { offset: DATA + i * 65536, length: 65536 });
        }
        bench.submit(0, DiskCommand::Extend { to: DATA + 64 * MIB, hurry: false });
        bench.engine.flush();
        let none = Engine::start(Vec::new(), &options).unwrap();
        drop(std::mem::replace(&mut bench.engine, none));
        open_disk(&bench.paths[0], DirectIo::WherePossible).unwrap();
    });
}

#[test]
fn the_reactor_is_woken_for_answers_of_the_ring_and_of_threads() {
    all_engines(|options| {
        let mut bench = Bench::new(1, &options, DirectIo::WherePossible);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let deadline = std::time::Duration::from_secs(20);
        for round in 0..200 {
            let command = match round % 4 {
                0 => DiskCommand::Read { offset: DATA, length: 4096 },
                1 => DiskCommand::PmapGet { table: Table::Meta, key: Bytes::new() },
                2 => DiskCommand::Extend { to: DATA + MIB, hurry: false },
                _ => write(DATA, vec![Bytes::from(vec![1; 4096])]),
            };
            bench.submit(0, command);
            bench.engine.flush();
            let mut out = Vec::new();
            runtime.block_on(async {
                while out.is_empty() {
                    tokio::time::timeout(deadline, bench.engine.ready()).await.expect("a wake-up");
                    bench.engine.completions(&mut out);
                }
            });
        }
    });
}

#[test]
fn the_best_engine_starts_anywhere() {
    let bench = Bench::new(1, &EngineOptions::default(), DirectIo::WherePossible);
    assert!(["io_uring", "threads"].contains(&bench.engine.name()));
}

/// Needs a block device that may be overwritten: `PETAL_TEST_DEVICE=/dev/loop7` (64 MiB or more).
#[test]
#[ignore = "needs a block device"]
fn a_raw_device_is_formatted_locked_and_used() {
    let path = std::path::PathBuf::from(std::env::var("PETAL_TEST_DEVICE").expect("PETAL_TEST_DEVICE"));
    let size = 64 * MIB;
    let format = |size, force| Format {
        size,
        zeroed: &[0..MIB, DATA..DATA + MIB],
        pmap: PMAP,
        writes: &[],
        force,
        direct: DirectIo::WherePossible,
    };
    let too_large = format_disk(&path, &format(1 << 50, true)).unwrap_err();
    assert!(matches!(too_large, OpenError::TooSmall { .. }), "{too_large}");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"a file system").unwrap();
    let has_data = format_disk(&path, &format(size, false)).unwrap_err();
    assert!(matches!(has_data, OpenError::HasData { .. }), "{has_data}");
    format_disk(&path, &format(size, true)).unwrap();
    all_engines(|options| {
        let found = open_disk(&path, DirectIo::WherePossible).unwrap();
        assert!(found.length >= size && found.file.medium() == Medium::Device && found.file.is_direct());
        let capacity = found.length;
        drop(found);
        let engine = Bench::start(std::slice::from_ref(&path), &options, DirectIo::WherePossible);
        let error = open_disk(&path, DirectIo::WherePossible).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
        let paths = vec![path.clone()];
        let mut bench = Bench { engine, paths, next_op: 0, _directory: tempfile::tempdir().unwrap() };
        assert_eq!(bench.run(0, write(DATA, vec![Bytes::from(vec![5; 8192])])), DiskResult::Written(Ok(())));
        assert_eq!(bench.read(DATA, 8192), vec![5; 8192]);
        assert_eq!(bench.read(capacity - 4096, 8192)[4096..], [0; 4096], "behind the end of the device");
        assert_eq!(bench.run(0, DiskCommand::Extend { to: capacity, hurry: false }), DiskResult::Extended(Ok(())));
        let beyond = bench.run(0, DiskCommand::Extend { to: capacity + MIB, hurry: false });
        assert!(matches!(beyond, DiskResult::Extended(Err(DiskError::HostFull(_)))), "{beyond:?}");
        let changes = vec![(Table::Meta, Bytes::from_static(b"k"), Some(Bytes::from_static(b"v")))];
        assert_eq!(bench.run(0, DiskCommand::PmapCommit { changes }), DiskResult::PmapCommitted(Ok(())));
    });
}

/// Needs a directory on a small file system (64 MiB) of its own: `PETAL_TEST_SMALL_FS=/mnt/small`.
#[test]
#[ignore = "needs a small file system"]
fn a_full_file_system_is_host_full_for_every_command() {
    let directory = std::path::PathBuf::from(std::env::var("PETAL_TEST_SMALL_FS").expect("PETAL_TEST_SMALL_FS"));
    all_engines(|options| {
        let path = directory.join("disk");
        let _ = std::fs::remove_file(&path);
        format(&path);
        let engine = Bench::start(std::slice::from_ref(&path), &options, DirectIo::WherePossible);
        let paths = vec![path.clone()];
        let mut bench = Bench { engine, paths, next_op: 0, _directory: tempfile::tempdir().unwrap() };
        let length = std::fs::metadata(&path).unwrap().len();
        let full = bench.run(0, DiskCommand::Extend { to: 1 << 30, hurry: false });
        assert!(matches!(full, DiskResult::Extended(Err(DiskError::HostFull(_)))), "{full:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
        let full = bench.run(0, write(20 * MIB, vec![Bytes::from(vec![1; 100 << 20])]));
        assert!(matches!(full, DiskResult::Written(Err(DiskError::HostFull(_)))), "{full:?}");
        assert_eq!(bench.read(DATA, 4096), vec![0; 4096]);
    });
    let format = Format {
        size: 1 << 30,
        zeroed: &[0..MIB, DATA..DATA + (1 << 30)],
        pmap: PMAP,
        writes: &[],
        force: true,
        direct: DirectIo::WherePossible,
    };
    let error = format_disk(&directory.join("second"), &format).unwrap_err();
    assert!(matches!(error, OpenError::HostFull { .. }), "{error}");
    assert!(!directory.join("second").exists());
}
