//! BERT with Hugging Face's parameter names. One line makes its layers a place for adapters, and gives each operation a
//! backward: `use loralib::nn as candle_nn`.

use candle_core::{Module, Result, Tensor};
use candle_nn::attention::multi_head_attention;
use candle_nn::ops::gelu_erf;
use candle_nn::{embedding, layer_norm, linear, Embedding, LayerNorm, Linear, VarBuilder};
use loralib::nn as candle_nn;
use serde_json::Value;

pub struct Bert {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    /// `cfg` is the folder's config.json.
    pub fn new(cfg: &Value, vb: VarBuilder) -> Result<Self> {
        let size = |name: &str| match cfg[name].as_u64() {
            Some(size) if size > 0 => Ok(size as usize),
            _ => candle_core::bail!("config.json: {name} is {}", cfg[name]),
        };
        let (n, tables) = (size("hidden_size")?, vb.pp("embeddings"));
        let table = |rows: &str, name| embedding(size(rows)?, n, tables.pp(name));
        let (heads, inner) = (size("num_attention_heads")?, size("intermediate_size")?);
        let layer = |i| Layer::new(n, heads, inner, vb.pp("encoder.layer").pp(i));
        Ok(Self {
            word: table("vocab_size", "word_embeddings")?,
            position: table("max_position_embeddings", "position_embeddings")?,
            token_type: table("type_vocab_size", "token_type_embeddings")?,
            norm: layer_norm(n, 1e-12, tables.pp("LayerNorm"))?,
            layers: (0..size("num_hidden_layers")?).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Ids (texts, tokens) to hidden states (texts, tokens, hidden_size). `mask` is 0 for padding.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?;
        let types = self.token_type.forward(&positions.zeros_like()?)?;
        let place = (self.position.forward(&positions)? + types)?;
        let mut x = self.norm.forward(&self.word.forward(ids)?.broadcast_add(&place)?)?;
        // To the scores of all heads and tokens: 0 for a token, -1e9 for padding.
        let mask = mask.to_dtype(x.dtype())?.affine(1e9, -1e9)?.unsqueeze(1)?.unsqueeze(1)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        Ok(x)
    }
}

struct Layer {
    heads: usize,
    qkv: [Linear; 3],
    output: (Linear, LayerNorm),
    up: Linear,
    down: (Linear, LayerNorm),
}

impl Layer {
    fn new(n: usize, heads: usize, inner: usize, vb: VarBuilder) -> Result<Self> {
        let of = |name| linear(n, n, vb.pp("attention.self").pp(name));
        let end = |n_in, vb: VarBuilder| {
            Ok::<_, candle_core::Error>((
                linear(n_in, n, vb.pp("dense"))?,
                layer_norm(n, 1e-12, vb.pp("LayerNorm"))?,
            ))
        };
        Ok(Self {
            heads,
            qkv: [of("query")?, of("key")?, of("value")?],
            output: end(n, vb.pp("attention.output"))?,
            up: linear(n, inner, vb.pp("intermediate.dense"))?,
            down: end(inner, vb.pp("output"))?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (texts, tokens, n) = x.dims3()?;
        let d = n / self.heads;
        let of = |layer: &Linear| layer.forward(x)?.reshape((texts, tokens, self.heads, d));
        let [q, k, v] = self.qkv.each_ref().map(of);
        let y = multi_head_attention(&q?, &k?, &v?, 1. / (d as f64).sqrt(), Some(mask))?;
        let end = |(dense, norm): &(Linear, LayerNorm), y: &Tensor, x: &Tensor| {
            norm.forward(&(dense.forward(y)? + x)?)
        };
        let x = end(&self.output, &y.flatten_from(2)?, x)?;
        end(&self.down, &gelu_erf(&self.up.forward(&x)?)?, &x)
    }
}
