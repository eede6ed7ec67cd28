//! Text, a token at a time.

use super::sample::Sampler;
use crate::model::Base;
use crate::model::Llama;
use crate::Result;
use candle_core::{Module, Tensor};

/// What the model says after `prompt`, in `longest` tokens at most. The model computes without a graph.
pub fn generate(
    model: &Llama,
    base: &Base,
    prompt: &[u32],
    longest: usize,
    sampler: &mut Sampler,
) -> Result<String> {
    let (read, takes) = (prompt.len(), base.config.longest());
    if read >= takes {
        return Err(format!("{read} tokens to answer to, the model takes {takes}").into());
    }
    let longest = longest.min(takes - read);
    let mut cache = model.cache(read + longest);
    let (mut said, mut unread) = (vec![], prompt.to_vec());
    while said.len() < longest {
        let ids = Tensor::new(&unread[..], &base.device)?.unsqueeze(0)?;
        let hidden = model.hidden(&ids, Some(&mut cache))?;
        let last = hidden.narrow(1, unread.len() - 1, 1)?;
        let next = sampler.next(&model.lm_head.forward(&last)?.flatten_all()?)?;
        if base.tokens.ends(next) {
            break;
        }
        said.push(next);
        unread = vec![next];
    }
    base.tokens.decode(&said)
}
