//! `petal-sim`: runs seeds, and shows one again. `cargo xtask sim` calls it.

use petal::sabotage::Sabotage;
use petal_sim::counters::Kind;
use petal_sim::options::{FaultWeights, Overrides};
use petal_sim::trace::Keep;
use petal_sim::{Report, compare_runs, run_many, run_seed};
use std::process::ExitCode;

const HELP: &str = "\
petal-sim: whole clusters in one thread, in virtual time, decided by a seed

  --seeds N              how many seeds to run (default 20)
  --first-seed M         the first one (default 1)
  --threads N            on so many threads (default: all cores)
  --keep-going N         stop after N seeds with complaints (default 1)
  --verify-determinism   run every seed twice and compare the logs
  --trace                print every event (use with --seeds 1)
  --coverage             fail if a kind of fault never happened
  --sabotage NAME        leave out a rule, to see that it is caught (list: --sabotage help)
  --servers N  --disks N  --copies N  --operations N   instead of what the seed draws
  --fault-interval MILLISECONDS   mean time between two faults
  --no-faults  --only-crashes  --crowded  --busy  --full  --recovering  --readers  --swift  --no-shrink  --snapshots
  --shifts  --alone      likewise
  --only-fault KIND      this kind of fault only (again for more): crash-one, crash-all, stop, reset, stall, ambush,
                         cut, hold, strand, differ, ghost, crash-client, partition, freeze, sever, relapse, lag, late,
                         spoil, lose, hang, fail, stumble, lie, isolate, oust, estrange, damage, shift
  --options              print what is drawn for each seed
  --judge FILE           judge what `petal history` recorded of a real cluster, instead

Ends with 0 if no checker complained, else with 1 and how to see it again. See docs/testing.md.
";

struct Arguments {
    seeds: u64,
    first: u64,
    threads: usize,
    bad_max: usize,
    verify: bool,
    trace: bool,
    coverage: bool,
    options: bool,
    overrides: Overrides,
    judge: Option<String>,
    /// Words that make the same choice again.
    again: String,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        Ok(Some(Arguments { judge: Some(path), .. })) => judge(&path),
        Ok(Some(arguments)) => run(&arguments),
        Ok(None) => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("petal-sim: {why}\n\n{HELP}");
            ExitCode::from(2)
        }
    }
}

fn judge(path: &str) -> ExitCode {
    let file = std::fs::File::open(path).map_err(|e| format!("cannot read {path}: {e}"));
    match file.and_then(|file| petal_sim::judge::judge(std::io::BufReader::new(file))) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("{why}");
            ExitCode::from(1)
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Arguments>, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut a = Arguments {
        seeds: 20,
        first: 1,
        threads,
        bad_max: 1,
        verify: false,
        trace: false,
        coverage: false,
        options: false,
        overrides: Overrides::default(),
        judge: None,
        again: String::new(),
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        let mut shapes_run = true;
        let before = a.again.clone();
        match word.as_str() {
            "--seeds" | "--first-seed" | "--threads" | "--keep-going" => {
                let n: u64 = number(&word, value()?)?;
                shapes_run = false;
                match word.as_str() {
                    "--seeds" => a.seeds = n,
                    "--first-seed" => a.first = n,
                    "--threads" => a.threads = n as usize,
                    _ => a.bad_max = n as usize,
                }
            }
            "--verify-determinism" | "--trace" | "--coverage" | "--options" => {
                shapes_run = false;
                match word.as_str() {
                    "--verify-determinism" => a.verify = true,
                    "--trace" => a.trace = true,
                    "--coverage" => a.coverage = true,
                    _ => a.options = true,
                }
            }
            "--sabotage" => {
                let name = value()?;
                a.overrides.sabotage = Sabotage::from_name(&name).ok_or_else(|| {
                    let names: Vec<&str> = Sabotage::ALL.iter().map(|s| s.name()).collect();
                    format!("there is no sabotage '{name}'; there are: {}", names.join(", "))
                })?;
                a.again.push_str(&format!(" --sabotage {name}"));
            }
            "--fault-interval" => {
                let millis = number(&word, value()?)?;
                a.overrides.fault_interval = Some(stdx::Duration::from_millis(millis));
                a.again.push_str(&format!(" {word} {millis}"));
            }
            "--servers" | "--disks" | "--copies" | "--operations" => {
                let n = number(&word, value()?)?;
                match word.as_str() {
                    "--servers" => a.overrides.servers = Some(n as usize),
                    "--disks" => a.overrides.disks = Some(n as usize),
                    "--copies" => a.overrides.copies = Some(n as usize),
                    _ => a.overrides.operations = Some(n),
                }
                a.again.push_str(&format!(" {word} {n}"));
            }
            "--judge" => a.judge = Some(value()?),
            "--no-faults" => a.overrides.no_faults = true,
            "--only-crashes" => a.overrides.only_crashes = true,
            "--crowded" => a.overrides.crowded = true,
            "--full" => a.overrides.full = true,
            "--busy" => a.overrides.busy = true,
            "--readers" => a.overrides.readers = true,
            "--snapshots" => a.overrides.snapshots = true,
            "--swift" => a.overrides.swift = true,
            "--recovering" => a.overrides.recovering = true,
            "--only-fault" => {
                let mut faults = a.overrides.faults.unwrap_or(FaultWeights::NONE);
                let name = value()?;
                let weight = match name.as_str() {
                    "crash-one" => &mut faults.crash_one,
                    "stop" => &mut faults.stop,
                    "crash-all" => &mut faults.crash_all,
                    "reset" => &mut faults.reset,
                    "stall" => &mut faults.stall,
                    "ambush" => &mut faults.ambush,
                    "cut" => &mut faults.cut,
                    "hold" => &mut faults.hold,
                    "strand" => &mut faults.strand,
                    "differ" => &mut faults.differ,
                    "ghost" => &mut faults.ghost,
                    "crash-client" => &mut faults.crash_client,
                    "partition" => &mut faults.partition,
                    "freeze" => &mut faults.freeze,
                    "sever" => &mut faults.sever,
                    "relapse" => &mut faults.relapse,
                    "lag" => &mut faults.lag,
                    "late" => &mut faults.late,
                    "spoil" => &mut faults.spoil,
                    "lose" => &mut faults.lose,
                    "hang" => &mut faults.hang,
                    "fail" => &mut faults.fail,
                    "stumble" => &mut faults.stumble,
                    "lie" => &mut faults.lie,
                    "isolate" => &mut faults.isolate,
                    "oust" => &mut faults.oust,
                    "estrange" => &mut faults.estrange,
                    "damage" => &mut faults.damage,
                    "shift" => &mut faults.shift,
                    other => return Err(format!("there is no fault '{other}' to ask for")),
                };
                *weight += 1;
                a.overrides.faults = Some(faults);
                a.again.push_str(&format!(" --only-fault {name}"));
            }
            "--shifts" => a.overrides.shifts = true,
            "--alone" => a.overrides.alone = true,
            "--no-shrink" => a.overrides.no_shrink = true,
            "--help" | "-h" => return Ok(None),
            other => return Err(format!("'{other}' is not an argument")),
        }
        if shapes_run && a.again == before {
            a.again.push_str(&format!(" {word}"));
        }
    }
    Ok(Some(a))
}

fn number(word: &str, value: String) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{word} needs a number, not '{value}'"))
}

fn run(a: &Arguments) -> ExitCode {
    if a.trace {
        return trace(a);
    }
    println!("seeds {}..{} on {} threads{}", a.first, a.first + a.seeds, a.threads, a.again);
    let started = std::time::Instant::now();
    let parted = std::sync::Mutex::new(Vec::new());
    let summary = run_many(a.first, a.seeds, a.threads, a.bad_max, &a.overrides, |report| {
        if a.options {
            println!("seed {}: {:?}", report.seed, report.options);
        }
        if a.verify
            && let Some(event) = compare_runs(report.seed, &a.overrides)
        {
            parted.lock().expect("no panic holds it").push((report.seed, event));
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{} seeds, {} operations, {} events in {seconds:.1} s ({:.1} seeds/s)",
        summary.seeds,
        summary.operations,
        summary.events,
        summary.seeds as f64 / seconds
    );
    for kind in Kind::ALL {
        println!("{:>10}  {}", summary.counters.get(*kind), kind.name());
    }
    let mut good = summary.bad.is_empty();
    for report in &summary.bad {
        show(report, &a.again);
    }
    for (seed, event) in parted.into_inner().expect("no panic holds it") {
        good = false;
        println!("seed {seed} is not deterministic: two runs part at event {event}");
    }
    for kind in summary.never() {
        println!("never happened: {}", kind.name());
        good &= !a.coverage;
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn trace(a: &Arguments) -> ExitCode {
    let mut good = true;
    for seed in a.first..a.first + a.seeds {
        let report = run_seed(seed, &a.overrides, Keep::Words);
        println!("seed {seed}: log hash {:016x}, {} events", report.log_hash, report.events);
        if !report.complaints.is_empty() {
            show(&report, &a.again);
            good = false;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show(report: &Report, again: &str) {
    println!("\nseed {}: {} complaints", report.seed, report.complaints.len());
    println!("  options: {:?}", report.options);
    println!("  events: {}, ended at {:?}, log hash {:016x}", report.events, report.ended_at, report.log_hash);
    for complaint in &report.complaints {
        println!("  - {complaint}");
    }
    println!("  again: cargo xtask sim --first-seed {} --seeds 1 -- --trace{again}", report.seed);
}
