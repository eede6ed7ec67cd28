//! A reply depends on the text before it alone, however it was read.

mod common;

use common::Files;
use serde_json::Value;
use std::io::Write;
use std::process::Stdio;

/// The texts of the replies.
fn replies(out: &str) -> Vec<String> {
    let events = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let replies = events.filter(|event| event["event"] == "reply");
    replies.map(|event| event["text"].as_str().unwrap().trim().to_owned()).collect()
}

fn reply(files: &Files, options: &str, prompt: &str) -> String {
    let mut command = files.command(&format!("chat model --raw --json {options}"));
    let output = command.args(["--prompt", prompt]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    replies(&String::from_utf8(output.stdout).unwrap()).remove(0)
}

/// Also where Phi-3's rotations change, after 16 tokens.
#[test]
fn a_reply_is_that_of_the_whole_text_read_anew() {
    for name in ["llama", "mistral", "gemma3", "phi3", "phi4_mini"] {
        let files = Files::of(name);
        let (mut text, whole) = ("w3 w4 w5 w6 w7 w8 w9 w10".to_owned(), 14);
        let at_once = reply(&files, &format!("--tokens {whole}"), &text);
        let mut anew = vec![];
        for _ in 0..whole {
            let word = reply(&files, "--tokens 1", &text);
            if word.is_empty() {
                break;
            }
            text = format!("{text} {word}");
            anew.push(word);
        }
        assert_eq!(at_once, anew.join(" "), "{name}");
    }
}

#[test]
fn a_text_that_goes_on_is_read_as_a_whole() {
    for name in ["llama", "phi3"] {
        let files = Files::of(name);
        let mut command = files.command("chat model --json --tokens 4");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"w3 w4 w5\n w6 w7 w8\n w9\n").unwrap();
        let out = child.wait_with_output().unwrap().stdout;
        let said = replies(&String::from_utf8(out).unwrap());
        let mut text = String::new();
        for (turn, expected) in ["w3 w4 w5", "w6 w7 w8", "w9"].iter().zip(&said) {
            text = format!("{text} {turn}");
            assert_eq!(&reply(&files, "--tokens 4", text.trim()), expected, "{name}: {text}");
            text = format!("{text} {expected}");
        }
    }
}
