//! GPT-2 with Hugging Face's parameter names, its queries and values adapted as in the LoRA paper.
//!
//! The same code is pretrained (r = 0 over a `VarMap`), adapted (frozen base and adapter) and evaluated. Its
//! norm, attention and GELU are those of `lora::nn`, which have a backward.

use candle_core::{bail, Device, Module, Result, Tensor, D};
use candle_nn::{Init, VarBuilder};
use lora::nn::attention::multi_head_attention;
use lora::nn::ops::gelu;
use lora::nn::{layer_norm, LayerNorm};
use lora::LoraConfig;
use loralib as lora;

/// The sizes, with the names they have in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub layer_norm_epsilon: f64,
}

pub struct Gpt2 {
    wte: candle_nn::Embedding,
    wpe: Tensor,
    h: Vec<Block>,
    ln_f: LayerNorm,
    head: lora::Linear,
}

lora::lora_module!(Gpt2 { h, head; ln_f, wte, wpe });

impl Gpt2 {
    /// `vb` gives the parameters and decides which of them are trained.
    pub fn new(cfg: &Config, lora: LoraConfig, vb: VarBuilder) -> Result<Self> {
        if cfg.n_head == 0 || !cfg.n_embd.is_multiple_of(cfg.n_head) {
            bail!("n_embd = {} does not divide into n_head = {} heads", cfg.n_embd, cfg.n_head)
        }
        // GPT-2's 0.02 suits 768 dimensions: in a narrow model the blocks' output drowns the tables, and the
        // model does not learn to copy.
        let init = Init::Randn { mean: 0., stdev: 0.1 };
        let table = |n, name| vb.pp(name).get_with_hints((n, cfg.n_embd), "weight", init);
        let wte = table(cfg.vocab_size, "wte")?;
        let block = |i| Block::new(cfg, lora, vb.pp("h").pp(i));
        Ok(Self {
            wpe: table(cfg.n_positions, "wpe")?,
            h: (0..cfg.n_layer).map(block).collect::<Result<_>>()?,
            ln_f: norm(cfg, vb.pp("ln_f"))?,
            // The head is tied to the table. As a layer of `lora` it costs a frozen table no gradient.
            head: lora::Linear::new(
                candle_nn::Linear::new(wte.clone(), None),
                LoraConfig::default(),
                vb.pp("wte"),
            )?,
            wte: candle_nn::Embedding::new(wte, cfg.n_embd),
        })
    }

    /// Ids (batch, tokens) to (batch, tokens, n_embd).
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, tokens) = ids.dims2()?;
        let positions = self.wpe.dim(0)?;
        if tokens > positions {
            bail!("{tokens} tokens, the model takes {positions}")
        }
        let x = self.wte.forward(ids)?.broadcast_add(&self.wpe.narrow(0, 0, tokens)?)?;
        let mask = causal_mask(tokens, ids.device())?.to_dtype(x.dtype())?;
        self.ln_f.forward(&self.h.iter().try_fold(x, |x, block| block.forward(&x, &mask))?)
    }

    /// (.., n_embd) to (.., vocab_size).
    pub fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }
}

/// 0 where a token attends to another, else -∞. Padding on the right needs no mask of its own.
fn causal_mask(tokens: usize, device: &Device) -> Result<Tensor> {
    let seen = |i, j| if j <= i { 0. } else { f32::NEG_INFINITY };
    let mask = (0..tokens).flat_map(|i| (0..tokens).map(move |j| seen(i, j)));
    Tensor::from_vec(mask.collect(), (tokens, tokens), device)
}

struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

lora::lora_module!(Block { attn, mlp; ln_1, ln_2 });

impl Block {
    fn new(cfg: &Config, lora: LoraConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            ln_1: norm(cfg, vb.pp("ln_1"))?,
            attn: Attention::new(cfg, lora, vb.pp("attn"))?,
            ln_2: norm(cfg, vb.pp("ln_2"))?,
            mlp: Mlp::new(cfg, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attn.forward(&self.ln_1.forward(x)?, mask)?)?;
        &x + self.mlp.forward(&self.ln_2.forward(&x)?)?
    }
}

fn norm(cfg: &Config, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, vb)
}

/// A projection without an adapter, stored as (in, out).
fn conv1d(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<lora::Linear> {
    let cfg = LoraConfig { fan_in_fan_out: true, ..Default::default() };
    lora::linear(in_dim, out_dim, cfg, vb)
}

struct Attention {
    c_attn: lora::MergedLinear,
    c_proj: lora::Linear,
    heads: usize,
}

lora::lora_module!(Attention { c_attn, c_proj; heads });

impl Attention {
    fn new(cfg: &Config, lora: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let lora = LoraConfig { fan_in_fan_out: true, ..lora };
        let (n, query_and_value) = (cfg.n_embd, [true, false, true]);
        Ok(Self {
            c_attn: lora::merged_linear(n, 3 * n, &query_and_value, lora, vb.pp("c_attn"))?,
            c_proj: conv1d(n, n, vb.pp("c_proj"))?,
            heads: cfg.n_head,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, tokens, n) = x.dims3()?;
        let qkv = self.c_attn.forward(x)?;
        let heads = (batch, tokens, self.heads, n / self.heads);
        let split = |i: usize| qkv.narrow(D::Minus1, i * n, n)?.reshape(heads);
        let scale = (self.heads as f64 / n as f64).sqrt();
        let y = multi_head_attention(&split(0)?, &split(1)?, &split(2)?, scale, Some(mask))?;
        self.c_proj.forward(&y.flatten_from(2)?)
    }
}

struct Mlp {
    c_fc: lora::Linear,
    c_proj: lora::Linear,
}

lora::lora_module!(Mlp { c_fc, c_proj });

impl Mlp {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, inner) = (cfg.n_embd, 4 * cfg.n_embd);
        Ok(Self {
            c_fc: conv1d(n, inner, vb.pp("c_fc"))?,
            c_proj: conv1d(inner, n, vb.pp("c_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.c_proj.forward(&gelu(&self.c_fc.forward(x)?)?)
    }
}
