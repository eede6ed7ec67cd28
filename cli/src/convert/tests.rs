//! Conversions of the fixtures, and what is refused or left out.

use super::args::Args;
use super::base::metadata;
use super::compare::{compare, Verdict};
use super::left_out;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use clap::{Args as _, FromArgMatches};
use lora::{adapter::AdapterConfig, formats::peft, utils::StateDict, LoraWeights};
use loralib as lora;
use std::fs;
use std::path::Path;

const CPU: Device = Device::Cpu;

fn fixture(name: &str) -> String {
    format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Converts with these arguments: the error, if it fails; then nothing is written.
fn run(from: &str, to: &str, out: &Path, others: &[&str]) -> Option<String> {
    let given = ["--from", from, "--to", to, "--out", out.to_str().unwrap()];
    let command = Args::augment_args(clap::Command::new("convert").no_binary_name(true));
    let matches = command.try_get_matches_from(given.iter().chain(others)).unwrap();
    let args = Args::from_arg_matches(&matches).unwrap();
    let error = super::run(&args, crate::report::Report::new(false)).err().map(|e| e.to_string());
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
        ("formats/mlx", "peft", &["--untied-head"]),
    ];
    for (from, to, others) in cases {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run(&fixture(from), to, &dir.path().join("out"), others), None, "{from} {to}");
    }
}

/// From each format to each, over bases that have the adapter's layers.
#[test]
fn each_format_is_converted_to_each() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (width, layers) = (8, ["self_attn.q_proj", "mlp.down_proj"]);
    let (mut base, mut tensors) = (StateDict::new(), StateDict::new());
    for (layer, frequency) in layers.iter().zip([0.7, 1.3]) {
        let layer = format!("model.layers.0.{layer}");
        base.insert(format!("{layer}.weight"), Tensor::zeros((width, width), DType::F32, &CPU)?);
        for (name, dims) in [("lora_A", (2, width)), ("lora_B", (width, 2))] {
            let values = (Tensor::arange(1f32, 17., &CPU)? * frequency)?.sin()?;
            tensors.insert(format!("{layer}.{name}"), values.reshape(dims)?);
        }
    }
    let cfg = lora::LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    lora::save_state_dict(&tensors, cfg, path("first"))?;
    candle_core::safetensors::save(&base.into_iter().collect(), path("base.safetensors"))?;
    gguf(&path("model.gguf"), width)?;

    let bases = [format!("unet={}", path("base.safetensors")), path("model.gguf")];
    let formats = ["loralib", "peft", "peft-plain", "diffusers", "kohya", "mlx", "gguf"];
    let of_pipelines = |format: &str| matches!(format, "diffusers" | "kohya");
    let converted = |from: (&str, &str), to: &str, out: &str| {
        let named = |format: &str| matches!(format, "kohya" | "gguf");
        let bases = bases.iter().filter(|_| named(from.1) || named(to));
        let mut others = bases.flat_map(|base| ["--base", base]).collect::<Vec<_>>();
        if of_pipelines(from.1) != of_pipelines(to) {
            others.extend(["--component", "unet"]);
        }
        assert_eq!(run(&path(from.0), to, Path::new(&path(out)), &others), None, "{from:?} {to}");
    };
    for from in formats {
        converted(("first", "loralib"), from, from);
        for to in formats {
            let out = format!("{from} to {to}");
            converted((from, from), to, &out);
            // What each step compares is the one before.
            converted((&out, to), "loralib", &format!("{out} and back"));
            let back = lora::read_state_dict(path(&format!("{out} and back")), &CPU)?;
            let back = LoraWeights::new(back.config.unwrap(), back.tensors)?;
            let verdict = compare(&LoraWeights::new(cfg, tensors.clone())?, &back);
            assert!(!matches!(verdict.unwrap(), Verdict::Rounded(_)), "{out}");
        }
    }
    Ok(())
}

/// A file with a layer of Llama.
fn gguf(path: &str, width: usize) -> lora::Result<()> {
    let value = |n: usize| Value::U32(n as u32);
    let (name, blocks, heads) = (Value::String("llama".to_owned()), value(1), value(2));
    let metadata = [
        ("general.architecture", &name),
        ("llama.block_count", &blocks),
        ("llama.attention.head_count", &heads),
    ];
    let zeros = Tensor::zeros((width, width), DType::F32, &CPU)?;
    let zeros = QTensor::quantize(&zeros, GgmlDType::F32)?;
    let names = ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"];
    Ok(gguf_file::write(
        &mut fs::File::create(path)?,
        &metadata,
        &names.map(|name| (name, &zeros)),
    )?)
}

/// In MLX a tied head follows the embedding, in PEFT it does not.
#[test]
fn factors_of_an_embedding_need_an_untied_head_where_formats_differ() {
    let dir = tempfile::tempdir().unwrap();
    let peft = dir.path().join("peft");
    let error = run(&fixture("formats/mlx"), "peft", &peft, &[]);
    assert!(error.as_ref().is_some_and(|error| error.contains("--untied-head")), "{error:?}");
    assert_eq!(run(&fixture("formats/mlx"), "peft", &peft, &["--untied-head"]), None);
    let (peft, back) = (peft.to_str().unwrap(), dir.path().join("back"));
    let error = run(peft, "mlx", &back, &[]);
    assert!(error.as_ref().is_some_and(|error| error.contains("--untied-head")), "{error:?}");
    assert_eq!(run(peft, "mlx", &back, &["--untied-head"]), None);
}

#[test]
fn options_without_a_use_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (others, named) in [
        (&["--r", "4", "--lora-alpha", "3"][..], "leave --r and --lora-alpha out"),
        (&["--entry", "state_dict"], "leave --entry out"),
        (&["--base", "unet=base.safetensors"], "leave --base out"),
        (&["--untied-head"], "leave --untied-head out"),
    ] {
        let error = run(&fixture("peft/pattern"), "loralib", &dir.path().join("out"), others);
        assert!(error.as_ref().is_some_and(|error| error.contains(named)), "{error:?}");
    }
}

#[test]
fn an_entry_of_a_torch_file_is_converted() {
    let options = ["--entry", "state_dict", "--r", "2", "--lora-alpha", "3"];
    for to in ["loralib", "peft", "mlx"] {
        let dir = tempfile::tempdir().unwrap();
        let file = fixture("torch/nested_lightning.pt");
        assert_eq!(run(&file, to, &dir.path().join("out"), &options), None, "{to}");
    }
}

#[test]
fn a_component_is_needed_where_one_side_alone_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let pipeline = fixture("formats/diffusers/new");
    let own = dir.path().join("own").to_str().unwrap().to_owned();
    assert_eq!(run(&fixture("peft/pattern"), "loralib", Path::new(&own), &[]), None);
    for (from, to, others, named) in [
        (&pipeline, "peft", &[][..], "\"text_encoder\", \"unet\""),
        (&pipeline, "mlx", &[], "--component"),
        (&pipeline, "peft", &["--component", "transformer"], "\"unet\""),
        (&fixture("peft/pattern"), "kohya", &[], "--component"),
        (&own, "diffusers", &[], "give --component, one of [\"unet\""),
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
    let zero = Tensor::zeros(1, DType::F32, &CPU).unwrap();
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
        let before = peft::load(fixture(&format!("peft/{case}")), &CPU)?;
        let (config, tensors) = (before.config(), before.state_dict());
        let changed = |config: &AdapterConfig, factor: f64| {
            let scale = |(name, tensor): (&String, &Tensor)| {
                let scaled = name.ends_with("lora_B") || name.ends_with("lora_bias");
                let tensor = if scaled { (tensor * factor)? } else { tensor.clone() };
                Ok((name.clone(), tensor))
            };
            let tensors = tensors.iter().map(scale).collect::<lora::Result<_>>()?;
            LoraWeights::new(config, tensors)
        };
        let mut doubled = config.clone();
        doubled.lora.lora_alpha *= 2.;
        let own = doubled.layers.values_mut().filter_map(|layer| layer.lora_alpha.as_mut());
        own.for_each(|alpha| *alpha *= 2.);
        let verdict = compare(&before, &changed(&doubled, 0.5)?).unwrap();
        assert!(matches!(verdict, Verdict::SameUpdate), "{case}: {verdict}");
        assert!(compare(&before, &changed(&doubled, 1.)?).is_err(), "{case}");
        let verdict = compare(&before, &changed(&config, 1. + 1e-6)?).unwrap();
        assert!(matches!(verdict, Verdict::Rounded(_)), "{case}: {verdict}");
    }
    Ok(())
}

#[test]
fn another_dtype_is_told() -> lora::Result<()> {
    let before = peft::load(fixture("peft/pattern"), &CPU)?;
    let of = |dtype| {
        let convert =
            |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(dtype)?));
        let tensors = before.state_dict().iter().map(convert).collect::<lora::Result<_>>()?;
        LoraWeights::new(before.config(), tensors)
    };
    let verdict = |dtype| compare(&before, &of(dtype)?);
    assert!(matches!(verdict(DType::F32).unwrap(), Verdict::Equal));
    assert!(matches!(verdict(DType::F64).unwrap(), Verdict::OtherDtype));
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
    let none = Vec::<(String, Tensor)>::new();
    fs::write(&path, safetensors::serialize(none, Some(entries.into())).unwrap())?;
    assert_eq!(metadata(&path).unwrap(), ["ss_network_dim"]);
    Ok(())
}
