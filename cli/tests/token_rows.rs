//! Embeddings of tokens that are trained beside an adapter.

mod common;

use candle_core::safetensors;
use candle_core::{Device, Tensor};
use common::{events, Files};
use std::collections::HashMap;

const TRAIN: &str = "train model data.jsonl --length 16 --batch 4 --lr 1e-2 --steps 6 --tokens 3";

fn tensors(files: &Files, name: &str) -> HashMap<String, Tensor> {
    safetensors::load(files.path(name), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

#[test]
fn tokens_are_trained_spoken_with_and_merged() {
    let files = Files::new();
    let options = "--train-tokens w5,w9 --valid data.jsonl";
    let measured = events(&files, &format!("{TRAIN} {options}"), "validation");
    let base = tensors(&files, "model/model.safetensors");
    let (name, table) =
        base.iter().find(|(name, _)| name.ends_with("embed_tokens.weight")).unwrap();
    let adapter = tensors(&files, "adapter/adapter_model.safetensors");
    let rows = adapter.iter().find(|(name, _)| name.contains("trainable_tokens_delta"));
    let (rows, table) = (values(rows.unwrap().1), values(table));
    assert_eq!(rows.len(), 2);
    files.ok("merge --base model --adapter adapter --out merged");
    let merged = values(&tensors(&files, "merged/model.safetensors")[name]);
    // w5 is token 5.
    for (i, row) in merged.iter().enumerate() {
        let expected = match i {
            5 => &rows[0],
            9 => &rows[1],
            _ => &table[i],
        };
        assert_eq!(row, expected, "{i}");
        assert!(row != &table[i] || ![5, 9].contains(&i), "{i}");
    }
    let again = "train merged data.jsonl --length 16 --batch 4 --lr 0 --steps 1 --valid data.jsonl --out other";
    let merged = events(&files, again, "validation")[0]["loss"].as_f64().unwrap();
    let loss = measured.last().unwrap()["loss"].as_f64().unwrap();
    assert!((merged - loss).abs() < 1e-4, "{merged} {loss}");
    let said = |options: &str| files.ok(&format!("chat {options} --prompt w5 --tokens 4 --raw"));
    let (adapted, merged) = (said("model --adapter adapter"), said("merged"));
    let last =
        |out: &str| out.lines().last().unwrap().trim_start_matches("adapter ").trim().to_owned();
    assert_eq!(last(&adapted), last(&merged).trim_start_matches("model ").trim());
}

#[test]
fn the_same_tokens_with_checkpointing_and_resumed_and_no_others() {
    let files = Files::new();
    let run = |options: &str| {
        let options = format!("{TRAIN} --train-tokens w5,w9 --valid data.jsonl {options}");
        events(&files, &options, "validation")
    };
    assert_eq!(run("--out one"), run("--out other --checkpointing"));
    let error = files.error(&format!("{TRAIN} --train-tokens w5 --out one --resume"));
    assert!(error.contains("--train-tokens was w5,w9"), "{error}");
    let error = files.error(&format!("{TRAIN} --train-tokens w5,none --out new"));
    assert!(error.contains("--train-tokens none: the tokenizer has no such token"), "{error}");
    let error = files.error(&format!("{TRAIN} --train-tokens w5,w5 --out new"));
    assert!(error.contains("5 twice"), "{error}");
}
