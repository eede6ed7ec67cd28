//! BERT and RoBERTa with Hugging Face's parameter names.
//!
//! What differs from a BERT on candle_nn: `lora::Linear`, adapted if [`Adapt`] selects it; a `lora_module!`
//! line for each struct; and the operations of `lora::nn`, which have a backward.

use crate::config::Config;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::VarBuilder;
use lora::nn::attention::multi_head_attention;
use lora::nn::ops::gelu_erf;
use lora::nn::{layer_norm, LayerNorm};
use lora::LoraConfig;
use loralib as lora;

/// The linear layers of the encoder that are adapted, by the last component of their names, and how.
#[derive(Debug, Clone, Default)]
pub struct Adapt {
    pub lora: LoraConfig,
    pub targets: Vec<String>,
}

impl Adapt {
    fn linear(&self, i: usize, o: usize, name: &str, vb: &VarBuilder) -> Result<lora::Linear> {
        let adapted = self.targets.iter().any(|target| target == name);
        // With r = 0 a layer without an adapter, whose frozen weight gets no gradient.
        let cfg = if adapted { self.lora } else { LoraConfig::default() };
        lora::linear(i, o, cfg, vb.pp(name))
    }
}

pub struct Bert {
    embeddings: Embeddings,
    layers: Vec<Layer>,
}

lora::lora_module!(Bert { embeddings, layers });

impl Bert {
    /// `vb` gives the parameters and decides which of them are trained.
    pub fn new(cfg: &Config, adapt: &Adapt, vb: VarBuilder) -> Result<Self> {
        let (n, heads) = (cfg.hidden_size, cfg.num_attention_heads);
        if heads == 0 || !n.is_multiple_of(heads) {
            bail!("hidden_size = {n} does not divide into num_attention_heads = {heads}")
        }
        let layer = |i| Layer::new(cfg, adapt, vb.pp("encoder.layer").pp(i));
        Ok(Self {
            embeddings: Embeddings::new(cfg, vb.pp("embeddings"))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Ids (batch, tokens) to (batch, tokens, hidden_size). `real` (batch, tokens) is 1 for tokens and 0 for
    /// padding; `None` if there is no padding.
    pub fn forward(&self, ids: &Tensor, real: Option<&Tensor>) -> Result<Tensor> {
        // Scores of the padding become -1e9: (batch, 1, 1, tokens), for all heads and tokens.
        let mask = |real: &Tensor| real.affine(1e9, -1e9)?.unsqueeze(1)?.unsqueeze(1);
        let mask = real.map(mask).transpose()?;
        let x = self.embeddings.forward(ids)?;
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, mask.as_ref()))
    }
}

struct Embeddings {
    word: lora::Embedding,
    position: lora::Embedding,
    token_type: lora::Embedding,
    norm: LayerNorm,
    first_position: usize,
}

lora::lora_module!(Embeddings { word, position, token_type; norm, first_position });

impl Embeddings {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let table =
            |rows, name| lora::embedding(rows, cfg.hidden_size, LoraConfig::default(), vb.pp(name));
        Ok(Self {
            word: table(cfg.vocab_size, "word_embeddings")?,
            position: table(cfg.max_position_embeddings, "position_embeddings")?,
            token_type: table(cfg.type_vocab_size, "token_type_embeddings")?,
            norm: layer_norm(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("LayerNorm"))?,
            first_position: cfg.first_position,
        })
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (first, (_, tokens)) = (self.first_position as u32, ids.dims2()?);
        let positions = Tensor::arange(first, first + tokens as u32, ids.device())?;
        let types = positions.zeros_like()?;
        let place = (self.position.forward(&positions)? + self.token_type.forward(&types)?)?;
        self.norm.forward(&self.word.forward(ids)?.broadcast_add(&place)?)
    }
}

struct Layer {
    query: lora::Linear,
    key: lora::Linear,
    value: lora::Linear,
    heads: usize,
    output: Output,
    intermediate: lora::Linear,
    feed_forward: Output,
}

lora::lora_module!(Layer { query, key, value, output, intermediate, feed_forward; heads });

impl Layer {
    fn new(cfg: &Config, adapt: &Adapt, vb: VarBuilder) -> Result<Self> {
        let (n, inner) = (cfg.hidden_size, cfg.intermediate_size);
        let attention = vb.pp("attention.self");
        Ok(Self {
            query: adapt.linear(n, n, "query", &attention)?,
            key: adapt.linear(n, n, "key", &attention)?,
            value: adapt.linear(n, n, "value", &attention)?,
            heads: cfg.num_attention_heads,
            output: Output::new(n, cfg, adapt, vb.pp("attention.output"))?,
            intermediate: adapt.linear(n, inner, "dense", &vb.pp("intermediate"))?,
            feed_forward: Output::new(inner, cfg, adapt, vb.pp("output"))?,
        })
    }

    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, n) = x.dims3()?;
        let heads = (batch, tokens, self.heads, n / self.heads);
        let heads = |layer: &lora::Linear| layer.forward(x)?.reshape(heads);
        let (q, k, v) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let scale = (self.heads as f64 / n as f64).sqrt();
        let y = multi_head_attention(&q, &k, &v, scale, mask)?.flatten_from(2)?;
        let x = self.output.forward(&y, x)?;
        self.feed_forward.forward(&gelu_erf(&self.intermediate.forward(&x)?)?, &x)
    }
}

/// A projection, the residual connection and a norm, at the end of both halves of a layer.
struct Output {
    dense: lora::Linear,
    norm: LayerNorm,
}

lora::lora_module!(Output { dense; norm });

impl Output {
    fn new(inner: usize, cfg: &Config, adapt: &Adapt, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            dense: adapt.linear(inner, cfg.hidden_size, "dense", &vb)?,
            norm: layer_norm(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, y: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(&(self.dense.forward(y)? + x)?)
    }
}
