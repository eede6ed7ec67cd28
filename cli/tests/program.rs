//! The program from outside: what it refuses, how it says so, and a merge.

use candle_core::{safetensors, Device, Result};
use std::process::{Command, Output};

fn lora(options: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lora")).args(options.split_whitespace()).output().unwrap()
}

/// The exit code and what is on the standard error.
fn refused(options: &str) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = lora(options);
    assert!(stdout.is_empty(), "{options}: {}", String::from_utf8_lossy(&stdout));
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn fixture(name: &str) -> String {
    format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn options_that_mean_nothing_are_refused() {
    for (options, expected) in [
        ("train --temperature=-1", "0 or more"),
        ("train --temperature inf", "0 or more"),
        ("train --top-p 0", "above 0 and at most 1"),
        ("train --top-p 1.1", "above 0 and at most 1"),
        ("train --validate-every 0", "0 is not in 1.."),
        ("train --resume", "DATA"),
        ("train model", "DATA"),
        ("train model data --quick", "--quick"),
        ("train model data --resume --overwrite", "--resume"),
        ("train model data --columns body", "NAME=COLUMN"),
        ("chat --adapter adapter", "MODEL"),
    ] {
        let (code, error) = refused(options);
        assert!(code == Some(2) && error.contains(expected), "{options}: {error}");
    }
}

#[test]
fn an_error_is_one_line_with_the_path() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().display();
    for options in [
        format!("train {out}/none {out}/data.jsonl --out {out}"),
        format!("chat {out}/none --adapter {out}"),
        format!("convert --from {out}/none --to peft --out {out}/adapter"),
        format!("merge --base {out}/none --adapter {} --out {out}/m", fixture("peft/linear")),
    ] {
        let (code, error) = refused(&options);
        assert_eq!(code, Some(1), "{options}: {error}");
        assert!(error.starts_with(&format!("error: {out}/none: ")), "{options}: {error}");
        assert_eq!(error.lines().count(), 1, "{options}: {error}");
    }
}

/// The fixture has PEFT's merged weights beside the base's.
#[test]
fn a_merge_gives_peft_s_weights() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let all = safetensors::load(fixture("peft/linear/model.safetensors"), &Device::Cpu)?;
    let named = |prefix: &'static str| {
        let tensors = all.iter();
        tensors.filter_map(move |(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t)))
    };
    let (base, merged) = (dir.path().join("base"), dir.path().join("merged.safetensors"));
    let tensors = named("base.").map(|(name, t)| (name, t.clone())).collect();
    safetensors::save(&tensors, &base)?;
    let (adapter, base, out) = (fixture("peft/linear"), base.display(), merged.display());
    let output = lora(&format!("merge --base {base} --adapter {adapter} --out {out}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ours = safetensors::load(&merged, &Device::Cpu)?;
    for (name, expected) in named("merged.") {
        let apart = (&ours[&name] - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    Ok(())
}

#[test]
fn a_converted_adapter_may_have_another_rank() {
    let dir = tempfile::tempdir().unwrap();
    let (from, out) = (fixture("peft/linear"), dir.path().join("out"));
    let convert = |rank: &str| {
        lora(&format!("convert --from {from} --to peft --out {} --resize {rank}", out.display()))
    };
    let output = convert("1");
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && told.contains("rank 1 keeps "), "{told}");
    let config = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 1,"), "{config}");
    std::fs::remove_dir_all(&out).unwrap();
    let error = String::from_utf8(convert("1000").stderr).unwrap();
    assert!(error.contains("its rank cannot be 1000") && !out.exists(), "{error}");
}

#[test]
fn a_converted_adapter_has_fused_experts_or_a_matrix_for_each() {
    let dir = tempfile::tempdir().unwrap();
    let convert = |from: &str, out: &str, options: &str| {
        let out = dir.path().join(out);
        lora(&format!("convert --from {from} --to peft --out {} {options}", out.display()))
    };
    let split = convert(&fixture("experts/mixtral"), "split", "--split-experts mixtral");
    let told = String::from_utf8(split.stdout).unwrap();
    assert!(told.contains("10 layers"), "{told}");
    let file = safetensors::load(dir.path().join("split/adapter_model.safetensors"), &Device::Cpu);
    let name = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w3.lora_A.weight";
    assert!(file.unwrap().contains_key(name));
    let fused =
        convert(&dir.path().join("split").display().to_string(), "fused", "--fuse-experts 3");
    assert!(fused.status.success(), "{}", String::from_utf8_lossy(&fused.stderr));
    let load = |path: std::path::PathBuf| {
        safetensors::load(path.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
    };
    let (again, first) = (load(dir.path().join("fused")), load(fixture("experts/mixtral").into()));
    assert_eq!(again.len(), first.len());
    for (name, tensor) in first {
        let apart = (&again[&name] - tensor).unwrap().abs().unwrap().max_all().unwrap();
        assert_eq!(apart.to_scalar::<f32>().unwrap(), 0., "{name}");
    }
    let error = convert(&fixture("experts/mixtral"), "none", "--fuse-experts 3");
    let error = String::from_utf8(error.stderr).unwrap();
    assert!(error.contains("no layer is a matrix of an expert"), "{error}");
}
