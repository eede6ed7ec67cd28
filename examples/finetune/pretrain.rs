//! The small base that is trained where none is given: a GPT-2 of half a million parameters.

use crate::args::Args;
use crate::base::Base;
use crate::data::{batches, encode};
use crate::evaluate::batch_loss;
use crate::gpt2::{Config, Gpt2};
use crate::text::Text;
use crate::tokenizer::Tokenizer;
use crate::train::{train, Plan};
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use loralib::LoraConfig;

/// Trains a base on `text.pretrain`, saves it in `--out` and reads it from there.
pub fn pretrain(args: &Args, text: &Text, device: &Device) -> Result<Base> {
    // As for a base from elsewhere, nothing here has seen the text of the second domain; but its
    // lines have to fit.
    let tokenizer = Tokenizer::train(&text.pretrain, 1024)?;
    let all = [&text.pretrain[..], &text.train, &text.valid].concat();
    let longest = encode(&all, &tokenizer, usize::MAX)?.iter().map(|e| e.ids.len()).max();
    let config = Config {
        vocab_size: tokenizer.len(),
        n_positions: longest.unwrap_or(0).next_power_of_two().max(256),
        n_embd: 96,
        n_layer: 4,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
    };
    let vars = VarMap::new();
    let vb = loralib::seeded(VarBuilder::from_varmap(&vars, DType::F32, device), args.seed);
    let model = Gpt2::new(&config, LoraConfig::default(), vb)?;
    let shown: usize = if args.quick { 400 } else { 7000 };
    let plan = Plan {
        what: "pretraining",
        epochs: shown.div_ceil(text.pretrain.len()),
        lr: 3e-3,
        seed: args.seed,
    };
    let examples = encode(&text.pretrain, &tokenizer, config.n_positions)?;
    train(
        &vars,
        vars.all_vars(),
        &plan,
        |rng| batches(&examples, 8, Some(rng), device),
        |batch| batch_loss(&model, batch),
    )?;
    Base::read(&Base::save(&vars, &config, &tokenizer, &args.out)?, args.seed, device)
}
