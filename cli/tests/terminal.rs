//! In a terminal, which `script` makes: a bar that moves, and Ctrl-C.

#![cfg(target_os = "linux")]

mod common;

use common::Files;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const TRAIN: &str = "train model data.jsonl --length 16 --batch 2 --tokens 3 --save-every 1";

/// `lora` in a terminal of 200 columns.
fn in_terminal(files: &Files, options: &str) -> Child {
    let command = format!("stty cols 200; {} {options}", env!("CARGO_BIN_EXE_lora"));
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).current_dir(files.path("."));
    script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn shown(child: &mut Child) -> String {
    let mut text = vec![];
    child.stdout.take().unwrap().read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn a_bar_shows_steps_loss_speed_and_the_time_left() {
    let files = Files::new();
    let mut child = in_terminal(&files, &format!("{TRAIN} --steps 30"));
    let text = shown(&mut child);
    assert!(child.wait().unwrap().success(), "{text}");
    for words in ["adapting", "step 30/30", "mean loss ", " tokens/s", " s left", "\u{1b}["] {
        assert!(text.contains(words), "{text:?} does not contain {words:?}");
    }
    // In a pipe there are lines in its place.
    let piped = files.ok(&format!("{TRAIN} --steps 30 --overwrite"));
    let last = piped.lines().find(|line| line.starts_with("adapting 30/30, mean loss "));
    assert!(last.is_some() && !piped.contains('\u{1b}'), "{piped}");
    // And for programs objects.
    let json = files.ok(&format!("{TRAIN} --steps 30 --overwrite --json"));
    for line in json.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(event["event"].is_string(), "{line}");
    }
    assert_eq!(json.matches("\"event\":\"step\"").count(), 30);
}

#[test]
fn ctrl_c_stops_after_a_step() {
    let files = Files::new();
    let mut child = in_terminal(&files, &format!("{TRAIN} --steps 2000"));
    let began = Instant::now();
    while !files.path("adapter/state.safetensors").exists() {
        assert!(began.elapsed() < Duration::from_secs(60));
        sleep(Duration::from_millis(5));
    }
    child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    let text = shown(&mut child);
    assert!(!child.wait().unwrap().success());
    assert!(text.contains("stopping after this step") && text.contains("--resume"), "{text}");
}

#[test]
fn a_conversation_begins_with_what_it_is_and_ends_by_a_command() {
    let files = Files::new();
    files.ok(&format!("{TRAIN} --steps 2 --out good"));
    let mut child = in_terminal(&files, "chat model --adapter good --tokens 3");
    let lines = b"/help\nw2 w3\n/adapter none\nw2\n/adapter bad\n/what\n/reset\n/exit\n";
    child.stdin.as_mut().unwrap().write_all(lines).unwrap();
    let text = shown(&mut child);
    assert!(child.wait().unwrap().success(), "{text}");
    for words in [
        "model (llama, 3 layers of 32); good speaks",
        "/adapter NAME",
        "without an adapter",
        "no adapter \"bad\", there are: good",
        "/what: no such command",
        "the conversation is forgotten",
    ] {
        assert!(text.contains(words), "{text} does not contain {words:?}");
    }
}
