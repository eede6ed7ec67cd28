//! An adapter for a base: trained, saved, loaded.

use crate::args::Args;
use crate::base::Base;
use crate::data::{batches, Example};
use crate::evaluate::batch_loss;
use crate::gpt2::Gpt2;
use crate::train::{train, Plan};
use crate::Result;
use candle_core::Device;
use candle_nn::VarMap;
use lora::{Bias, LoraConfig, LoraModule, Strict};
use loralib as lora;
use std::path::{Path, PathBuf};

/// An adapter, and the model that trained it.
pub struct Adapter {
    pub vars: VarMap,
    pub model: Gpt2,
    pub trainable: usize,
    /// Where it was saved.
    pub path: PathBuf,
}

/// Trains an adapter of `base` and saves it in `--out`.
pub fn adapt(args: &Args, base: &Base, examples: &[Example], device: &Device) -> Result<Adapter> {
    let (vars, cfg) = (VarMap::new(), args.lora());
    let mut model = base.adapted(cfg, &vars, args.bias)?;
    let trained = lora::mark_only_lora_as_trainable(&vars, args.bias)?;
    let trainable = trained.iter().map(|var| var.elem_count()).sum();
    let shown: usize = if args.quick { 300 } else { 7000 };
    let plan = Plan {
        what: "adapting",
        epochs: args.epochs.map_or(shown.div_ceil(examples.len()), |n| n as usize),
        lr: args.lr.unwrap_or(if base.config.n_embd < 768 { 1e-2 } else { 2e-4 }),
        seed: args.seed,
    };
    model.train()?;
    let size = args.batch as usize;
    train(
        &vars,
        trained,
        &plan,
        |rng| batches(examples, size, Some(rng), device),
        |batch| batch_loss(&model, batch),
    )?;
    let path = args.out.join("adapter.safetensors");
    lora::save_state_dict(&lora::lora_state_dict(&vars, args.bias)?, cfg, &path)?;
    Ok(Adapter { vars, model, trainable, path })
}

/// A new model of `base` with a saved adapter.
pub fn load(base: &Base, adapter: &Path, cfg: LoraConfig, bias: Bias) -> Result<Gpt2> {
    let vars = VarMap::new();
    let model = base.adapted(cfg, &vars, bias)?;
    // Strict: what is missing or left over is an error.
    let _ = lora::load_checkpoint(adapter, &vars, cfg, Strict::Yes)?;
    Ok(model)
}
