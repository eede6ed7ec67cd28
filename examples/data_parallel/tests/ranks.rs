//! Runs of several processes on this machine, started by `mpirun`.
//!
//! `cargo test -- --nocapture` prints the table of ranks; `cargo test --release -- --ignored --nocapture` measures the
//! example at its own sizes.

use candle_core::Device;
use loralib::{read_state_dict, utils::StateDict};
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
    for old in ["report.json", "adapter.safetensors"] {
        let _ = fs::remove_file(out.join(old));
    }
    let mut command = mpirun(threads);
    command.args(["-n", &ranks.to_string(), PROGRAM, "--out"]).arg(out);
    let output = run(command.args(flags.split_whitespace()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["ranks"], ranks, "mpirun connected other processes");
    report
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
    println!(
        "| ranks | loss | its difference | adapter's difference | bytes | step | wait | exchange |"
    );
    let dir = tempfile::tempdir().unwrap();
    let mut one = None;
    for ranks in 1..=4 {
        let report = trained(ranks, 1, flags, dir.path());
        let (loss, adapter) = (report["loss"].as_f64().unwrap(), adapter(dir.path()));
        let values: usize = adapter.values().map(|tensor| tensor.elem_count()).sum();
        // The values, the count of ranks for each variable, loss and weight.
        assert_eq!(report["bytes"], 4 * (values + adapter.len() + 2));
        let (expected, reference) = one.get_or_insert_with(|| (loss, adapter.clone()));
        let (loss_apart, apart) = ((loss / *expected - 1.).abs(), apart(&adapter, reference));
        let [step, wait, exchange] =
            ["step_ms", "wait_ms", "exchange_ms"].map(|key| report[key].as_f64().unwrap());
        println!(
            "| {ranks} | {loss:.6} | {loss_apart:.1e} | {apart:.1e} | {} | {step:.1} ms | \
             {wait:.2} ms | {exchange:.2} ms |",
            report["bytes"]
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

/// The errors of a run that fails.
fn errors(command: &mut Command) -> String {
    let start = Instant::now();
    let output = run(command);
    assert!(!output.status.success() && start.elapsed() < Duration::from_secs(20));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A run in which rank 2 has other arguments of `mpirun` and other flags than ranks 0 and 1; gives the errors.
fn refused(first: [&str; 2], others: [&str; 2]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut command = mpirun(1);
    for (ranks, [options, flags]) in [("2", first), ("1", others)] {
        command.args(["-n", ranks]).args(options.split_whitespace()).args([PROGRAM, "--out"]);
        command.arg(dir.path()).args(flags.split_whitespace()).arg(":");
    }
    errors(&mut command)
}

#[test]
fn a_rank_with_another_adapter_is_told_at_the_start() {
    let error = refused(["", SMALL], ["", &format!("{SMALL} --r 4 --alpha 4")]);
    let expected = "error: rank 2: this rank differs from rank 0: \
                    flags.alpha is 4.0 here and 16.0 there; flags.r is 4 here and 8 there";
    assert!(error.contains(expected), "{error}");
    for rank in 0..2 {
        assert!(error.contains(&format!("error: rank {rank}: rank 2 failed")), "{error}");
    }
}

#[test]
fn a_rank_that_alone_resumes_is_told_at_the_start() {
    let error = refused(["", SMALL], ["", &format!("{SMALL} --resume")]);
    let expected =
        "rank 2: this rank differs from rank 0: flags.resume is true here and false there";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_rank_with_other_data_is_told_at_the_start() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for (dir, lines) in dirs.iter().zip([20, 21]) {
        fs::write(dir.path().join("t"), "a text of one line\n".repeat(lines)).unwrap();
    }
    let options = dirs.each_ref().map(|dir| format!("-wdir {}", dir.path().display()));
    let flags = format!("{SMALL} --text t");
    let error = refused([&options[0], &flags], [&options[1], &flags]);
    let expected = "error: rank 2: this rank differs from rank 0: text is";
    let line = error.lines().find(|line| line.starts_with(expected));
    assert!(line.is_some_and(|line| !line.contains("; ")), "not the text alone: {error}");
}

#[test]
fn a_run_is_resumed_with_the_same_sequences_only() {
    let dir = tempfile::tempdir().unwrap();
    trained(2, 1, &format!("{SMALL} --steps 2"), dir.path());
    let mut command = mpirun(1);
    command.args(["-n", "2", PROGRAM, "--resume", "--out"]).arg(dir.path());
    let error = errors(command.args(SMALL.split_whitespace()).args(["--seed", "1"]));
    assert!(error.contains("state.safetensors: seed is 1 here and 0 there"), "{error}");
}

/// A run of 3 ranks with `--fault`, after checkpoints at 2 and 4 steps; gives the errors of each rank.
fn faulty(fault: &str) -> [String; 3] {
    let dir = tempfile::tempdir().unwrap();
    let mut command = mpirun(1);
    command.args(["-n", "3", PROGRAM, "--every", "2", "--fault", fault, "--out"]).arg(dir.path());
    let all = errors(command.args(SMALL.split_whitespace()));
    // The variables of the step before the fault.
    let report = trained(3, 1, &format!("{SMALL} --resume --steps 1"), dir.path());
    assert_eq!(report["steps"], 4);
    [0, 1, 2].map(|rank| {
        let line = all.lines().find_map(|line| line.strip_prefix(&format!("error: rank {rank}: ")));
        line.unwrap_or_else(|| panic!("rank {rank} has no error: {all}")).to_owned()
    })
}

#[test]
fn a_loss_that_is_nan_on_one_rank_is_told_on_all() {
    for error in faulty("nan") {
        assert!(error.contains("blocks.0.k.lora_A"), "{error}");
        assert!(error.ends_with("not finite: rank 2 gave such values"), "{error}");
    }
}

#[test]
fn a_forward_that_fails_on_one_rank_is_told_on_all() {
    let [first, second, last] = faulty("error");
    assert_eq!(last, "as --fault asks");
    assert!([first, second].iter().all(|error| error.contains("rank 2 failed before")));
}

#[test]
fn variables_that_drift_are_told_and_do_not_replace_the_checkpoint() {
    let [first, second, last] = faulty("drift");
    assert!(last.contains("differs from rank 0: variable \"blocks.0.k.lora_A\""), "{last}");
    assert!([first, second].iter().all(|error| error.contains("rank 2 failed")));
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
    let state = dir.path().join("state.safetensors");
    // Rank 0 is the one that writes: it is killed at several moments.
    for (killed, delay) in [(1, 0), (0, 0), (0, 7), (0, 16)] {
        let _ = fs::remove_file(&state);
        let mut command = mpirun(1);
        command.args(["-n", "3", PROGRAM, "--steps", "1000000", "--every", "1", "--out"]);
        command.arg(dir.path()).args(SMALL.split_whitespace()).stdout(Stdio::null());
        let (mut running, start) = (command.spawn().unwrap(), Instant::now());
        while !state.exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint");
            sleep(Duration::from_millis(5));
        }
        let ranks = children(&running);
        assert_eq!(ranks.len(), 3);
        sleep(Duration::from_millis(delay));
        let start = Instant::now();
        assert!(Command::new("kill").args(["-9", &ranks[killed]]).status().unwrap().success());
        while running.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "the run goes on");
            sleep(Duration::from_millis(20));
        }
        println!("the run ended {:.1} s after rank {killed}", start.elapsed().as_secs_f64());
        assert!(!running.wait().unwrap().success());
        // A process that ended has no command line, even while its entry stays.
        let alive = |rank: &&String| {
            fs::read(format!("/proc/{rank}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        assert_eq!(ranks.iter().filter(alive).count(), 0);
        // --steps is reached already: it only loads, and writes the adapter of the checkpoint.
        let report = trained(3, 1, &format!("{SMALL} --resume --steps 1"), dir.path());
        assert!(report["steps"].as_u64().unwrap() >= 1);
        assert!(!adapter(dir.path()).is_empty());
    }
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
