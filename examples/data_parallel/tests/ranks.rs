//! Runs of several processes on this machine, started by `mpirun`.
//!
//! `cargo test -- --nocapture` prints the table of ranks; `cargo test --release -- --ignored --nocapture` measures the
//! example at its own sizes.

use candle_core::Device;
use loralib::{read_state_dict, StateDict};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_data_parallel");
/// Sequences of which the last is shorter, in batches that 2, 3 and 4 do not divide.
const SMALL: &str = "--width 64 --layers 2 --context 64 --batch 9 --lr 2e-4";

fn mpirun(threads: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args("--allow-run-as-root --oversubscribe --bind-to none".split(' '));
    command.env("RAYON_NUM_THREADS", threads.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(command: &mut Command) -> Output {
    let error = "mpirun of Open MPI is needed (Debian: openmpi-bin)";
    command.output().unwrap_or_else(|e| panic!("{error}: {e}"))
}

/// A run of `ranks` ranks that succeeds; gives its report.
fn trained(ranks: usize, threads: usize, flags: &str, out: &Path) -> Value {
    let mut command = mpirun(threads);
    command.args(["-n", &ranks.to_string(), PROGRAM, "--out"]).arg(out);
    let output = run(command.args(flags.split_whitespace()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap()
}

fn adapter(out: &Path) -> StateDict {
    read_state_dict(out.join("adapter.safetensors"), &Device::Cpu).unwrap().tensors
}

/// The norm of the difference by that of `b`.
fn apart(a: &StateDict, b: &StateDict) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let (mut difference, mut norm) = (0f64, 0f64);
    for (a, b) in a.values().zip(b.values()) {
        let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in values(a).into_iter().zip(values(b)) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(b).powi(2);
        }
    }
    (difference / norm).sqrt()
}

/// Runs of 1 to 4 ranks, each against the first.
fn table(flags: &str) {
    println!("| ranks | loss | its difference | adapter's difference | bytes | step | exchange |");
    let dir = tempfile::tempdir().unwrap();
    let mut one = None;
    for ranks in 1..=4 {
        let report = trained(ranks, 1, flags, dir.path());
        let (loss, adapter) = (report["loss"].as_f64().unwrap(), adapter(dir.path()));
        let values: usize = adapter.values().map(|tensor| tensor.elem_count()).sum();
        assert_eq!(report["bytes"], 4 * values + 8);
        let (expected, reference) = one.get_or_insert_with(|| (loss, adapter.clone()));
        let (loss_apart, apart) = ((loss / *expected - 1.).abs(), apart(&adapter, reference));
        println!(
            "| {ranks} | {loss:.6} | {loss_apart:.1e} | {apart:.1e} | {} | {:.1} ms | {:.2} ms |",
            report["bytes"],
            report["step_ms"].as_f64().unwrap(),
            report["exchange_ms"].as_f64().unwrap()
        );
        assert!(loss_apart < 1e-6 && apart < 1e-6, "{ranks} ranks: {loss_apart:e}, {apart:e}");
    }
}

#[test]
fn any_number_of_ranks_trains_the_same_adapter() {
    table(SMALL);
}

#[test]
fn a_run_resumes_on_another_number_of_ranks() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let flags = |steps: usize| format!("{SMALL} --steps {steps}");
    trained(2, 1, &flags(30), whole.path());
    trained(2, 1, &flags(13), parts.path());
    trained(3, 1, &format!("{} --resume", flags(21)), parts.path());
    let report = trained(1, 1, &format!("{} --resume", flags(30)), parts.path());
    assert_eq!(report["steps"], 30);
    let apart = apart(&adapter(parts.path()), &adapter(whole.path()));
    assert!(apart < 1e-6, "{apart:e}");
}

/// A run in which rank 2 has other flags than ranks 0 and 1; gives the error.
fn refused(flags: &str, others: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut command = mpirun(1);
    for (ranks, flags) in [("2", flags), ("1", others)] {
        command.args(["-n", ranks, PROGRAM, "--out"]).arg(dir.path());
        command.args(flags.split_whitespace()).arg(":");
    }
    let start = Instant::now();
    let output = run(&mut command);
    assert!(!output.status.success() && start.elapsed() < Duration::from_secs(20));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_rank_with_another_adapter_is_told_at_the_start() {
    let error = refused(SMALL, &format!("{SMALL} --rank 4"));
    assert!(error.contains("error: rank 2: this rank differs from rank 0: the flags"), "{error}");
    assert!(error.contains("\"rank\":4") && error.contains("\"rank\":8"), "{error}");
}

#[test]
fn a_rank_with_other_data_is_told_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    fs::write(&text, "another text").unwrap();
    let error = refused(SMALL, &format!("{SMALL} --text {}", text.display()));
    assert!(error.contains("error: rank 2: this rank differs from rank 0"), "{error}");
}

/// The processes that `mpirun` started (Linux).
fn children(mpirun: &Child) -> Vec<String> {
    let list = format!("/proc/{0}/task/{0}/children", mpirun.id());
    let list = fs::read_to_string(list).unwrap_or_default();
    list.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_killed_rank_ends_the_run_and_the_checkpoint_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = mpirun(1);
    command
        .args(["-n", "3", PROGRAM, "--steps", "1000000", "--every", "1", "--out"])
        .arg(dir.path());
    let mut running = command.args(SMALL.split_whitespace()).stdout(Stdio::null()).spawn().unwrap();
    let (start, state) = (Instant::now(), dir.path().join("state.safetensors"));
    while !state.exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint");
        sleep(Duration::from_millis(20));
    }
    let ranks = children(&running);
    assert_eq!(ranks.len(), 3);
    let (killed, start) = (&ranks[1], Instant::now());
    assert!(Command::new("kill").args(["-9", killed]).status().unwrap().success());
    while running.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(20), "the run goes on");
        sleep(Duration::from_millis(20));
    }
    println!("the run ended {:.1} s after its rank", start.elapsed().as_secs_f64());
    assert!(!running.wait().unwrap().success());
    // A process that ended has no command line, even while its entry stays.
    let alive = |rank: &&String| {
        fs::read(format!("/proc/{rank}/cmdline")).is_ok_and(|line| !line.is_empty())
    };
    assert_eq!(ranks.iter().filter(alive).count(), 0);
    // --steps is reached already: it only loads.
    let report = trained(3, 1, &format!("{SMALL} --resume --steps 1"), dir.path());
    assert!(report["steps"].as_u64().unwrap() >= 1);
}

/// One thread for each of two ranks against one process with two threads, in turn.
#[test]
#[ignore = "measures for a minute, on a quiet machine with two cores"]
fn two_ranks_are_as_fast_as_two_threads() {
    table("");
    let dir = tempfile::tempdir().unwrap();
    let (mut ratios, mut shares) = (vec![], vec![]);
    for _ in 0..5 {
        let step = |ranks, threads| trained(ranks, threads, "", dir.path());
        let ms = |report: &Value, key: &str| report[key].as_f64().unwrap();
        let (one, two) = (step(1, 2), step(2, 1));
        ratios.push(ms(&one, "step_ms") / ms(&two, "step_ms"));
        shares.push(ms(&two, "exchange_ms") / ms(&two, "step_ms"));
        println!("one process {one}\ntwo ranks {two}");
    }
    for list in [&mut ratios, &mut shares] {
        list.sort_by(f64::total_cmp);
    }
    println!("efficiency {ratios:.3?}, exchange {shares:.5?} of a step");
    assert!(ratios[2] >= 0.9 && shares[2] <= 0.05);
}
