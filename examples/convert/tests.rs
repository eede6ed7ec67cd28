//! Conversions of the fixtures, and what is refused or left out.

use crate::args::Args;
use crate::base::metadata;
use crate::compare::{compare, Verdict};
use crate::{convert, left_out};
use candle_core::Device;
use clap::Parser;
use lora::{peft, AdapterConfig, StateDict};
use loralib as lora;
use std::fs;
use std::path::Path;

const CPU: Device = Device::Cpu;

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Converts with these arguments: the error, if it fails; then nothing is written.
fn run(from: &str, to: &str, out: &Path, others: &[&str]) -> Option<String> {
    let given = ["convert", "--from", from, "--to", to, "--out", out.to_str().unwrap()];
    let args = Args::try_parse_from(given.iter().chain(others)).unwrap();
    let error = convert(&args).err().map(|e| e.to_string());
    assert_eq!(out.exists(), error.is_none(), "{error:?}");
    error
}

#[test]
fn every_format_is_written_and_read_again() {
    let unet = ["--component", "unet"];
    let cases: [(&str, &str, &[&str]); 11] = [
        ("peft/pattern", "loralib", &[]),
        ("peft/pattern", "peft-plain", &["--rounded"]),
        ("peft/pattern", "diffusers", &unet),
        ("peft/pattern", "kohya", &unet),
        ("peft/parameters", "peft", &[]),
        ("peft/tokens", "peft", &[]),
        ("peft/lora_bias", "peft", &[]),
        ("formats/diffusers/new", "peft", &unet),
        ("formats/diffusers/new", "kohya", &[]),
        ("formats/diffusers/new", "loralib", &[]),
        ("formats/mlx", "peft", &[]),
    ];
    for (from, to, others) in cases {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run(&fixture(from), to, &dir.path().join("out"), others), None, "{from} {to}");
    }
}

#[test]
fn a_component_is_needed_where_one_side_alone_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let pipeline = fixture("formats/diffusers/new");
    for (from, to, others, named) in [
        (&pipeline, "peft", &[][..], "\"text_encoder\", \"unet\""),
        (&pipeline, "mlx", &[], "--component"),
        (&pipeline, "peft", &["--component", "transformer"], "\"unet\""),
        (&fixture("peft/pattern"), "kohya", &[], "--component"),
        (&fixture("peft/pattern"), "mlx", &["--component", "unet"], "no components"),
    ] {
        let error = run(from, to, &out, others).unwrap();
        assert!(error.contains(named), "{from} {to}: {error}");
    }
    assert_eq!(run(&pipeline, "kohya", &out, &["--component", "unet"]), None);
    let file = lora::read_state_dict(&out, &CPU).unwrap().tensors;
    assert!(file.keys().all(|name| name.starts_with("lora_unet_")), "the others are left out");
}

/// The layers of a file that is written are those of the base, where it is given.
#[test]
fn a_layer_that_the_base_lacks_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.safetensors");
    let (out, weight) = (dir.path().join("out"), "conv_in.weight".to_owned());
    let zero = candle_core::Tensor::zeros(1, candle_core::DType::F32, &CPU).unwrap();
    candle_core::safetensors::save(&[(weight, zero)].into(), &base).unwrap();
    let base = format!("unet={}", base.display());
    let error = run(&fixture("formats/diffusers/new"), "kohya", &out, &["--base", &base]).unwrap();
    assert!(error.contains("lora_unet_conv_in"), "{error}");
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let [from, out] = ["adapter", "out"].map(|name| dir.path().join(name));
    let error = || run(from.to_str().unwrap(), "loralib", &out, &[]).unwrap();
    assert!(error().contains("adapter: No such file"), "{}", error());
    fs::create_dir(&from).unwrap();
    fs::write(from.join("adapter_config.json"), "\u{feff}{").unwrap();
    assert!(error().contains("adapter: adapter_config.json: "), "{}", error());
    let json = fs::read_to_string(fixture("formats/mlx/adapter_config.json")).unwrap();
    fs::write(from.join("adapter_config.json"), format!("\u{feff}{json}")).unwrap();
    assert!(error().contains("adapters.safetensors"), "{}", error());
    let file = fixture("peft/pattern/adapter_model.safetensors");
    assert!(run(&file, "loralib", &out, &[]).unwrap().contains("PEFT"));
    let options = ["--r", "2", "--lora-alpha", "2"];
    let error = run(&fixture("torch/good.pt"), "loralib", &out, &options).unwrap();
    assert!(error.contains("good.pt: it has no lora_A, but "), "{error}");
}

/// Factors that are padded or scaled differently are compared by their updates.
#[test]
fn updates_of_all_kinds_are_compared() -> lora::Result<()> {
    for case in ["parameters", "tokens", "lora_bias", "conv", "groups", "modules"] {
        let (config, tensors) = peft::load_pretrained(fixture(&format!("peft/{case}")), &CPU)?;
        let changed = |factor: f64| -> lora::Result<StateDict> {
            let scale = |(name, tensor): (&String, &candle_core::Tensor)| {
                let scaled = name.ends_with("lora_B") || name.ends_with("lora_bias");
                let tensor = if scaled { (tensor * factor)? } else { tensor.clone() };
                Ok((name.clone(), tensor))
            };
            tensors.iter().map(scale).collect()
        };
        let mut doubled = config.clone();
        doubled.lora.lora_alpha *= 2.;
        let own = doubled.layers.values_mut().filter_map(|layer| layer.lora_alpha.as_mut());
        own.for_each(|alpha| *alpha *= 2.);
        let before = (config, tensors.clone());
        let verdict = compare(&before, &(doubled.clone(), changed(0.5)?)).unwrap();
        assert!(matches!(verdict, Verdict::SameUpdate), "{case}: {verdict}");
        assert!(compare(&before, &(doubled, tensors.clone())).is_err(), "{case}");
        let verdict = compare(&before, &(before.0.clone(), changed(1. + 1e-6)?)).unwrap();
        assert!(matches!(verdict, Verdict::Rounded(_)), "{case}: {verdict}");
    }
    Ok(())
}

#[test]
fn what_does_not_change_the_update_is_reported_when_it_is_left_out() -> lora::Result<()> {
    let mut config = AdapterConfig::default();
    config.lora.lora_dropout = 0.5;
    config.task_type = Some("CAUSAL_LM".to_owned());
    assert!(left_out(&config, &config).is_empty());
    let lost = left_out(&config, &AdapterConfig::default());
    assert_eq!(lost, ["lora_dropout, which was 0.5", "task_type, which was CAUSAL_LM"]);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("lora.safetensors");
    let entries = ["format", "ss_network_dim"].map(|name| (name.to_owned(), "x".to_owned()));
    let none = Vec::<(String, candle_core::Tensor)>::new();
    fs::write(&path, safetensors::serialize(none, Some(entries.into())).unwrap())?;
    assert_eq!(metadata(&path).unwrap(), ["ss_network_dim"]);
    Ok(())
}
