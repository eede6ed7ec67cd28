//! A small model with words for tokens, its data, and the program.

#![allow(dead_code, reason = "each test program takes a part")]

use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

pub struct Files {
    dir: TempDir,
}

impl Files {
    pub fn new() -> Self {
        Self::of("llama")
    }

    /// With another of the small models.
    pub fn of(name: &str) -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        let (model, fixture) = (files.path("model"), fixture(name));
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture.join(name), model.join(name)).unwrap();
        }
        write(&model.join("tokenizer.json"), &tokenizer());
        write(&model.join("tokenizer_config.json"), &json!({ "eos_token": "w1" }));
        let lines = (0..60).map(|i| {
            let word = |at: usize| format!("w{}", 2 + (i * 7 + at) % 50);
            let words = |from: usize, n: usize| {
                (from..from + n).map(word).collect::<Vec<_>>().join(" ")
            };
            json!({ "prompt": words(0, 1 + i % 9), "completion": format!(" {}", words(9, 1 + i % 4)) })
        });
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        fs::write(files.path("data.jsonl"), text).unwrap();
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `lora` with these options, in the folder of the files.
    pub fn command(&self, options: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
        command.args(options.split_whitespace()).current_dir(self.dir.path());
        command
    }

    pub fn run(&self, options: &str) -> Output {
        self.command(options).output().unwrap()
    }

    /// The standard output of a success.
    pub fn ok(&self, options: &str) -> String {
        let Output { status, stdout, stderr } = self.run(options);
        assert!(status.success(), "{options}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    }

    /// The one line of an error that is no matter of the options.
    pub fn error(&self, options: &str) -> String {
        let Output { status, stderr, .. } = self.run(options);
        let error = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{options}: {error}");
        assert!(error.starts_with("error: "), "{options}: {error}");
        assert_eq!(error.lines().count(), 1, "{options}: {error}");
        error.trim_end().to_owned()
    }
}

/// JSON Lines.
pub fn put(files: &Files, name: &str, lines: &[Value]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(files.path(name), text).unwrap();
}

/// The events of one name.
pub fn events(files: &Files, options: &str, name: &str) -> Vec<Value> {
    let out = files.ok(&format!("{options} --json"));
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["event"] == name).collect()
}

pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/models", name].iter().collect()
}

/// The words w0 to w59.
pub fn tokenizer() -> Value {
    let vocab: serde_json::Map<_, _> = (0..60).map(|i| (format!("w{i}"), i.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    })
}

pub fn write(path: &Path, json: &Value) {
    fs::write(path, format!("{json:#}\n")).unwrap();
}
