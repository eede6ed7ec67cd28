//! Descriptions put into words, the likeliest token at a time.

use crate::adapt::load;
use crate::args::Args;
use crate::base::Base;
use crate::data::check_description;
use crate::gpt2::Gpt2;
use crate::Result;
use candle_core::{Device, Tensor};
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
        let sentences = generate(model, &base, &[description], device)?;
        println!("{who:<8} {}", sentences.concat());
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

/// A sentence for each description, all at once.
pub fn generate(
    model: &Gpt2,
    base: &Base,
    descriptions: &[&str],
    device: &Device,
) -> Result<Vec<String>> {
    let (tokenizer, positions) = (&base.tokenizer, base.config.n_positions);
    let texts = descriptions.iter().map(|description| tokenizer.prompt(description));
    let mut texts = texts.collect::<Result<Vec<_>>>()?;
    let starts: Vec<_> = texts.iter().map(Vec::len).collect();
    if let Some(start) = starts.iter().find(|&&start| start > positions) {
        return Err(format!("{start} tokens of description, the model takes {positions}").into());
    }
    let mut open: Vec<_> = (0..texts.len()).collect();
    loop {
        open.retain(|&i| texts[i].len() < positions.min(starts[i] + LONGEST));
        if open.is_empty() {
            break;
        }
        let unfinished: Vec<_> = open.iter().map(|&i| &texts[i][..]).collect();
        let next = next(model, &unfinished, device)?;
        open.iter().zip(&next).for_each(|(&i, &id)| texts[i].push(id));
        open.retain(|&i| texts[i].last() != Some(&tokenizer.end()));
    }
    texts.iter().zip(starts).map(|(ids, start)| tokenizer.decode(&ids[start..])).collect()
}

/// The likeliest next token of each text.
fn next(model: &Gpt2, texts: &[&[u32]], device: &Device) -> Result<Vec<u32>> {
    let width = texts.iter().map(|text| text.len()).max().unwrap_or(0);
    let (mut ids, mut last) = (vec![], vec![]);
    for text in texts {
        last.push((ids.len() + text.len() - 1) as u32);
        ids.extend_from_slice(text);
        ids.resize(last.len() * width, 0);
    }
    let ids = Tensor::from_vec(ids, (texts.len(), width), device)?;
    let hidden = model.hidden(&ids)?.flatten(0, 1)?.index_select(&Tensor::new(last, device)?, 0)?;
    Ok(model.head(&hidden)?.argmax(1)?.to_vec1()?)
}
