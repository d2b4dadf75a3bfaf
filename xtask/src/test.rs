//! Everything that CI runs, in an order that fails early. Ends with `N passed, N failed`: tests of the
//! workspace, scenarios, and one for each other check.

use crate::run::{self, cargo};
use crate::{e2e, packages, sim, tidy};
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};

/// How long the tests of the workspace may take, with their build on a slow machine.
const TESTS_LIMIT: Duration = Duration::from_secs(2400);

/// What to leave out.
#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds for fresh seeds of the simulator
    #[arg(long, default_value_t = 60)]
    sim_seconds: u64,
    /// Leave out the scenarios with real processes
    #[arg(long)]
    no_e2e: bool,
}

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
}

impl Tally {
    /// One check that counts as one test.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        println!("\n== {name}");
        let result = check();
        let seconds = start.elapsed().as_secs_f32();
        match &result {
            Ok(()) => self.passed += 1,
            Err(_) => self.failed += 1,
        }
        match &result {
            Ok(()) => println!("== {name}: ok ({seconds:.0} s)"),
            Err(error) => println!("== {name}: FAILED ({seconds:.0} s)\n{error:#}"),
        }
        result.is_ok()
    }
}

/// Runs all of it.
pub fn run(arguments: Arguments) -> Result<()> {
    let mut tally = Tally::default();
    steps(&arguments, &mut tally);
    println!("\n{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed > 0 {
        bail!("cargo xtask test failed; the reasons are above");
    }
    Ok(())
}

/// Stops at the first cheap step that fails: what comes after would only repeat it. The slow ones run
/// all, so that one run tells everything.
fn steps(arguments: &Arguments, tally: &mut Tally) {
    let cheap = tally.check("format", || run::show(cargo().args(["fmt", "--all", "--check"])))
        && tally.check("tidy", tidy::run)
        && tally.check("packages", packages::install_missing)
        && tally.check("clippy", || {
            run::show(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))
        });
    if !cheap {
        return;
    }
    workspace_tests(tally);
    tally.check("simulator", || sim::run(sim::Arguments::fresh_for(arguments.sim_seconds)));
    if !arguments.no_e2e {
        match e2e::run_all() {
            Ok((passed, failed)) => {
                tally.passed += passed;
                tally.failed += failed;
            }
            Err(error) => {
                println!("{error:#}");
                tally.failed += 1;
            }
        }
    }
}

/// Tests of all crates, with nextest where it is installed.
fn workspace_tests(tally: &mut Tally) {
    println!("\n== tests of the workspace");
    let nextest = packages::find("cargo-nextest").is_some();
    let result = if nextest { with_nextest() } else { with_cargo_test() };
    match result {
        Ok((passed, failed)) => {
            println!("== tests of the workspace: {passed} passed, {failed} failed");
            tally.passed += passed;
            tally.failed += failed;
        }
        Err(error) => {
            println!("== tests of the workspace: FAILED\n{error:#}");
            tally.failed += 1;
        }
    }
    tally.check("doc tests", || run::show(cargo().args(["test", "--workspace", "--doc", "--quiet"])));
}

fn with_nextest() -> Result<(u64, u64)> {
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "fail", "--color", "never"]);
    nextest.args(["--no-tests", "pass"]);
    eprintln!("$ {}", run::words(&nextest));
    let output = run::output_within(&mut nextest, TESTS_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    print!("{text}");
    // "     Summary [   1.2s] 210 tests run: 209 passed (1 slow), 1 failed, 0 skipped"
    let summary = text.lines().rev().find(|l| l.contains(" run: ")).context("nextest printed no summary")?;
    let counts = summary.split(" run: ").nth(1).unwrap_or_default();
    let count = |what: &str| -> u64 {
        let part = counts.split(", ").find(|part| part.contains(what));
        part.and_then(|p| p.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let failed = count("failed") + count("timed out");
    if !output.status.success() && failed == 0 {
        bail!("nextest ended with {}", output.status);
    }
    Ok((count("passed"), failed))
}

fn with_cargo_test() -> Result<(u64, u64)> {
    let mut test = cargo();
    test.args(["test", "--workspace", "--all-targets", "--no-fail-fast", "--quiet"]);
    eprintln!("$ {}", run::words(&test));
    let output = run::output_within(&mut test, TESTS_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{text}{}", String::from_utf8_lossy(&output.stderr));
    // "test result: ok. 12 passed; 0 failed; 0 ignored; ..."
    let mut sums = (0, 0);
    for line in text.lines().filter(|l| l.starts_with("test result:")) {
        let number = |what: &str| -> u64 {
            let part = line.split([';', '.']).find(|part| part.trim_end().ends_with(what));
            part.and_then(|p| p.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        sums = (sums.0 + number("passed"), sums.1 + number("failed"));
    }
    if !output.status.success() && sums.1 == 0 {
        bail!("cargo test ended with {}", output.status);
    }
    Ok(sums)
}
