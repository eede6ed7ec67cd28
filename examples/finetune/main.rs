//! The life of an adapter, on the LoRA paper's own case: a GPT-2 learns to put data into words; its
//! adapter is trained, saved, loaded, merged and measured.
//!
//! `cargo run --release --example finetune` trains a small base on embedded text about hotels first, then adapts it to
//! cafes, and counts the values of new descriptions that the sentences say before and after. Its files go to
//! `target/finetune`.

mod bpe;
mod compare;
mod data;
mod evaluate;
mod generate;
mod gpt2;
mod options;
mod slots;

#[path = "../common/corpus.rs"]
mod corpus;
#[path = "../common/rng.rs"]
mod rng;
#[path = "../common/train.rs"]
mod train;

use bpe::Bpe;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use corpus::{cafes, hotels, other_cafes};
use data::{batches, longest};
use evaluate::batch_loss;
use gpt2::{Config, Gpt2};
use lora::layers::LayerKind;
use lora::{Adapter, LoraConfig};
use loralib as lora;
use options::Options;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use train::{train, Plan};

/// Training allots and frees many tensors of the same sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    match rayon::scope(|_| run(&Options::parse()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A pretrained model on disk.
struct Base {
    weights: PathBuf,
    config: Config,
    bpe: Bpe,
    device: Device,
}

impl Base {
    /// The frozen weights, read anew.
    fn var_builder(&self) -> lora::Result<VarBuilder<'static>> {
        lora::safetensors_var_builder(&self.weights, DType::F32, &self.device)
    }

    fn model(&self, vb: VarBuilder) -> Result<Gpt2> {
        Ok(Gpt2::new(&self.config, vb)?)
    }
}

/// A new adapter of queries and values, as in the paper. In evaluation it computes beside the frozen weights.
fn adapter() -> Adapter {
    let cfg = LoraConfig { r: 16, lora_alpha: 32., merge_weights: false, ..Default::default() };
    let query_and_value = LayerKind::MergedLinear(vec![true, false, true]);
    Adapter::new(cfg).targets(["c_attn"]).with_layer("c_attn", query_and_value).seed(0)
}

fn run(options: &Options) -> Result<()> {
    let Options { quick, device, out } = options;
    fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let base = pretrain(options)?;

    let adapter = adapter();
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?; // every target is a layer of the model
    let lines = cafes(if *quick { 300 } else { 7000 })?;
    let examples = batches(&lines, &base.bpe, device)?;
    let plan = Plan { what: "adapting", epochs: 1, lr: 1e-2, seed: 0 };
    train(adapter.var_map(), adapter.vars()?, &plan, &examples, |batch| batch_loss(&model, batch))?;
    println!("\n{}", adapter.summary()?);
    let file = out.join("adapter.safetensors");
    adapter.save(&file)?;

    let valid = other_cafes(if *quick { 40 } else { 100 })?;
    compare::compare(&base, (&adapter, &model), &file, &valid)
}

/// Trains the small base: a GPT-2 of half a million parameters.
fn pretrain(Options { quick, device, out }: &Options) -> Result<Base> {
    let lines = hotels(if *quick { 400 } else { 7000 })?;
    let texts = lines.iter().flat_map(|line| [&line.description[..], &line.sentence]);
    let bpe = Bpe::train(texts, 1024);
    // As for a base from elsewhere, nothing here has seen the text about cafes; but its lines have to fit.
    let longest = longest(&lines, &bpe).max(longest(&cafes(7000)?, &bpe));
    let config = Config {
        vocab_size: bpe.len(),
        n_positions: longest.next_power_of_two(),
        n_embd: 96,
        n_layer: 4,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
    };
    let vars = VarMap::new();
    let vb = lora::base::seeded(VarBuilder::from_varmap(&vars, DType::F32, device), 0);
    let model = Gpt2::new(&config, vb)?;
    let plan = Plan { what: "pretraining", epochs: 1, lr: 3e-3, seed: 0 };
    let examples = batches(&lines, &bpe, device)?;
    train(&vars, vars.all_vars(), &plan, &examples, |batch| batch_loss(&model, batch))?;
    let weights = out.join("base.safetensors");
    vars.save(&weights)?;
    Ok(Base { weights, config, bpe, device: device.clone() })
}
