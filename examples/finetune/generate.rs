//! Descriptions put into words, the likeliest token at a time.

use crate::bpe::{Bpe, END};
use crate::data::prompt;
use crate::gpt2::{Config, Gpt2};
use crate::Result;
use candle_core::{Device, Module, Tensor};

/// A sentence is cut after as many tokens.
const LONGEST: usize = 100;

/// A sentence for each description, all at once.
pub fn generate(
    model: &Gpt2,
    config: &Config,
    bpe: &Bpe,
    descriptions: &[&str],
    device: &Device,
) -> Result<Vec<String>> {
    let mut texts: Vec<_> = descriptions.iter().map(|text| prompt(text, bpe)).collect();
    let starts: Vec<_> = texts.iter().map(Vec::len).collect();
    let mut open: Vec<_> = (0..texts.len()).collect();
    loop {
        open.retain(|&i| texts[i].len() < config.n_positions.min(starts[i] + LONGEST));
        if open.is_empty() {
            break;
        }
        let unfinished: Vec<_> = open.iter().map(|&i| &texts[i][..]).collect();
        let next = next(model, &unfinished, device)?;
        open.iter().zip(&next).for_each(|(&i, &id)| texts[i].push(id));
        open.retain(|&i| texts[i].last() != Some(&END));
    }
    Ok(texts.iter().zip(starts).map(|(ids, start)| bpe.decode(&ids[start..])).collect())
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
    Ok(model.head.forward(&hidden)?.argmax(1)?.to_vec1()?)
}
