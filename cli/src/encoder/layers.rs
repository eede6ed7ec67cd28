//! Encoders with Hugging Face's parameter names: BERT, RoBERTa and models of their form, and DistilBERT.
//!
//! As in the decoder, `use loralib::nn as candle_nn` makes of the layers those that an `Adapter` adapts by name.

use super::config::{Config, Family};
use crate::model::Segment;
use candle_core::{bail, Device, Module, Result, Tensor};
use candle_nn::flash_attn::flash_attn_varlen;
use candle_nn::ops::gelu_erf;
use candle_nn::{embedding, layer_norm, linear, Embedding, LayerNorm, Linear, VarBuilder};
use loralib::nn as candle_nn;
use std::sync::Arc;

pub struct Encoder {
    config: Config,
    words: Embedding,
    positions: Embedding,
    /// The first of its rows is added to each token.
    types: Option<Embedding>,
    norm: LayerNorm,
    layers: Vec<Arc<Layer>>,
    /// The path of the layers.
    path: String,
}

impl Encoder {
    /// `vb` gives the parameters, and decides which layers have an adapter.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, names) = (cfg.hidden_size, Names::of(cfg.family));
        let (table, layers) = (vb.pp("embeddings"), vb.pp(names.layers));
        let types = (cfg.types > 0)
            .then(|| embedding(cfg.types, n, table.pp("token_type_embeddings")))
            .transpose()?;
        let layer = |i| Ok(Arc::new(Layer::new(cfg, names, layers.pp(i))?));
        Ok(Self {
            words: embedding(cfg.vocab_size, n, table.pp("word_embeddings"))?,
            positions: embedding(cfg.positions, n, table.pp("position_embeddings"))?,
            types,
            norm: layer_norm(n, cfg.eps, table.pp("LayerNorm"))?,
            path: layers.prefix(),
            layers: (0..cfg.layers).map(layer).collect::<Result<_>>()?,
            config: cfg.clone(),
        })
    }

    /// The hidden states (tokens, hidden_size) of ids (1, tokens) that are texts of these lengths, one after another. Each
    /// layer is run by `run`, which gets its path and its input.
    pub fn packed(
        &self,
        ids: &Tensor,
        lens: &[usize],
        run: impl Fn(&str, &Tensor, Segment) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if let Some(len) = lens.iter().find(|len| **len > self.config.longest()) {
            bail!("{len} tokens, the model takes {}", self.config.longest())
        }
        let mut x = self.embedded(&ids.flatten_all()?, lens)?;
        let bounds = Bounds::new(lens, ids.device())?;
        for (i, layer) in self.layers.iter().enumerate() {
            let (layer, bounds) = (layer.clone(), bounds.clone());
            let segment = Box::new(move |x: &Tensor| layer.forward(x, &bounds));
            x = run(&format!("{}.{i}", self.path), &x, segment)?;
        }
        Ok(x)
    }

    fn embedded(&self, ids: &Tensor, lens: &[usize]) -> Result<Tensor> {
        let first = self.config.first_position;
        let positions = lens.iter().flat_map(|len| (first..first + len).map(|at| at as u32));
        let positions = Tensor::from_iter(positions, ids.device())?;
        let x = (self.words.forward(ids)? + self.positions.forward(&positions)?)?;
        let x = match &self.types {
            Some(types) => {
                x.broadcast_add(&types.forward(&Tensor::new(&[0u32], ids.device())?)?)?
            }
            None => x,
        };
        self.norm.forward(&x)
    }
}

/// Where each text begins and the last ends, and the length of the longest.
#[derive(Clone)]
struct Bounds {
    ends: Tensor,
    longest: usize,
}

impl Bounds {
    fn new(lens: &[usize], device: &Device) -> Result<Self> {
        let mut ends = vec![0i64];
        for len in lens {
            ends.push(ends[ends.len() - 1] + *len as i64);
        }
        let longest = lens.iter().max().copied().unwrap_or(0);
        Ok(Self { ends: Tensor::new(ends, device)?, longest })
    }
}

/// What the modules are called.
struct Names {
    layers: &'static str,
    qkv: [&'static str; 3],
    output: &'static str,
    output_norm: &'static str,
    up: &'static str,
    down: &'static str,
    down_norm: &'static str,
}

impl Names {
    fn of(family: Family) -> &'static Self {
        match family {
            Family::Bert | Family::Roberta => &Self {
                layers: "encoder.layer",
                qkv: ["attention.self.query", "attention.self.key", "attention.self.value"],
                output: "attention.output.dense",
                output_norm: "attention.output.LayerNorm",
                up: "intermediate.dense",
                down: "output.dense",
                down_norm: "output.LayerNorm",
            },
            Family::DistilBert => &Self {
                layers: "transformer.layer",
                qkv: ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
                output: "attention.out_lin",
                output_norm: "sa_layer_norm",
                up: "ffn.lin1",
                down: "ffn.lin2",
                down_norm: "output_layer_norm",
            },
        }
    }
}

struct Layer {
    qkv: [Linear; 3],
    output: Linear,
    output_norm: LayerNorm,
    up: Linear,
    down: Linear,
    down_norm: LayerNorm,
    heads: usize,
}

impl Layer {
    fn new(cfg: &Config, names: &Names, vb: VarBuilder) -> Result<Self> {
        let (n, inner) = (cfg.hidden_size, cfg.intermediate_size);
        let norm = |name| layer_norm(n, cfg.eps, vb.pp(name));
        let [q, k, v] = names.qkv.map(|name| linear(n, n, vb.pp(name)));
        Ok(Self {
            qkv: [q?, k?, v?],
            output: linear(n, n, vb.pp(names.output))?,
            output_norm: norm(names.output_norm)?,
            up: linear(n, inner, vb.pp(names.up))?,
            down: linear(inner, n, vb.pp(names.down))?,
            down_norm: norm(names.down_norm)?,
            heads: cfg.heads,
        })
    }

    /// (tokens, hidden_size) to the same. A token sees all of its text.
    fn forward(&self, x: &Tensor, bounds: &Bounds) -> Result<Tensor> {
        let (tokens, n) = x.dims2()?;
        let d = n / self.heads;
        let of = |layer: &Linear| layer.forward(x)?.reshape((tokens, self.heads, d));
        let [q, k, v] = self.qkv.each_ref().map(of);
        let (scale, Bounds { ends, longest }) = (1. / (d as f32).sqrt(), bounds);
        let y = flash_attn_varlen(&q?, &k?, &v?, ends, ends, *longest, *longest, scale, false)?;
        let x = self.output_norm.forward(&(self.output.forward(&y.flatten_from(1)?)? + x)?)?;
        let y = self.down.forward(&gelu_erf(&self.up.forward(&x)?)?)?;
        self.down_norm.forward(&(y + x)?)
    }
}
