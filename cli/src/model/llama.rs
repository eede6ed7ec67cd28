//! Llama and its relatives (Mistral, Qwen2, Qwen3) with Hugging Face's parameter names.
//!
//! The model is written on candle_nn's names, and `use loralib::nn as candle_nn` makes of its layers those that an
//! `Adapter` adapts by name. Nothing else in this file knows of adapters.

use super::attention::Attention;
use super::config::Config;
use super::rope::Rope;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::{linear_b, ops::silu, rms_norm, Embedding, Init, Linear, RmsNorm, VarBuilder};
use loralib::nn as candle_nn;
use std::sync::Arc;

pub struct Llama {
    embed_tokens: Embedding,
    layers: Vec<Arc<Layer>>,
    norm: RmsNorm,
    /// From hidden states to logits.
    pub lm_head: Linear,
    rope: Rope,
    longest: usize,
}

/// The keys and values of a text that grows.
pub struct Cache {
    layers: Vec<KvCache>,
    tokens: usize,
}

impl Llama {
    /// `vb` gives the parameters, and decides which layers have an adapter.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, model) = (cfg.hidden_size, vb.pp("model"));
        // Only a new model, which is narrow, starts from this; 0.02 is for wide ones.
        let init = Init::Randn { mean: 0., stdev: 0.1 };
        let table = model.pp("embed_tokens").get_with_hints((cfg.vocab_size, n), "weight", init)?;
        let embed_tokens = Embedding::new(table, n);
        let lm_head = match cfg.tie_word_embeddings {
            true => Linear::new(embed_tokens.embeddings().clone(), None),
            false => linear_b(n, cfg.vocab_size, false, vb.pp("lm_head"))?,
        };
        let layer = |i| Ok(Arc::new(Layer::new(cfg, model.pp("layers").pp(i))?));
        Ok(Self {
            embed_tokens,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: rms_norm(n, cfg.rms_norm_eps, model.pp("norm"))?,
            lm_head,
            rope: Rope::new(cfg)?,
            longest: cfg.longest(),
        })
    }

    /// Ids (batch, tokens) to hidden states (batch, tokens, hidden_size). With a cache the ids continue the
    /// text in it.
    pub fn hidden(&self, ids: &Tensor, mut cache: Option<&mut Cache>) -> Result<Tensor> {
        let at = self.positions(ids, cache.as_ref().map_or(0, |cache| cache.tokens))?;
        let mut x = self.embed_tokens.forward(ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_mut().and_then(|cache| cache.layers.get_mut(i));
            x = layer.forward(&x, &at, cache)?;
        }
        if let Some(cache) = cache {
            cache.tokens += ids.dim(1)?;
        }
        self.norm.forward(&x)
    }

    /// [`hidden`](Self::hidden) of whole texts, with each layer run by `run`, which gets its path and its input.
    pub fn hidden_by(
        &self,
        ids: &Tensor,
        run: impl Fn(&str, &Tensor, Segment) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let at = self.positions(ids, 0)?;
        let mut x = self.embed_tokens.forward(ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let (layer, at) = (layer.clone(), at.clone());
            let segment = Box::new(move |x: &Tensor| layer.forward(x, &at, None));
            x = run(&format!("model.layers.{i}"), &x, segment)?;
        }
        self.norm.forward(&x)
    }

    /// Of ids that follow `first` others.
    fn positions(&self, ids: &Tensor, first: usize) -> Result<Positions> {
        let (_, tokens) = ids.dims2()?;
        if first + tokens > self.longest {
            bail!("{} tokens, the model takes {}", first + tokens, self.longest)
        }
        let (cos, sin) = self.rope.tables(first, tokens, ids.device())?;
        Ok(Positions { cos, sin })
    }

    /// An empty cache, with room for `tokens` before it grows.
    pub fn cache(&self, tokens: usize) -> Cache {
        Cache { layers: self.layers.iter().map(|_| KvCache::new(1, tokens)).collect(), tokens: 0 }
    }
}

/// A part of the model, from its input to its output.
pub type Segment = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// What depends on the tokens' positions alone.
#[derive(Clone)]
pub struct Positions {
    /// (tokens, head_dim / 2)
    pub cos: Tensor,
    pub sin: Tensor,
}

struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let norm = |name| rms_norm(cfg.hidden_size, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(cfg, vb.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::new(cfg, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, at: &Positions, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let x = (x + self.self_attn.forward(&self.input_layernorm.forward(x)?, at, cache)?)?;
        &x + self.mlp.forward(&self.post_attention_layernorm.forward(&x)?)?
    }
}

/// SwiGLU: `down(silu(gate(x)) ∘ up(x))`.
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, inner, bias) = (cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias);
        Ok(Self {
            gate_proj: linear_b(n, inner, bias, vb.pp("gate_proj"))?,
            up_proj: linear_b(n, inner, bias, vb.pp("up_proj"))?,
            down_proj: linear_b(inner, n, bias, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = silu(&self.gate_proj.forward(x)?)?;
        self.down_proj.forward(&(gate * self.up_proj.forward(x)?)?)
    }
}
