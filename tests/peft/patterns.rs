//! `rank_pattern` and `alpha_pattern` with groups, alternatives and lookaheads: each layer loads with the
//! rank and alpha that PEFT gives it.

use crate::common::{bits, rnd};
use crate::CPU;
use candle_core::DType;
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::formats::peft;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::path::Path;

/// Layers with their rank and alpha. Python's `re` gives them for each of the patterns below.
const LAYERS: [(&str, usize, f64); 8] = [
    ("text.layers.0.q_proj", 3, 5.),
    ("text.layers.0.k_proj", 3, 5.),
    ("text.layers.0.v_proj", 2, 4.),
    ("text.layers.1.q_proj", 3, 5.),
    ("text.layers.12.q_proj", 7, 4.),
    ("text.layers.12.v_proj", 7, 4.),
    ("vision.layers.0.q_proj", 2, 9.),
    ("vision.layers.12.mlp.down", 2, 9.),
];

/// Saves the layers, and returns their tensors.
fn save(dir: &Path) -> lora::Result<StateDict> {
    let lora = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
    let mut config = AdapterConfig::from(lora);
    let mut adapter = StateDict::new();
    for (seed, (path, r, alpha)) in LAYERS.into_iter().enumerate() {
        let layer = LayerConfig { r: Some(r), lora_alpha: Some(alpha), ..Default::default() };
        config.layers.insert(path.to_owned(), layer);
        for (last, dims) in [("lora_A", [r, 6]), ("lora_B", [5, r])] {
            let tensor = rnd(seed as u64, &dims, DType::F32)?.to_device(&CPU)?;
            adapter.insert(format!("{path}.{last}"), tensor);
        }
    }
    peft::save(dir, &LoraWeights::new(config, adapter.clone())?)?;
    Ok(adapter)
}

/// Loads the layers with these patterns in place of those that were written.
fn load(
    dir: &Path,
    ranks: serde_json::Value,
    alphas: serde_json::Value,
) -> lora::Result<LoraWeights> {
    let path = dir.join("adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?).unwrap();
    assert_eq!((&json["r"], &json["lora_alpha"]), (&2.into(), &4.into()));
    json["rank_pattern"] = ranks;
    json["alpha_pattern"] = alphas;
    std::fs::write(&path, json.to_string())?;
    peft::load(dir, &CPU)
}

#[test]
fn patterns_give_each_layer_its_rank() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let adapter = save(dir.path())?;
    let ranks = [
        // Alternatives and groups.
        serde_json::json!({
            r"text\.layers\.(0|1)\.(q|k)_proj": 3,
            r"text\.layers\.[1-9]\d\.\w+": 7,
        }),
        // Lookaheads, and alternatives at the top level.
        serde_json::json!({
            r"^(?!vision).*\.[01]\.(?!v_)\w_proj": 3,
            r"text\.layers\.12\.q_proj|text\.layers\.12\.v_proj": 7,
        }),
        // Groups that are not captured, and an anchored path.
        serde_json::json!({
            r"^text.layers.0.(?:q|k)_proj": 3,
            r"layers.1.q_proj": 3,
            r"(?=.*\b12\.).*_proj": 7,
        }),
    ];
    let alphas = [
        serde_json::json!({ r"^(?!text).*": 9, r"text\.layers\.\d\.[qk].*": 5 }),
        serde_json::json!({ r"vision\.(.*\.)?(q_proj|down)": 9, r"text\..*(?<!12)\.(q|k)_proj": 5 }),
        serde_json::json!({ r"text|vision.*": 9, r"text.layers.[01]\b(?!.v_proj).*": 5 }),
    ];
    for (rank_pattern, alphas) in ranks.into_iter().zip(alphas) {
        let weights = load(dir.path(), rank_pattern.clone(), alphas)?;
        let (config, tensors) = (weights.config(), weights.state_dict());
        for (path, r, alpha) in LAYERS {
            let own = config.lora_config(path);
            assert_eq!((own.r, own.lora_alpha), (r, alpha), "{path} of {rank_pattern}");
        }
        assert!(tensors.keys().eq(adapter.keys()));
        for (name, tensor) in &tensors {
            assert_eq!(bits(tensor)?, bits(&adapter[name])?, "{name}");
        }
    }
    Ok(())
}

/// The text of a file, since `serde_json::Value` sorts an object's keys.
fn load_text(dir: &Path, ranks: &str) -> lora::Result<LoraWeights> {
    load(dir, serde_json::json!("RANKS"), serde_json::json!({}))
        .expect_err("a text is no object of patterns");
    let path = dir.join("adapter_config.json");
    let json = std::fs::read_to_string(&path)?.replace(r#""RANKS""#, ranks);
    std::fs::write(&path, json)?;
    peft::load(dir, &CPU)
}

#[test]
fn the_first_pattern_of_the_file_counts() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    save(dir.path())?;
    // A repeated key keeps its place and takes the last value, as in Python.
    for ranks in [
        r#"{".*\\.12\\..*_proj": 7, "text.*(q|k)_proj": 3}"#,
        r#"{"text\\..*\\.12\\.": 1, ".*12.*_proj": 2, "text.*(q|k)_proj": 3, ".*12.*_proj": 7}"#,
    ] {
        let config = load_text(dir.path(), ranks)?.config();
        for (path, r, _) in LAYERS {
            assert_eq!(config.lora_config(path).r, r, "{path} of {ranks}");
        }
    }
    let other = load_text(dir.path(), r#"{"text.*(q|k)_proj": 3, ".*\\.12\\..*_proj": 7}"#);
    let error = other.unwrap_err().to_string();
    assert!(error.contains("text.layers.12.q_proj.lora_A") && error.contains("rank 3"), "{error}");
    Ok(())
}

#[test]
fn patterns_that_do_not_fit_are_errors() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    save(dir.path())?;
    let none = || serde_json::json!({});
    let refused = |ranks, words: &[&str]| {
        let error = load(dir.path(), ranks, none()).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(serde_json::json!({ "(q|k)_proj": 3 }), &["lora_A", "rank"]);
    refused(serde_json::json!({ "(q": 3 }), &["rank_pattern", "(q"]);
    refused(serde_json::json!(["q"]), &["adapter_config.json", "expected an object"]);
    Ok(())
}
