//! Heads that a file ties to its embeddings, and that an adapter changes alone, or without them.

use crate::fixture::*;
use crate::merged::{config, values};
use crate::{largest, CPU};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use loralib::adapter::AdapterConfig;
use loralib::gguf::{merge, merge_to_safetensors, save_adapter, File};
use loralib::layers::LayerKind;
use loralib::merge::merge_into;
use loralib::utils::StateDict;
use loralib::{read_state_dict, LoraWeights, Result};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn pair(path: &str, inputs: usize, outputs: usize) -> Vec<(String, Tensor)> {
    let name = |last: &str| format!("{path}.{last}");
    vec![(name("lora_A"), random(0, &[4, inputs])), (name("lora_B"), random(1, &[outputs, 4]))]
}

fn whole(name: &str, seed: u64) -> Vec<(String, Tensor)> {
    vec![(name.to_owned(), random(seed, &[VOCAB, HIDDEN]))]
}

fn cases() -> Result<Vec<(&'static str, LoraWeights, bool)>> {
    let of = |modules: &[&str], tensors: [Vec<(String, Tensor)>; 2]| {
        let q = "model.layers.0.self_attn.q_proj";
        let tensors: StateDict =
            tensors.into_iter().flatten().chain(pair(q, HIDDEN, HIDDEN)).collect();
        let mut config: AdapterConfig = config(8.);
        config.modules_to_save = modules.iter().map(|m| (*m).to_owned()).collect();
        let kinds = [
            ("model.embed_tokens", LayerKind::Embedding),
            ("lm_head", LayerKind::Linear),
            (q, LayerKind::Linear),
        ];
        let has = |path: &str| tensors.contains_key(&format!("{path}.lora_A"));
        let own = kinds.into_iter().filter(|(path, _)| has(path));
        let config = own.fold(config, |config, (path, kind)| config.with_layer(path, kind));
        LoraWeights::new(config, tensors)
    };
    let table = || pair("model.embed_tokens", VOCAB, HIDDEN);
    let head = || pair("lm_head", HIDDEN, VOCAB);
    Ok(vec![
        ("a table", of(&["embed_tokens"], [whole(TABLE, 2), vec![]])?, true),
        ("a head", of(&["lm_head"], [whole(HEAD, 3), vec![]])?, true),
        ("both", of(&["embed_tokens", "lm_head"], [whole(TABLE, 2), whole(HEAD, 3)])?, true),
        ("one", of(&["embed_tokens", "lm_head"], [whole(TABLE, 2), whole(HEAD, 2)])?, false),
        ("LoRA of a table", of(&[], [table(), vec![]])?, true),
        ("LoRA of a head", of(&[], [head(), vec![]])?, true),
        ("LoRA of both", of(&[], [table(), head()])?, true),
        ("a table that is written into the base's", of(&[], [whole(TABLE, 2), vec![]])?, false),
    ])
}

#[test]
fn merged_files_have_the_heads_of_the_merged_tensors() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let base = File::open(write_model(dir.path(), "llama", false, GgmlDType::F32))?;
    let before: StateDict = values(&base)?.into_iter().collect();
    for (case, weights, untied) in cases()? {
        let expected = merge_into(&before, &weights)?;
        assert_eq!(expected.contains_key(HEAD), untied, "{case}");
        let out = dir.path().join("model.safetensors");
        let json = merge_to_safetensors(&base, &weights, &out, DType::F32, |_| {})?;
        assert_eq!(json["tie_word_embeddings"], !untied, "{case}");
        let file = dir.path().join("merged.gguf");
        merge(&base, &weights, &file, GgmlDType::F32, |_| {})?;
        let merged = File::open(&file)?;
        assert_eq!(merged.config::<serde_json::Value>()?["tie_word_embeddings"], !untied, "{case}");
        let of_gguf = values(&merged)?.into_iter().collect();
        for ours in [read_state_dict(&out, &CPU)?.tensors, of_gguf] {
            assert!(ours.keys().eq(expected.keys()), "{case}");
            for (name, tensor) in &ours {
                let apart = largest(&(tensor - &expected[name])?);
                assert!(apart <= 2e-6 * largest(&expected[name]), "{case} {name}: {apart}");
            }
        }
    }
    Ok(())
}

/// MLX's head follows its table, PEFT's does not.
#[test]
fn adapters_of_which_one_ties_the_head_have_no_sum() -> Result<()> {
    let (_, table, _) = cases()?.remove(4);
    let mut config = table.config();
    config.ensure_weight_tying = true;
    let tied = LoraWeights::new(config, table.state_dict())?;
    let error = loralib::merge::add_weighted(&[(&table, 1.), (&tied, 1.)]).unwrap_err().to_string();
    assert!(error.contains("embed_tokens.lora_A") && error.contains("follows"), "{error}");
    loralib::merge::add_weighted(&[(&tied, 1.), (&tied, 1.)])?;
    Ok(())
}

/// A message of one saver that names another function is followed.
#[test]
fn what_llama_cpp_has_no_place_for_can_be_merged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let base = File::open(write_model(dir.path(), "llama", false, GgmlDType::F32))?;
    for (case, weights, untied) in cases()? {
        let Err(error) = save_adapter(dir.path().join("adapter.gguf"), &weights, &base) else {
            panic!("{case}")
        };
        let error = error.to_string();
        assert!(error.contains("gguf::merge"), "{case}: {error}");
        let out = dir.path().join("merged.gguf");
        merge(&base, &weights, &out, GgmlDType::F32, |_| {})?;
        assert_eq!(File::open(&out)?.tensor("output.weight", &CPU).is_ok(), untied, "{case}");
    }
    Ok(())
}
