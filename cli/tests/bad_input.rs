//! What the program refuses: each in one line with the file, and nothing is written.

mod common;

use common::{write, Files};
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// What is in the folder of the files.
fn listed(files: &Files) -> Vec<String> {
    let all = fs::read_dir(files.path(".")).unwrap().map(|file| file.unwrap().file_name());
    let mut all: Vec<_> = all.map(|name| name.into_string().unwrap()).collect();
    all.sort();
    all
}

/// Files that are no data, no adapter and no model.
fn bad_files(files: &Files) {
    let put = |name: &str, bytes: &[u8]| fs::write(files.path(name), bytes).unwrap();
    put("empty", b"");
    put("data.csv", b"prompt,completion\nw1,w2\n");
    put("empty.jsonl", b"\n \n");
    put("object.json", b"{\"a\": 1}");
    put("cut.jsonl", b"{\"text\": \"w1 w2\"}\n{\"text\": \"w1");
    put("array.json", b"[{\"text\": \"w2 w3\"}, {\"txt\": \"w4\"}]");
    put(
        "chat.jsonl",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"w2\"}]}\n{\"text\": \"w2\"}",
    );
    put("latin.txt", b"w1 \xe9\n");
    put("table.parquet", b"PAR1....");
    put("cut.gguf", b"GGUF\x03\0\0\0\x01");
    put("cut.safetensors", &[200, 0, 0, 0, 0, 0, 0, 0, b'{']);
    put("noise", &(0..400).map(|i| (i * 37 % 251) as u8).collect::<Vec<_>>());
    fs::create_dir(files.path("folder")).unwrap();
    fs::create_dir(files.path("broken")).unwrap();
    fs::copy(files.path("model/config.json"), files.path("broken/config.json")).unwrap();
    fs::create_dir(files.path("other")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(files.path("model").join(name), files.path("other").join(name)).unwrap();
    }
    let config = fs::read_to_string(files.path("other/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["model_type"] = json!("bert");
    write(&files.path("other/config.json"), &config);
    put("locked.jsonl", b"{\"text\": \"w1 w2\"}\n");
    fs::set_permissions(files.path("locked.jsonl"), fs::Permissions::from_mode(0o000)).unwrap();
}

/// Commands, and words of their errors.
const REFUSED: &[(&str, &[&str])] = &[
    ("train none data.jsonl", &["none: no such folder or file", "hf download"]),
    ("train folder data.jsonl", &["folder: config.json"]),
    ("train broken data.jsonl", &["broken: tokenizer.json: No such file"]),
    ("train other data.jsonl", &["other/config.json: hidden_act", "\"gelu\""]),
    ("train hub/model data.jsonl", &["hub/model: ", "hf download"]),
    ("train data.jsonl model", &["data.jsonl: ", "the model comes first"]),
    ("train model/model.safetensors data.jsonl", &["model.safetensors: ", "give the folder"]),
    ("train good data.jsonl", &["good: it is an adapter"]),
    ("train model data.jsonl --out other", &["other: it is a model's folder"]),
    ("train model data.jsonl --out empty", &["empty: it is a file"]),
    ("train model data.jsonl --out good", &["good/", "--resume", "--overwrite"]),
    ("train model data.jsonl --columns text=body", &["data.jsonl:1: no column \"body\""]),
    ("train model data.csv", &["data.csv:1: ", "JSON Lines"]),
    ("train cut.gguf data.jsonl", &["cut.gguf: "]),
    ("train noise data.jsonl", &["noise"]),
    ("train model none.jsonl", &["none.jsonl: no such file"]),
    ("train model empty", &["empty: it is empty"]),
    ("train model empty.jsonl", &["empty.jsonl: it is empty"]),
    ("train model object.json", &["object.json:1: ", "\"text\"", "--columns"]),
    ("train model cut.jsonl", &["cut.jsonl:2: "]),
    ("train model array.json", &["array.json[1]: ", "\"completion\""]),
    ("train model chat.jsonl", &["chat.jsonl:1: ", "no chat template"]),
    ("train model latin.txt", &["latin.txt:1: "]),
    ("train model table.parquet", &["table.parquet: ", "JSON Lines"]),
    ("train model noise", &["noise:1: "]),
    ("train model data.jsonl --valid none", &["none: No such file"]),
    ("train model data.jsonl --columns prompt=question", &["data.jsonl:1: "]),
    ("train model data.jsonl --targets q_pro", &["q_pro"]),
    ("train model data.jsonl --targets layers", &["layers"]),
    ("train model data.jsonl --rank 1000000", &["--rank 1000000 is above"]),
    ("chat model --system w2 --prompt w3", &["--system", "no chat template"]),
    ("train model data.jsonl --resume", &["state.safetensors"]),
    ("chat none", &["none: "]),
    ("chat model --adapter nothing", &["nothing: No such file"]),
    ("chat model --adapter none", &["\"none\" is the model alone"]),
    ("chat model --adapter folder", &["folder: "]),
    ("chat model --adapter model", &["model: it is a model, expected an adapter"]),
    ("chat model --adapter noise", &["noise: "]),
    ("chat model --adapter object.json", &["object.json: it is JSON"]),
    ("chat model --adapter cut.gguf", &["cut.gguf: "]),
    ("chat model --adapter good --adapter good", &["\"good\"", "NAME=good"]),
    ("merge --base none --adapter good --out merged", &["none: "]),
    ("merge --base folder --adapter good --out merged", &["folder"]),
    ("merge --base model --adapter none --out merged", &["none: "]),
    ("merge --base model --adapter cut.safetensors --out merged", &["cut.safetensors: "]),
    ("merge --base model --adapter good --out good", &["good exists"]),
    ("merge --base model --adapter good --out merged.gguf", &["merged.gguf: ", "GGUF base"]),
    ("merge --base model --adapter good --out merged --dtype f16", &["--dtype"]),
    ("merge --base cut.gguf --adapter good --out merged", &["cut.gguf: "]),
    ("convert --from none --to peft --out new", &["none: "]),
    ("convert --from data.jsonl --to peft --out new", &["data.jsonl: it is JSON"]),
    ("convert --from model --to peft --out new", &["model: it is a model"]),
    ("convert --from good --to loralib --out good", &["good exists"]),
    ("info none", &["none: No such file"]),
    ("info folder", &["folder: "]),
    ("info empty", &["empty: it is empty"]),
    ("info object.json", &["object.json: it is JSON"]),
    ("info cut.gguf", &["cut.gguf: "]),
    ("info model --svg picture.svg", &["model: it is a model"]),
    ("info good --svg none/picture.svg", &["none/picture.svg: "]),
];

#[test]
fn bad_files_are_errors_of_one_line_and_nothing_is_written() {
    let files = Files::new();
    files.ok("train model data.jsonl --steps 1 --length 16 --rank 2 --tokens 1 --out good");
    bad_files(&files);
    let before = listed(&files);
    for (command, expected) in REFUSED {
        let error = files.error(command);
        for words in *expected {
            assert!(error.contains(words), "{command}: {error:?} does not contain {words:?}");
        }
        for words in ["Some(", "None", "Error {", "backtrace", "Tensor["] {
            assert!(!error.contains(words), "{command}: {error:?}");
        }
        assert_eq!(listed(&files), before, "{command}: {error}");
    }
}

#[test]
fn numbers_without_a_meaning_are_refused() {
    let files = Files::new();
    for (options, expected) in [
        ("--rank 0", "--rank"),
        ("--rank -1", "--rank"),
        ("--rank 1.5", "--rank"),
        ("--alpha x", "--alpha"),
        ("--alpha nan", "--alpha"),
        ("--alpha inf", "--alpha"),
        ("--dropout 1", "--dropout"),
        ("--dropout -0.1", "--dropout"),
        ("--dropout nan", "--dropout"),
        ("--init-lora-weights big", "--init-lora-weights"),
        ("--lr nan", "--lr"),
        ("--lr -1", "--lr"),
        ("--steps 0", "--steps"),
        ("--batch 0", "--batch"),
        ("--accumulate 0", "--accumulate"),
        ("--clip 0", "--clip"),
        ("--clip nan", "--clip"),
        ("--length 1", "--length"),
        ("--seed -1", "--seed"),
        ("--device tpu", "--device"),
        ("--tokens x", "--tokens"),
        ("--frobnicate", "--frobnicate"),
    ] {
        let output = files.run(&format!("train model data.jsonl {options}"));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options}: {error}");
        assert!(error.contains(expected), "{options}: {error}");
        assert!(!files.path("adapter").exists(), "{options}");
    }
}

/// The tests of CI may run as root, for whom no file is locked.
#[test]
fn a_file_without_permission_is_told() {
    let files = Files::new();
    bad_files(&files);
    if fs::read(files.path("locked.jsonl")).is_err() {
        let error = files.error("train model locked.jsonl");
        assert!(error.contains("locked.jsonl: Permission denied"), "{error}");
    }
}
