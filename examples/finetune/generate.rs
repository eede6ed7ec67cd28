//! Descriptions put into words, the likeliest token at a time.

use crate::adapt::load;
use crate::args::Args;
use crate::base::Base;
use crate::data::check_description;
use crate::gpt2::Gpt2;
use crate::Result;
use candle_core::{Device, IndexOp, Tensor};
use lora::{Bias, LoraModule};
use loralib as lora;

/// A sentence is cut after as many tokens.
const LONGEST: usize = 100;

/// `--generate`: with the base and the adapter as they lie on disk.
pub fn say(args: &Args, description: &str, device: &Device) -> Result<()> {
    check_description(description)?;
    let at = args.base.clone().unwrap_or_else(|| args.out.join("base.safetensors"));
    let base = Base::read(&at, args.seed, device)?;
    let path = args.out.join("adapter.safetensors");
    let saved = lora::read_state_dict(&path, device)?;
    let bias = saved_bias(saved.tensors.keys());
    let mut plain = base.plain()?;
    let mut adapted = load(&base, &path, saved.config.unwrap_or(args.lora()), bias)?;
    for (who, model) in [("base", &mut plain), ("adapted", &mut adapted)] {
        model.eval()?;
        println!("{who:<8} {}", generate(model, &base, description, device)?);
    }
    Ok(())
}

/// The biases that were trained with an adapter, by its names.
fn saved_bias<'a>(names: impl Iterator<Item = &'a String>) -> Bias {
    let biases: Vec<_> = names.filter(|name| name.ends_with(".bias")).collect();
    match biases.as_slice() {
        [] => Bias::None,
        biases if biases.iter().all(|name| name.ends_with(".c_attn.bias")) => Bias::LoraOnly,
        _ => Bias::All,
    }
}

pub fn generate(model: &Gpt2, base: &Base, description: &str, device: &Device) -> Result<String> {
    let (tokenizer, positions) = (&base.tokenizer, base.config.n_positions);
    let mut ids = tokenizer.prompt(description)?;
    let start = ids.len();
    if start > positions {
        return Err(format!("{start} tokens of description, the model takes {positions}").into());
    }
    while ids.len() < positions.min(start + LONGEST) {
        let hidden = model.hidden(&Tensor::new(&ids[..], device)?.unsqueeze(0)?)?;
        let logits = model.head(&hidden.i((0, ids.len() - 1))?)?;
        let next = logits.argmax(0)?.to_scalar()?;
        if next == tokenizer.end() {
            break;
        }
        ids.push(next);
    }
    tokenizer.decode(&ids[start..])
}
