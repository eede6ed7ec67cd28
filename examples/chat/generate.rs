//! Text, the likeliest token at a time.

use crate::base::Base;
use crate::llama::Llama;
use crate::Result;
use candle_core::{Module, Tensor};

/// What the model says after `prompt`, in `longest` tokens at most. The model computes without a graph.
pub fn generate(model: &Llama, base: &Base, prompt: &[u32], longest: usize) -> Result<String> {
    let longest = longest.min(base.config.longest().saturating_sub(prompt.len()));
    let mut cache = model.cache(prompt.len() + longest);
    let (mut said, mut unread) = (vec![], prompt.to_vec());
    while said.len() < longest {
        let ids = Tensor::new(&unread[..], &base.device)?.unsqueeze(0)?;
        let hidden = model.hidden(&ids, Some(&mut cache))?;
        let last = hidden.narrow(1, unread.len() - 1, 1)?;
        let next = model.lm_head.forward(&last)?.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        if base.tokens.ends(next) {
            break;
        }
        said.push(next);
        unread = vec![next];
    }
    base.tokens.decode(&said)
}
