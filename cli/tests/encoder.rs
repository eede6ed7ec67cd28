//! Encoders: embeddings of pairs and labels, by the program.

mod common;

use common::{events, put, Files};
use serde_json::{json, Value};
use std::fs;

/// Sentences of words that tell which of three kinds they are of.
fn labelled(count: usize) -> Vec<Value> {
    let kinds = ["low", "average", "high"];
    let line = |i: usize| {
        let words = (0..2 + i % 4).map(|at| format!("w{}", 3 + (i * 5 + at * 7) % 30));
        let words: Vec<_> = words.chain([format!("w{}", 40 + i % 3)]).collect();
        json!({ "text": words.join(" "), "label": kinds[i % 3] })
    };
    (0..count).map(line).collect()
}

/// Pairs of which each word has one in the other sentence.
fn pairs(count: usize) -> Vec<Value> {
    let line = |i: usize| {
        let [a, b] = [i * 11 % 25, (i * 3 + i / 25 + 7) % 25];
        let [first, second] = [3, 28].map(|from| format!("w{} w{}", from + a, from + b));
        json!({ "anchor": first, "positive": format!("{second} w2") })
    };
    (0..count).map(line).collect()
}

#[test]
fn every_encoder_learns_labels() {
    for name in ["bert", "roberta", "distilbert"] {
        let files = Files::of(name);
        put(&files, "labels.jsonl", &labelled(90));
        let options = "train model labels.jsonl --steps 60 --batch 8 --lr 1e-2 --validate-every 20";
        let measured = events(&files, options, "validation");
        let [first, last] = [0, 3].map(|i| measured[i]["loss"].as_f64().unwrap());
        assert!(last < 0.7 * first, "{name}: {measured:?}");
        let labels = fs::read_to_string(files.path("adapter/labels.json")).unwrap();
        let labels: Value = serde_json::from_str(&labels).unwrap();
        assert_eq!(labels, json!({"id2label": {"0": "average", "1": "high", "2": "low"}}));
    }
}

#[test]
fn every_encoder_learns_embeddings_with_and_without_checkpointing() {
    for name in ["bert", "roberta", "distilbert"] {
        let files = Files::of(name);
        put(&files, "pairs.jsonl", &pairs(50));
        let options = "train model pairs.jsonl --valid pairs.jsonl --steps 30 --batch 6 --lr 3e-3 --dropout 0.1";
        let run = |more: &str| events(&files, &format!("{options} {more}"), "validation");
        let measured = run("--out one");
        let [first, last] = [0, 1].map(|i| measured[i]["loss"].as_f64().unwrap());
        assert!(last < first, "{name}: {measured:?}");
        assert_eq!(run("--out other --checkpointing"), measured, "{name}");
        // A negative makes it harder.
        let with_negative = |mut line: Value| {
            line["negative"] = format!("{} w2", line["anchor"].as_str().unwrap()).into();
            line
        };
        put(&files, "pairs.jsonl", &pairs(50).into_iter().map(with_negative).collect::<Vec<_>>());
        let harder = run("--out third")[0]["loss"].as_f64().unwrap();
        assert!(harder > first, "{name}: {harder} {first}");
    }
}

#[test]
fn a_batch_in_parts_learns_the_same() {
    for name in ["bert", "roberta", "distilbert"] {
        let files = Files::of(name);
        put(&files, "pairs.jsonl", &pairs(50));
        put(&files, "labels.jsonl", &labelled(30));
        let run = |data: &str, more: &str| {
            let options = "--steps 6 --batch 8 --lr 1e-3 --overwrite";
            let options = format!("train model {data} --valid {data} {options} {more}");
            let measured = events(&files, &options, "validation");
            let of = |name: &str| measured[1][name].as_f64().unwrap();
            (measured[0]["loss"].as_f64().unwrap(), of("loss"))
        };
        let (before, whole) = run("pairs.jsonl", "--dims 16,4");
        for part in [1, 3, 8] {
            let (same, parts) = run("pairs.jsonl", &format!("--dims 16,4 --mini-batch {part}"));
            assert!(
                (same - before).abs() < 1e-5 && (parts - whole).abs() < 1e-5,
                "{parts} {whole}"
            );
        }
        assert!(whole < before, "{name}: {before} {whole}");
        run("pairs.jsonl", "--mini-batch 3 --dropout 0.1");
        let error = files.error("train model labels.jsonl --mini-batch 2 --overwrite");
        assert!(error.contains("training with labels has no --mini-batch"), "{error}");
    }
}

#[test]
fn embeddings_are_measured_by_their_first_values_too() {
    let files = Files::of("bert");
    put(&files, "pairs.jsonl", &pairs(50));
    let options =
        "train model pairs.jsonl --valid pairs.jsonl --steps 2 --dims 16,4 --pooling lasttoken";
    let measured = events(&files, options, "validation");
    let of = |name: &str| measured[0][name].as_f64().unwrap();
    assert!(of("recall@1") >= of("recall@1 of 4 values"), "{measured:?}");
    assert!(of("recall@10 of 4 values") >= of("recall@1 of 4 values"), "{measured:?}");
    for (options, expected) in [
        ("--dims 16,99", "--dims 99: the model's embeddings have "),
        ("--dims 4,4", "dims has 4 twice"),
        ("--mini-batch 5", "--mini-batch 5 is more than --batch 4"),
    ] {
        let error = files.error(&format!("train model pairs.jsonl --steps 2 --out new {options}"));
        assert!(error.contains(expected), "{error}");
    }
    let error = files.error("train model pairs.jsonl --steps 2 --dims 16 --resume");
    assert!(error.contains("--dims was 16,4"), "{error}");
}

#[test]
fn a_run_goes_on_with_the_same_options_alone() {
    let files = Files::of("bert");
    put(&files, "labels.jsonl", &labelled(60));
    put(&files, "other.jsonl", &labelled(50));
    files.ok("train model labels.jsonl --steps 4");
    let out = files.ok("train model labels.jsonl --steps 4 --resume");
    assert!(out.contains("has all its 4 steps"), "{out}");
    for (options, expected) in [
        ("labels.jsonl --steps 4 --rank 4", "--rank was 8"),
        ("other.jsonl --steps 4", "DATA has other tokens"),
    ] {
        let error = files.error(&format!("train model {options} --resume"));
        assert!(error.contains(expected), "{error}");
    }
    for options in ["--scale 10", "--pooling cls"] {
        let error = files.error(&format!("train model labels.jsonl --overwrite {options}"));
        assert!(error.contains("training with labels has no --"), "{error}");
    }
    for options in ["--no-packing", "--prompt w2", "--raw", "--temperature 1"] {
        let error = files.error(&format!("train model labels.jsonl --overwrite {options}"));
        assert!(error.contains("an encoder has no --"), "{error}");
    }
    put(&files, "pairs.jsonl", &pairs(60));
    files.ok("train model pairs.jsonl --steps 2 --out embeddings");
    let error =
        files.error("train model pairs.jsonl --steps 2 --scale 10 --out embeddings --resume");
    assert!(error.contains("--scale was 20"), "{error}");
}

#[test]
fn bad_entries_are_refused_by_where_they_stand() {
    let files = Files::of("bert");
    let (label, pair) = (labelled(1).remove(0), pairs(1).remove(0));
    let same = json!({"anchor": "w3", "positive": "w3"});
    let negative = json!({"anchor": "w3", "positive": "w4", "negative": "w4"});
    for (lines, expected) in [
        (vec![json!({"text": "w3"})], &["data:1: ", "\"label\"", "--columns"][..]),
        (vec![json!({"text": " ", "label": 1})], &["data:1: "]),
        (vec![label.clone(), pair.clone()], &["data:2: ", "another form than data:1"]),
        (vec![pair.clone(), same], &["data:2: ", "the anchor is the positive"]),
        (vec![pair.clone(), negative], &["data:2: ", "the negative is the positive"]),
        (vec![pair.clone(); 20], &["nothing to train on", "no two pairs"]),
        (vec![label.clone(); 20], &["one label"]),
        (
            vec![json!({"anchor": "w3", "positive": "w4", "negative": ["w5"]})],
            &["data:1: ", "[\"w5\"]"],
        ),
        (
            vec![json!({"anchor": "w3", "positive": "w4", "negative": 7})],
            &["data:1: ", "negative is 7"],
        ),
        (
            vec![json!({"anchor": "w3", "positive": "w4", "negative_1": "w5"})],
            &["data:1: ", "--columns negative=negative_1"],
        ),
        (vec![json!({"anchor": "w3", "positive": "w55  w4"}); 3], &["give --valid"]),
    ] {
        put(&files, "data", &lines);
        let error = files.error("train model data --steps 1");
        for words in expected {
            assert!(error.contains(words), "{error:?} does not contain {words:?}");
        }
        assert!(!files.path("adapter").exists(), "{error}");
    }
    put(&files, "data", &labelled(9));
    put(&files, "valid", &[json!({"text": "w3", "label": "other"})]);
    let error = files.error("train model data --valid valid");
    assert!(error.contains("valid:1: the label \"other\""), "{error}");
    put(&files, "valid", &[pair]);
    let error = files.error("train model data --valid valid");
    assert!(error.contains("valid:1: it is of another form"), "{error}");
    let error = files.error("train model data --prompt w3");
    assert!(error.contains("--prompt"), "{error}");
    let error = files.error("chat model");
    assert!(error.contains("encoder"), "{error}");
}

/// What the program measures of a folder before its first step.
fn validation(files: &Files, options: &str) -> Value {
    events(files, &format!("train {options} --steps 1"), "validation").remove(0)
}

/// The encoder's names have a prefix in these files; an adapter for embeddings is for a model without.
#[test]
fn a_merged_folder_measures_as_its_adapter_did() {
    for name in ["bert", "roberta", "distilbert"] {
        let files = Files::of(name);
        put(&files, "pairs.jsonl", &pairs(60));
        put(&files, "labels.jsonl", &labelled(60));
        for data in ["pairs.jsonl", "labels.jsonl"] {
            let out = format!("{data}-adapter");
            let train =
                format!("train model {data} --steps 5 --lr 1e-2 --valid {data} --out {out}");
            let trained = events(&files, &train, "validation").remove(1);
            files.ok(&format!("merge --base model --adapter {out} --out {data}-merged"));
            let merged = validation(
                &files,
                &format!("{data}-merged {data} --valid {data} --out {data}-new"),
            );
            let [trained, merged] = [trained, merged].map(|line| line["loss"].as_f64().unwrap());
            assert!(
                (trained - merged).abs() < 1e-5 * trained,
                "{name}, {data}: {trained} {merged}"
            );
            let fits = files.ok(&format!("info {out} --model model"));
            assert!(fits.contains(&format!("fits     model ({name}, 2 layers of 32)")), "{fits}");
        }
    }
}

#[test]
fn the_modules_of_sentence_transformers_are_read_and_merged() {
    let files = Files::of("bert");
    put(&files, "pairs.jsonl", &pairs(60));
    let put = |name: &str, text: &str| {
        fs::create_dir_all(files.path(name).parent().unwrap()).unwrap();
        fs::write(files.path(name), text).unwrap();
    };
    fs::create_dir(files.path("other")).unwrap();
    let modules =
        json!([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_None"}, {"path": "../other"}]);
    put("model/modules.json", &modules.to_string());
    put("model/1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#);
    put("model/onnx/model.onnx", "of the base alone");
    let out = files.ok("train model pairs.jsonl --steps 1");
    assert!(out.contains("cls pooling"), "{out}");
    files.ok("merge --base model --adapter adapter --out merged");
    assert!(files.path("merged/1_Pooling/config.json").exists());
    assert!(!files.path("merged/onnx").exists());
    put("model/1_Pooling/config.json", r#"{"pooling_mode": "max"}"#);
    let error = files.error("train model pairs.jsonl --steps 1 --out new");
    assert!(error.contains("1_Pooling/config.json: the pooling is \"max\""), "{error}");
    put(
        "model/1_Pooling/config.json",
        r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#,
    );
    let error = files.error("train model pairs.jsonl --steps 1 --out new");
    assert!(error.contains("\"cls+mean\"") && error.contains("give --pooling"), "{error}");
}

#[test]
fn a_new_head_is_merged_with_the_names_of_its_labels() {
    let files = Files::of("bert");
    // Without the model's own head and pooler, and without the prefix.
    let path = files.path("model/model.safetensors");
    let tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
    let encoder = tensors
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("bert.")?.to_owned(), tensor)));
    let encoder = encoder.filter(|(name, _)| !name.starts_with("pooler")).collect();
    candle_core::safetensors::save(&encoder, &path).unwrap();
    put(&files, "labels.jsonl", &labelled(60));
    let train = "train model labels.jsonl --steps 5 --valid labels.jsonl";
    let trained = events(&files, train, "validation").remove(1);
    let out = files.ok("merge --base model --adapter adapter --out merged");
    assert!(out.contains("the base has no classifier.bias, classifier.weight, pooler"), "{out}");
    let config = fs::read_to_string(files.path("merged/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["label2id"], json!({"average": 0, "high": 1, "low": 2}));
    let merged = validation(&files, "merged labels.jsonl --valid labels.jsonl --out new");
    let [trained, merged] = [trained, merged].map(|line| line["loss"].as_f64().unwrap());
    assert!((trained - merged).abs() < 1e-5 * trained, "{trained} {merged}");
}

/// Words that the tokenizer does not know are one token.
#[test]
fn sentences_that_are_the_same_to_the_model_are_left_out_and_told() {
    let files = Files::of("bert");
    let mut lines = pairs(30);
    lines.push(json!({"anchor": "other", "positive": "words"}));
    lines.push(json!({"anchor": "w3", "positive": "other", "negative": "words"}));
    put(&files, "data", &lines);
    let told = events(&files, "train model data --valid data --steps 1", "same");
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(told[0]["pairs"], json!(["data:31", "data:32"]));
}

#[test]
fn a_sentence_is_never_its_own_negative_and_no_pair_is_lost() {
    let files = Files::of("bert");
    // Two pairs share a query, and two a sentence.
    let line = |a: &str, b: &str| json!({"anchor": a, "positive": b});
    let lines =
        [line("w2 w3", "w4"), line("w5 w6", "w7"), line("w8 w9", "w10"), line("w2 w3", "w7")];
    put(&files, "data", &lines);
    for seed in 0..8 {
        let options = format!(
            "train model data --valid data --batch 3 --steps 6 --seed {seed} --out o{seed}"
        );
        assert_eq!(events(&files, &options, "step").len(), 6);
    }
    // Most share one query: each batch has one of them.
    let hub = (0..20).map(|i| json!({"anchor": "w2", "positive": format!("w{}", 3 + i)}));
    let others = pairs(12);
    put(&files, "hub", &hub.chain(others).collect::<Vec<_>>());
    let options = "train model hub --valid hub --batch 4 --epochs 1";
    let steps = events(&files, options, "steps").remove(0)["steps"].as_u64().unwrap();
    let lone = events(&files, &format!("{options} --overwrite"), "lone").remove(0)["pairs"]
        .as_u64()
        .unwrap();
    assert_eq!(steps + lone, 20);
}

#[test]
fn labels_are_in_the_order_of_their_values_and_a_rare_one_may_be_held_out() {
    let files = Files::of("bert");
    let values = [json!(10), json!(2.0), json!(0.5), json!(-1.5)];
    let mut lines: Vec<_> =
        (0..40).map(|i| json!({"text": format!("w{}", 2 + i), "label": values[i % 4]})).collect();
    lines.push(json!({"text": "w50", "label": "rare"}));
    put(&files, "data", &lines);
    for seed in 0..20 {
        files.ok(&format!("train model data --steps 1 --seed {seed} --overwrite"));
        let labels = fs::read_to_string(files.path("adapter/labels.json")).unwrap();
        let labels: Value = serde_json::from_str(&labels).unwrap();
        assert_eq!(
            labels["id2label"],
            json!({"0": "-1.5", "1": "0.5", "2": "2.0", "3": "10", "4": "rare"})
        );
    }
}

#[test]
fn what_cannot_be_measured_leaves_the_adapter_as_it_is() {
    let files = Files::of("bert");
    put(&files, "pairs.jsonl", &pairs(60));
    files.ok("train model pairs.jsonl --steps 1");
    let error = files.error("train model pairs.jsonl --steps 1 --batch 1 --overwrite");
    assert!(error.contains("--batch is 1"), "{error}");
    assert!(files.path("adapter/adapter_model.safetensors").exists());
    let modules = json!([{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense"}]);
    fs::write(files.path("model/modules.json"), modules.to_string()).unwrap();
    let error = files.error("train model pairs.jsonl --steps 1 --overwrite");
    assert!(error.contains("modules.json: a module Dense"), "{error}");
    // The head for labels has no use for them.
    put(&files, "labels.jsonl", &labelled(30));
    files.ok("train model labels.jsonl --steps 1 --overwrite");
}
