//! A run is not lost: by another one, by Ctrl-C, by a process that is killed, or by a full disk.

mod common;

use common::Files;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const TRAIN: &str =
    "train model data.jsonl --length 16 --batch 2 --lr 1e-3 --tokens 3 --save-every 1";

#[test]
fn another_run_is_told_and_not_replaced() {
    let files = Files::new();
    let run = format!("{TRAIN} --steps 4");
    files.ok(&run);
    let before = fs::read(files.path("adapter/adapter_model.safetensors")).unwrap();
    let error = files.error(&format!("{run} --seed 1"));
    for words in ["adapter/state.safetensors: ", "--resume", "--overwrite"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(before == fs::read(files.path("adapter/adapter_model.safetensors")).unwrap());
    files.ok(&format!("{run} --seed 1 --overwrite"));
    assert!(before != fs::read(files.path("adapter/adapter_model.safetensors")).unwrap());
    // An adapter of another program.
    fs::remove_file(files.path("adapter/state.safetensors")).unwrap();
    let error = files.error(&run);
    assert!(
        error.contains("adapter/adapter_config.json") && !error.contains("--resume"),
        "{error}"
    );
    let error = files.error(&format!("{run} --resume"));
    assert!(error.contains("state.safetensors: no such file"), "{error}");
}

#[test]
fn a_run_goes_on_with_the_same_options_alone() {
    let files = Files::new();
    files.ok(&format!("{TRAIN} --steps 3 --rank 4"));
    let error = files.error(&format!(
        "{TRAIN} --steps 5 --alpha 3 --targets q_proj --init-lora-weights gaussian --no-packing --resume"
    ));
    for words in [
        "--rank was 4",
        "--alpha was 16.0",
        "--targets was all-linear",
        "--init-lora-weights was ",
        "--steps was 3",
        "--no-packing was false",
    ] {
        assert!(error.contains(words), "{error} does not contain {words:?}");
    }
    for words in ["--lr", "--seed", "DATA", "MODEL"] {
        assert!(!error.contains(words), "{error} contains {words:?}");
    }
    let (data, lines) = (files.path("data.jsonl"), fs::read_to_string(files.path("data.jsonl")));
    fs::write(data, lines.unwrap().replacen("w9", "w8", 1)).unwrap();
    let error = files.error(&format!("{TRAIN} --steps 3 --rank 4 --resume"));
    assert!(error.contains("DATA has other tokens"), "{error}");
}

fn started(files: &Files, options: &str) -> Child {
    let mut command = files.command(options);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the run has saved its state.
fn wait_for_state(files: &Files, child: &mut Child) {
    let (state, began) = (files.path("adapter/state.safetensors"), Instant::now());
    while !state.exists() && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60));
        sleep(Duration::from_millis(5));
    }
}

/// What a run that nothing stopped leaves.
fn whole(options: &str) -> Vec<u8> {
    let files = Files::new();
    files.ok(options);
    fs::read(files.path("adapter/state.safetensors")).unwrap()
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let (files, options) = (Files::new(), format!("{TRAIN} --steps 400"));
    let mut child = started(&files, &options);
    wait_for_state(&files, &mut child);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{error}");
    let (asked, stopped) = (error.contains("stopping after this step"), error.trim_end());
    assert!(asked && stopped.ends_with("--steps 400 --resume"), "{error}");
    let told = files.ok(&format!("{options} --resume"));
    assert!(told.contains("going on after step "), "{told}");
    assert!(whole(&options) == fs::read(files.path("adapter/state.safetensors")).unwrap());
}

#[test]
fn a_killed_run_goes_on_from_a_whole_state() {
    let (files, options) = (Files::new(), format!("{TRAIN} --steps 300"));
    let mut child = started(&files, &options);
    wait_for_state(&files, &mut child);
    for i in 0..6 {
        // At moments that differ, some of them while a file is written.
        sleep(Duration::from_millis(37 + 53 * i));
        child.kill().unwrap();
        child.wait().unwrap();
        child = started(&files, &format!("{options} --resume"));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    files.ok(&format!("{options} --resume"));
    assert!(whole(&options) == fs::read(files.path("adapter/state.safetensors")).unwrap());
    let left: Vec<_> = fs::read_dir(files.path("adapter")).unwrap().map(|f| f.unwrap()).collect();
    assert!(left.len() < 12, "{left:?}");
}

/// Files of at most some blocks, as on a disk that is full.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_state() {
    let (files, options) = (Files::new(), format!("{TRAIN} --steps 5"));
    files.ok(&options);
    let before = fs::read(files.path("adapter/state.safetensors")).unwrap();
    let limited = |blocks: usize, options: &str| {
        let lora = env!("CARGO_BIN_EXE_lora");
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec {lora} {options}");
        let output =
            Command::new("bash").arg("-c").arg(script).current_dir(files.path(".")).output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, error) = limited(8, &format!("{TRAIN} --steps 9 --out other"));
    assert!(code == Some(1) && error.contains("other/"), "{code:?} {error}");
    assert!(!files.path("other/state.safetensors").exists());
    assert!(before == fs::read(files.path("adapter/state.safetensors")).unwrap());
    files.ok(&format!("{options} --resume"));
}

#[test]
fn epochs_are_as_many_steps_as_see_each_example_so_often() {
    let files = Files::new();
    // 57 examples to train on, in rows of their own.
    let options = "train model data.jsonl --length 16 --no-packing --tokens 3 --batch 5";
    let told = files.ok(&format!("{options} --accumulate 2 --epochs 2"));
    assert!(told.contains("12 steps, which see each example 2.1 times"), "{told}");
    assert!(told.contains("step 12: validation loss"), "{told}");
}
