//! Decoders with Hugging Face's parameter names: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3 and Phi-3.
//!
//! The model is written on candle_nn's names, and `use loralib::nn as candle_nn` makes of its layers those that an
//! `Adapter` adapts by name. Nothing else in this file knows of adapters.

use super::attention::Attention;
use super::config::{Activation, Config, Span};
use super::rope::Rotary;
use super::texts::Texts;
use candle_core::{Module, Result, Tensor, D};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::{gelu, silu};
use candle_nn::{linear_b, Embedding, Init, Linear, RmsNorm, VarBuilder};
use loralib::nn as candle_nn;
use std::sync::Arc;

pub struct Decoder {
    config: Config,
    embed_tokens: Embedding,
    layers: Vec<Arc<Layer>>,
    norm: RmsNorm,
    /// From hidden states to logits without their cap, [`Config::logit_softcap`].
    pub lm_head: Linear,
}

/// The keys and values of a text that grows.
pub struct Cache {
    layers: Vec<KvCache>,
    tokens: usize,
}

impl Decoder {
    /// `vb` gives the parameters, and decides which layers have an adapter.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, model) = (cfg.hidden_size, vb.pp("model"));
        // Only a new model, which is narrow, starts from this; 0.02 is for wide ones.
        let init = Init::Randn { mean: 0., stdev: 0.1 };
        let table = model.pp("embed_tokens").get_with_hints((cfg.vocab_size, n), "weight", init)?;
        let embed_tokens = Embedding::new(table, n);
        let lm_head = match cfg.tied {
            true => Linear::new(embed_tokens.embeddings().clone(), None),
            false => linear_b(n, cfg.vocab_size, false, vb.pp("lm_head"))?,
        };
        let layer = |(i, span): (usize, &Span)| {
            Ok(Arc::new(Layer::new(cfg, *span, model.pp("layers").pp(i))?))
        };
        Ok(Self {
            layers: cfg.layers.iter().enumerate().map(layer).collect::<Result<_>>()?,
            norm: norm(cfg, n, model.pp("norm"))?,
            embed_tokens,
            lm_head,
            config: cfg.clone(),
        })
    }

    /// The hidden states (batch, tokens, hidden_size) of ids (batch, tokens) that continue the text in the cache.
    pub fn continued(&self, ids: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let tokens = ids.dim(1)?;
        let at = cache.tokens..cache.tokens + tokens;
        let texts = Texts::one(&self.config, at, ids.device())?;
        let mut x = self.embedded(ids)?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(&x, &texts, Some(cache))?;
        }
        cache.tokens += tokens;
        self.norm.forward(&x)
    }

    /// Whether a text of so many tokens cannot go on in the cache of its first ones, whose rotations were others.
    pub fn turns(&self, first: usize, all: usize) -> bool {
        let turns = |turn: usize| first <= turn && turn < all;
        self.config.rotary.iter().filter_map(Rotary::turn).any(turns)
    }

    /// The hidden states (1, tokens, hidden_size) of ids (1, tokens) that are texts of these lengths, one after another.
    /// Each layer is run by `run`, which gets its path and its input.
    pub fn packed(
        &self,
        ids: &Tensor,
        lens: &[usize],
        run: impl Fn(&str, &Tensor, Segment) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let texts = Texts::packed(&self.config, lens, ids.device())?;
        let mut x = self.embedded(ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let (layer, texts) = (layer.clone(), texts.clone());
            let segment = Box::new(move |x: &Tensor| layer.forward(x, &texts, None));
            x = run(&format!("model.layers.{i}"), &x, segment)?;
        }
        self.norm.forward(&x)
    }

    /// The logits of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.capped()(&self.lm_head.forward(hidden)?)
    }

    /// From the head's outputs to logits: with the model's cap, if it has one.
    pub fn capped(&self) -> impl Fn(&Tensor) -> Result<Tensor> {
        let cap = self.config.logit_softcap;
        move |logits| match cap {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits.clone()),
        }
    }

    /// An empty cache, with room for `tokens` before it grows.
    pub fn cache(&self, tokens: usize) -> Cache {
        Cache { layers: self.layers.iter().map(|_| KvCache::new(1, tokens)).collect(), tokens: 0 }
    }

    fn embedded(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.embed_tokens.forward(ids)?;
        match self.config.gemma {
            true => x * (self.config.hidden_size as f64).sqrt(),
            false => Ok(x),
        }
    }
}

/// A part of the model, from its input to its output.
pub type Segment = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// An RMS norm, in which Gemma's gain is 1 + w.
pub fn norm(cfg: &Config, n: usize, vb: VarBuilder) -> Result<RmsNorm> {
    let start = Init::Const(if cfg.gemma { 0. } else { 1. });
    let w = vb.get_with_hints(n, "weight", start)?;
    Ok(RmsNorm::new(if cfg.gemma { (w + 1.)? } else { w }, cfg.eps))
}

struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    /// Of attention's output, with [`Config::post_norms`].
    after_attention: Option<RmsNorm>,
    /// Of the MLP's input.
    before_mlp: RmsNorm,
    after_mlp: Option<RmsNorm>,
    mlp: Mlp,
}

impl Layer {
    fn new(cfg: &Config, span: Span, vb: VarBuilder) -> Result<Self> {
        let norm = |name| norm(cfg, cfg.hidden_size, vb.pp(name));
        let post = |name| cfg.post_norms.then(|| norm(name)).transpose();
        let before_mlp = match cfg.post_norms {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(cfg, span, vb.pp("self_attn"))?,
            after_attention: post("post_attention_layernorm")?,
            before_mlp: norm(before_mlp)?,
            after_mlp: post("post_feedforward_layernorm")?,
            mlp: Mlp::new(cfg, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, texts: &Texts, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let normed = |y: Tensor, norm: &Option<RmsNorm>| match norm {
            Some(norm) => norm.forward(&y),
            None => Ok(y),
        };
        let y = self.self_attn.forward(&self.input_layernorm.forward(x)?, texts, cache)?;
        let x = (x + normed(y, &self.after_attention)?)?;
        let y = self.mlp.forward(&self.before_mlp.forward(&x)?)?;
        x + normed(y, &self.after_mlp)?
    }
}

/// `down(activation(gate(x)) ∘ up(x))`.
struct Mlp {
    /// Of the gate and of what it lets through, or one of both.
    gate_up: Vec<Linear>,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, inner, bias) = (cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias);
        let of = |outputs, name| linear_b(n, outputs, bias, vb.pp(name));
        Ok(Self {
            gate_up: match cfg.fused {
                true => vec![of(2 * inner, "gate_up_proj")?],
                false => vec![of(inner, "gate_proj")?, of(inner, "up_proj")?],
            },
            down_proj: linear_b(inner, n, bias, vb.pp("down_proj"))?,
            activation: cfg.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let parts = match &self.gate_up[..] {
            [fused] => fused.forward(x)?.chunk(2, D::Minus1)?,
            each => each.iter().map(|layer| layer.forward(x)).collect::<Result<_>>()?,
        };
        let (gate, up) = (parts[0].contiguous()?, parts[1].contiguous()?);
        let gate = match self.activation {
            Activation::Silu => silu(&gate)?,
            Activation::Gelu => gelu(&gate)?,
        };
        self.down_proj.forward(&(gate * up)?)
    }
}
