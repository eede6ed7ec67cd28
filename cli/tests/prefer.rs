//! Preferences, by the program.

mod common;

use common::{events, put, write, Files};
use serde_json::{json, Value};
use std::fs;

/// Prompts with the answer that goes on counting, and one that does not.
fn pairs(count: usize) -> Vec<Value> {
    let word = |i: usize| format!("w{}", 2 + i % 50);
    let line = |i: usize| {
        let prompt = [word(i), word(i + 1)].join(" ");
        let chosen = format!(" {} {}", word(i + 2), word(i + 3));
        json!({ "prompt": prompt, "chosen": chosen, "rejected": format!(" {}", word(i * 7 + 11)) })
    };
    (0..count).map(line).collect()
}

const TRAIN: &str = "train model pairs.jsonl --valid pairs.jsonl --tokens 1 --rank 4 --batch 6";

fn files() -> Files {
    let files = Files::new();
    put(&files, "pairs.jsonl", &pairs(36));
    files
}

#[test]
fn every_loss_makes_the_chosen_answers_likelier_with_and_without_checkpointing() {
    let files = files();
    for loss in ["dpo", "ipo", "hinge", "robust --label-smoothing 0.1", "orpo"] {
        let options = format!("{TRAIN} --loss {loss} --steps 20 --lr 5e-3 --overwrite");
        let measured = events(&files, &options, "validation");
        let of = |i: usize, name: &str| measured[i][name].as_f64().unwrap();
        assert!(of(1, "loss") < of(0, "loss"), "{loss}: {measured:?}");
        assert!(
            of(1, "margin") > of(0, "margin") && of(1, "accuracy") > 0.9,
            "{loss}: {measured:?}"
        );
        let margin = of(1, "chosen reward") - of(1, "rejected reward");
        assert!((margin - of(1, "margin")).abs() < 1e-6);
        let again = events(&files, &format!("{options} --checkpointing"), "validation");
        assert_eq!(again, measured, "{loss}");
    }
}

#[test]
fn training_begins_where_the_reference_is() {
    let files = files();
    let measured = events(&files, &format!("{TRAIN} --loss dpo --steps 1 --lr 0"), "validation");
    for event in measured {
        assert!((event["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6, "{event}");
        assert_eq!(event["margin"], 0., "{event}");
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_same_adapter() {
    let files = files();
    let options = format!("{TRAIN} --loss dpo --lr 1e-3 --dropout 0.1 --validate-every 2");
    files.ok(&format!("{options} --steps 8 --out whole"));
    files.ok(&format!("{options} --steps 8 --out parts --save-every 4"));
    let error = files.error(&format!("{options} --beta 0.2 --steps 8 --out parts --resume"));
    assert!(error.contains("--loss was dpo --beta 0.1"), "{error}");
    files.ok(&format!("{options} --steps 8 --out parts --resume"));
    let adapter = |run: &str| fs::read(files.path(run).join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("whole"), adapter("parts"));
}

#[test]
fn messages_and_implicit_prompts_are_read_as_explicit_ones() {
    let files = Files::new();
    let template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}";
    write(
        &files.path("model/tokenizer_config.json"),
        &json!({ "eos_token": "w1", "chat_template": template }),
    );
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let (asked, chosen, rejected) =
        (said("user", "w2 w3"), said("assistant", "w4 w5"), said("assistant", "w9"));
    let loss = |line: Value| {
        put(&files, "pairs.jsonl", &[line.clone(), line]);
        let options = format!("{TRAIN} --loss orpo --steps 1 --lr 0 --overwrite");
        events(&files, &options, "validation")[0]["loss"].clone()
    };
    let explicit = loss(json!({ "prompt": [asked], "chosen": [chosen], "rejected": [rejected] }));
    for line in [
        json!({ "chosen": [asked, chosen], "rejected": [asked, rejected] }),
        json!({ "prompt": "w2 w3", "chosen": [asked, chosen], "rejected": [asked, rejected] }),
        json!({ "prompt": "w2 w3", "chosen": [chosen], "rejected": [rejected] }),
    ] {
        assert_eq!(loss(line.clone()), explicit, "{line}");
    }
    let texts = loss(json!({ "prompt": "w2 w3", "chosen": " w4 w5", "rejected": " w9" }));
    assert_ne!(texts, explicit);
    let implicit = json!({ "chosen": "w2 w3 w4 w5", "rejected": "w2 w3 w9" });
    assert_eq!(loss(implicit), texts);
}

#[test]
fn what_is_no_preference_is_refused() {
    let files = files();
    for (line, expected) in [
        (
            json!({ "prompt": "w2", "chosen": "w3", "rejected": "w3" }),
            "chosen answer is the rejected",
        ),
        (json!({ "prompt": "w2", "chosen": "w3" }), "expected \"prompt\", \"chosen\""),
        (json!({ "prompt": 3, "chosen": "w3", "rejected": "w4" }), "the prompt is 3"),
        (json!({ "prompt": "w2", "chosen": [], "rejected": "w4" }), "expected \"prompt\""),
        (json!({ "chosen": [{"role": "user", "content": "w3"}], "rejected": [] }), "chat template"),
    ] {
        let lines = [&pairs(2)[..], std::slice::from_ref(&line)].concat();
        put(&files, "bad.jsonl", &lines);
        let error = files.error("train model bad.jsonl --loss dpo");
        assert!(error.contains("bad.jsonl:3: ") && error.contains(expected), "{line}: {error}");
    }
    let error = files.error("train model pairs.jsonl");
    assert!(error.contains("pairs.jsonl:1: ") && error.contains("--loss dpo"), "{error}");
    let error = files.error("train model data.jsonl --loss dpo");
    assert!(error.contains("data.jsonl:1: expected \"prompt\", \"chosen\""), "{error}");
    let line = json!({ "prompt": "w2", "chosen": " w3 w4 w5", "rejected": " w3 w4 w6" });
    put(&files, "alike.jsonl", &[line.clone(), line]);
    let error = files.error("train model alike.jsonl --loss dpo --length 2");
    assert!(error.contains("alike.jsonl:") && error.contains("--length"), "{error}");
    for (options, expected) in [
        ("--loss dpo --no-packing", "training with --loss has no --no-packing"),
        ("--loss dpo --scale 3", "a language model has no --scale"),
        ("--loss orpo --label-smoothing 0.1", "--loss orpo has no --label-smoothing"),
        ("--beta 0.2", "training without --loss has no --beta"),
        ("--pooling cls", "a language model has no --pooling"),
    ] {
        let error = files.error(&format!("train model pairs.jsonl {options}"));
        assert!(error.contains(expected), "{options}: {error}");
    }
    assert!(!files.path("adapter").exists());
    let encoder = Files::of("bert");
    put(&encoder, "pairs.jsonl", &pairs(4));
    let error = encoder.error("train model pairs.jsonl --loss dpo");
    assert!(error.contains("an encoder has no --loss"), "{error}");
}
