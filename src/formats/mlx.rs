//! MLX's folders: `adapters.safetensors` and an `adapter_config.json` of its own.
//!
//! Its factors are transposed: `lora_a` (in, r) and `lora_b` (r, out). Its `scale` is the factor of the update, not
//! divided by r: it is alpha / r. Rank and scale are common to all layers.

use super::layers::{adapter, layers, Pairs, Role};
use super::peft::shortest;
use crate::files::{folder, read, serialize, without_byte_order_mark, StateDict};
use crate::layers::{LayerKind, Part};
use crate::weights::{origin, uniform, AdapterConfig, LoraWeights};
use crate::{Error, Result};
use candle_core::Device;
use serde::Deserialize;
use serde_json::{json, Value};
use std::fs;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const SAFETENSORS: &str = "adapters.safetensors";

/// The names of embeddings, whose factors look like a linear layer's.
const TABLES: [&str; 2] = ["embed_tokens", "wte"];

fn is_table(path: &str) -> bool {
    path.rsplit('.').next().is_some_and(|last| TABLES.contains(&last))
}

/// What the configuration says about the update; MLX keeps its training options there too.
#[derive(Deserialize)]
struct Config {
    fine_tune_type: Option<String>,
    lora_parameters: Parameters,
}

#[derive(Deserialize)]
struct Parameters {
    rank: usize,
    scale: Option<f64>,
    #[serde(default)]
    dropout: f32,
    alpha: Option<Value>,
}

/// Reads a folder. `embed_tokens` and `wte` are embeddings, all other layers are linear. A head that the base ties to an
/// embedding follows it (`ensure_weight_tying`).
///
/// # Errors
/// If a file is missing or malformed; if it is no LoRA (DoRA, full fine-tuning, adapters of experts); if the
/// configuration has an `alpha`, which old versions of MLX multiply and new ones ignore; if a layer lacks a
/// factor or has another rank; and if a value is not finite. The error names the file and the tensor.
pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<LoraWeights> {
    let (config, file) = (dir.as_ref().join(CONFIG), dir.as_ref().join(SAFETENSORS));
    let (Parameters { rank, dropout, .. }, scale) =
        read_config(&config).map_err(|e| e.at(&config))?;
    let load = || {
        let mut pairs = Pairs::default();
        for (key, tensor) in read(&file, device)?.0 {
            let (path, role) = match key.rsplit_once('.') {
                Some((path, "lora_a")) => (path.to_owned(), Role::A),
                Some((path, "lora_b")) => (path.to_owned(), Role::B),
                _ => {
                    let reason = "it is neither lora_a nor lora_b of a layer";
                    let reason = origin(&key).unwrap_or(reason);
                    return Err(Error::tensor(key, reason));
                }
            };
            if tensor.rank() != 2 {
                let reason = format!("its shape is {:?}, expected a matrix", tensor.dims());
                return Err(Error::tensor(key, reason));
            }
            let tensor = tensor.t()?.contiguous()?;
            pairs.insert(path, role, key, tensor)?;
        }
        let mut all = pairs.into_layers()?;
        for layer in &mut all {
            let own = layer.a.dim(0)?;
            if own != rank {
                let reason = format!("its rank is {own}, that in {CONFIG} {rank}");
                return Err(Error::tensor(&layer.key, reason));
            }
            layer.alpha = Some(scale * rank as f64);
            layer.embedding = is_table(&layer.path);
        }
        let mut config = AdapterConfig::default();
        config.lora.lora_dropout = dropout;
        config.ensure_weight_tying = true;
        adapter(config, all)
    };
    load().map_err(|e: Error| e.at(&file))
}

/// The options, and the scale.
fn read_config(path: &Path) -> Result<(Parameters, f64)> {
    let malformed =
        |reason: String| Error::Invalid(format!("it is no configuration of MLX: {reason}"));
    let config: Config = serde_json::from_slice(without_byte_order_mark(&fs::read(path)?))
        .map_err(|e| malformed(e.to_string()))?;
    if let Some(other) = config.fine_tune_type.filter(|kind| kind != "lora") {
        let what = format!("the option fine_tune_type = {other:?}");
        return Err(Error::unsupported(what, "only \"lora\" is"));
    }
    let parameters = config.lora_parameters;
    if let Some(alpha) = &parameters.alpha {
        let reason = "old versions of MLX scale by scale * alpha / rank, new ones by scale: write \
                      that of yours as `scale` and remove `alpha`";
        return Err(Error::unsupported(format!("the option alpha = {alpha}"), reason));
    }
    let Some(scale) = parameters.scale else {
        return Err(malformed("lora_parameters has no scale".to_owned()));
    };
    if !(0. ..1.).contains(&parameters.dropout) {
        return Err(malformed(format!("dropout = {}", parameters.dropout)));
    }
    Ok((parameters, scale))
}

/// Writes a folder. Layers of smaller ranks are padded with zeros, and those with another scaling than the
/// most frequent one have the ratio multiplied into their B, in F32 at least, which is exact if it is a power
/// of two. All other factors keep their bits.
///
/// The files appear complete or not at all. Equal contents give equal bytes.
///
/// # Errors
/// If the adapter has something other than factors of linear layers, or of embeddings that are not named
/// `embed_tokens` or `wte`, or with `fan_in_fan_out`; if a head that is tied to an embedding would not follow it
/// (`ensure_weight_tying`); if a value is not finite; and if the file system refuses.
pub fn save(dir: impl AsRef<Path>, weights: &LoraWeights) -> Result<()> {
    let dir = dir.as_ref();
    let convert = || {
        let weights = &*weights.joined()?;
        let apart = weights.tied_without_factors();
        if let Some(path) = apart.filter(|_| !weights.options.ensure_weight_tying) {
            let reason = "in MLX the head follows this table if it is tied to it: merge the adapter or, if the head is \
                          not tied, set the configuration's ensure_weight_tying (`lora convert --untied-head`)";
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        let (mut keys, mut factors) = (vec![], vec![]);
        for (path, layer, own) in layers(weights, "MLX's format", false)? {
            let kind = layer.kind.as_ref().unwrap_or(&LayerKind::Linear);
            let fits = match kind {
                LayerKind::Embedding => is_table(path),
                kind => kind.is_linear() && !is_table(path),
            };
            if !fits {
                let reason = format!("MLX has no {kind:?} of this name");
                return Err(Error::tensor(Part::A.at(path), reason));
            }
            keys.push(path);
            factors.push(own.without_rslora(weights.options.lora.rslora));
        }
        let (factors, alpha, rank) = uniform(factors, |alpha| alpha)?;
        let mut file = StateDict::new();
        for (path, factors) in keys.iter().zip(factors) {
            file.insert(format!("{path}.lora_a"), factors.a.t()?.contiguous()?);
            file.insert(format!("{path}.lora_b"), factors.b.t()?.contiguous()?);
        }
        // MLX compares the keys with the paths of all modules; -1 stands for all blocks.
        let json = json!({
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": {
                "rank": rank, "scale": alpha / rank as f64, "dropout": shortest(weights.options.lora.lora_dropout), "keys": keys,
            },
        });
        Ok((serialize(&file, None)?, format!("{json:#}\n")))
    };
    let (bytes, json) = convert().map_err(|e: Error| e.at(dir))?;
    let write = folder::replace(dir, (SAFETENSORS, &bytes), (CONFIG, json.as_bytes()));
    write.map_err(|e| e.at(dir))
}
