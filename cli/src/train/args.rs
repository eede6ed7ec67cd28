//! The options.

use super::columns::Columns;
use super::prefer::Loss;
use crate::chat::Say;
use crate::number::{dropout, half, not_negative, positive};
use crate::place::Place;
use clap::parser::ValueSource;
use clap::ArgMatches;
use lora::train::Pooling;
use lora::{adapter::Targets, layers::InitLoraWeights, LoraConfig};
use loralib as lora;
use std::path::PathBuf;

use crate::Result;

/// Fine-tunes a language model with LoRA (Llama, Mistral, Qwen2 and 3, Gemma 1 to 3, Phi-3 and 4-mini), or an encoder
/// (BERT, RoBERTa, DistilBERT)
///
/// It saves the adapter in PEFT's format, and lets base and adapted model answer one prompt. Without MODEL a tiny
/// Llama is trained first, on embedded text.
#[derive(clap::Args)]
#[command(
    after_help = "Example: lora train Qwen2.5-1.5B-Instruct chats.jsonl --out adapter --rank 16 --steps 500"
)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it (config.json, tokenizer.json, model.safetensors or its
    /// shards), or a GGUF file
    #[arg(requires = "data")]
    pub model: Option<PathBuf>,
    /// What to train on: a .txt file with a text in each line, or JSON Lines or a JSON array with "messages", "prompt" and
    /// "completion", "text", ShareGPT's "conversations", or Alpaca's "instruction", "input" and "output"; for --loss with
    /// "prompt", "chosen" and "rejected"; for an encoder with "text" and "label", or "anchor", "positive" and perhaps "negative"
    pub data: Option<PathBuf>,
    /// What DATA calls the columns text, prompt, completion, messages, chosen, label, anchor or others, as
    /// prompt=question,completion=answer
    #[arg(long, value_name = "NAME=COLUMN,..", requires = "data")]
    pub columns: Option<Columns>,
    /// The model's name for PEFT, such as its repository's on the hub [default: the folder; none for a GGUF file]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub base_model: Option<String>,
    /// What to measure on, in the same format [default: a twentieth of DATA]
    #[arg(long, value_name = "FILE", requires = "data")]
    pub valid: Option<PathBuf>,
    /// Learns which of two answers is preferred, by one of TRL's losses: dpo, ipo, hinge or robust, beside the model without
    /// the adapter, or orpo, without one
    #[arg(long, value_enum, requires = "data")]
    pub loss: Option<Loss>,
    /// With --loss: how much the model is kept near the one without the adapter; for orpo, how much the preference counts
    #[arg(long, default_value_t = 0.1, value_parser = positive)]
    pub beta: f64,
    /// With --loss dpo or robust: the share of the preferences that are taken to be the wrong way round
    #[arg(long, value_name = "SHARE", default_value_t = 0., value_parser = half)]
    pub label_smoothing: f64,
    /// The adapter's rank
    #[arg(long, aliases = ["r", "lora-r"], value_name = "R", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: u32,
    /// The adapter's strength: its update is scaled by alpha / rank
    #[arg(long, alias = "lora-alpha", default_value_t = 16., value_parser = positive)]
    pub alpha: f64,
    /// The probability with which a value of the adapter's input is dropped in training
    #[arg(long, value_name = "P", default_value_t = 0., value_parser = dropout)]
    pub dropout: f32,
    /// How the adapter starts, by PEFT's names: true, gaussian, pissa, pissa_niter_[number] or olora
    #[arg(long, value_name = "NAME", default_value = "true")]
    pub init_lora_weights: InitLoraWeights,
    /// The layers to adapt: all-linear, or names such as q_proj,v_proj
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "all-linear")]
    pub targets: Vec<String>,
    /// Tokens of a language model's tokenizer whose embeddings are trained, too, such as those of a chat template: <|im_start|>,<|im_end|>.
    /// A head that is tied to the embeddings has them, too
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', requires = "data")]
    pub train_tokens: Vec<String>,
    /// The learning rate at its peak [default: 2e-4; with --loss 5e-5; for the tiny model 5e-3]
    #[arg(long, visible_alias = "rate", alias = "learning-rate", value_parser = not_negative)]
    pub lr: Option<f64>,
    /// Steps of the optimizer, those before --resume included [default: 200]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// As many steps as it takes to see each example N times
    #[arg(long, value_name = "N", conflicts_with = "steps", requires = "data")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: Option<u32>,
    /// Rows per batch, each of --length tokens at most; with --loss, pairs of answers
    #[arg(long, alias = "batch-size", value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Batches per step, one after the other: more examples in the same memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub accumulate: u32,
    /// Keeps the activations of one layer at a time, and computes the others again: less memory, more time
    #[arg(long)]
    pub checkpointing: bool,
    /// Gradients of a larger norm are scaled to this one
    #[arg(long, value_name = "NORM", default_value_t = 1., value_parser = positive)]
    pub clip: f64,
    /// Writes the state of the run into --out after each N steps, and on Ctrl-C
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub save_every: u32,
    /// Measures the validation loss after each N steps, and keeps the adapter if it is the best so far
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub validate_every: u32,
    /// Goes on with the run in --out, with the same options
    #[arg(long, requires = "data")]
    pub resume: bool,
    /// Replaces the run in --out
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Tokens of a row: texts are cut into rows, and as many examples as it holds share one without seeing each other;
    /// what an example has behind them is cut off
    #[arg(long, alias = "max-seq-length", value_name = "N", default_value_t = 256)]
    #[arg(value_parser = clap::value_parser!(u32).range(2..))]
    pub length: u32,
    /// The cosines of an encoder's embeddings count so many times in the loss: 1 / temperature
    #[arg(long, default_value_t = 20., value_parser = positive)]
    pub scale: f64,
    /// How an encoder embeds a sentence: mean, cls or lasttoken [default: as sentence-transformers' files in MODEL say, else
    /// mean]
    #[arg(long, value_name = "NAME")]
    pub pooling: Option<Pooling>,
    /// Pairs in the memory of fewer: an encoder keeps the embeddings of a batch, and the activations of N sentences at a time,
    /// which it computes twice
    #[arg(long, value_name = "N", conflicts_with = "checkpointing")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub mini_batch: Option<u32>,
    /// An encoder's embeddings are learned together with their first values, so many of them (Matryoshka), as 384,128,32
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub dims: Vec<u32>,
    /// A row for each example
    #[arg(long)]
    pub no_packing: bool,
    /// Seed of the order of examples, of the new adapter, of its dropout and of what the model says
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
    /// The folder for the adapter, in PEFT's format, and for a GGUF file also as adapter.gguf
    #[arg(long, value_name = "FOLDER", default_value = "adapter")]
    pub out: PathBuf,
    #[command(flatten)]
    pub say: Say,
    /// A few seconds with a tiny new model: no good sentences
    #[arg(long, conflicts_with_all = ["model", "data"])]
    pub quick: bool,
    /// The options that the command line has, by their ids.
    #[arg(skip)]
    given: Vec<String>,
}

/// The options that embeddings alone have, by their ids.
pub const OF_ENCODERS: [&str; 4] = ["pooling", "scale", "mini_batch", "dims"];

impl Args {
    pub fn set_given(&mut self, matches: &ArgMatches) {
        let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        self.given = matches.ids().map(|id| id.to_string()).filter(|id| given(id)).collect();
    }

    /// An error for options that mean nothing to `what` is trained.
    pub fn refuse(&self, what: &str, options: &[&str]) -> Result<()> {
        match options.iter().find(|option| self.given.iter().any(|given| given == *option)) {
            Some(option) => Err(format!("{what} has no --{}", option.replace('_', "-")).into()),
            None => Ok(()),
        }
    }

    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.rank as usize,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            // Measured without merging: a copy of each weight would be as large as the model.
            merge_weights: false,
            init_lora_weights: self.init_lora_weights,
            ..Default::default()
        }
    }

    pub fn targets(&self) -> Targets {
        match &self.targets[..] {
            [all] if all == "all-linear" => Targets::all_linear(),
            names => names.into(),
        }
    }
}
