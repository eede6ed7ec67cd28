//! GPT-2 with Hugging Face's parameter names; weights are (out, in), those of its files (in, out).
//!
//! The model is written on candle_nn's names, and `use loralib::nn as candle_nn` makes of its layers those that an
//! `Adapter` adapts by name. Nothing else in this file knows of adapters.

use candle_core::{bail, Module, Result, Tensor, D};
use candle_nn::flash_attn::flash_attn;
use candle_nn::{layer_norm, ops::gelu, Embedding, Init, LayerNorm, Linear, VarBuilder};
use loralib::nn as candle_nn;

/// The sizes, with the names they have in `config.json`.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub layer_norm_epsilon: f64,
}

pub struct Gpt2 {
    wte: Embedding,
    wpe: Embedding,
    h: Vec<Block>,
    ln_f: LayerNorm,
    /// From hidden states to logits, by the table.
    pub head: Linear,
}

impl Gpt2 {
    /// `vb` gives the parameters, and decides which layers have an adapter.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        if cfg.n_head == 0 || !cfg.n_embd.is_multiple_of(cfg.n_head) {
            bail!("n_embd = {} does not divide into n_head = {} heads", cfg.n_embd, cfg.n_head)
        }
        // GPT-2's 0.02 suits 768 dimensions: in a narrow model the blocks' output drowns the tables, and the
        // model does not learn to copy.
        let init = Init::Randn { mean: 0., stdev: 0.1 };
        let table = |n, name| -> Result<Embedding> {
            let table = vb.pp(name).get_with_hints((n, cfg.n_embd), "weight", init)?;
            Ok(Embedding::new(table, cfg.n_embd))
        };
        let wte = table(cfg.vocab_size, "wte")?;
        Ok(Self {
            head: Linear::new(wte.embeddings().clone(), None),
            wte,
            wpe: table(cfg.n_positions, "wpe")?,
            h: (0..cfg.n_layer)
                .map(|i| Block::new(cfg, vb.pp("h").pp(i)))
                .collect::<Result<_>>()?,
            ln_f: layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, vb.pp("ln_f"))?,
        })
    }

    /// Ids (batch, tokens) to hidden states (batch, tokens, n_embd).
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, tokens) = ids.dims2()?;
        let positions = self.wpe.embeddings().dim(0)?;
        if tokens > positions {
            bail!("{tokens} tokens, the model takes {positions}")
        }
        let positions = Tensor::arange(0, tokens as u32, ids.device())?;
        let x = self.wte.forward(ids)?.broadcast_add(&self.wpe.forward(&positions)?)?;
        self.ln_f.forward(&self.h.iter().try_fold(x, |x, block| block.forward(&x))?)
    }
}

struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let norm = |name| layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, vb.pp(name));
        Ok(Self {
            ln_1: norm("ln_1")?,
            attn: Attention::new(cfg, vb.pp("attn"))?,
            ln_2: norm("ln_2")?,
            mlp: Mlp::new(cfg.n_embd, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attn.forward(&self.ln_1.forward(x)?)?)?;
        &x + self.mlp.forward(&self.ln_2.forward(&x)?)?
    }
}

/// A new layer starts as torch's: candle_nn's larger weights learn slower here.
fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = (inputs as f64).powf(-0.5);
    let init = Init::Uniform { lo: -bound, up: bound };
    let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
    Ok(Linear::new(weight, Some(vb.get_with_hints(outputs, "bias", init)?)))
}

struct Attention {
    c_attn: Linear,
    c_proj: Linear,
    heads: usize,
}

impl Attention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let n = cfg.n_embd;
        let c_attn = linear(n, 3 * n, vb.pp("c_attn"))?;
        Ok(Self { c_attn, c_proj: linear(n, n, vb.pp("c_proj"))?, heads: cfg.n_head })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, n) = x.dims3()?;
        let qkv = self.c_attn.forward(x)?;
        let heads = (batch, tokens, self.heads, n / self.heads);
        let split = |i: usize| qkv.narrow(D::Minus1, i * n, n)?.reshape(heads);
        let scale = (self.heads as f32 / n as f32).sqrt();
        let y = flash_attn(&split(0)?, &split(1)?, &split(2)?, scale, true)?;
        self.c_proj.forward(&y.flatten_from(2)?)
    }
}

struct Mlp {
    c_fc: Linear,
    c_proj: Linear,
}

impl Mlp {
    fn new(n: usize, vb: VarBuilder) -> Result<Self> {
        let c_fc = linear(n, 4 * n, vb.pp("c_fc"))?;
        Ok(Self { c_fc, c_proj: linear(4 * n, n, vb.pp("c_proj"))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.c_proj.forward(&gelu(&self.c_fc.forward(x)?)?)
    }
}
