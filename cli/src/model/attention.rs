//! Causal self-attention with rotary positions, where several heads of queries share one of keys and values.

use super::config::Config;
use super::llama::Positions;
use candle_core::{Module, Result, Tensor};
use candle_nn::flash_attn::flash_attn;
use candle_nn::kv_cache::KvCache;
use candle_nn::rotary_emb::rope_thd;
use candle_nn::{linear_b, rms_norm, Linear, RmsNorm, VarBuilder};
use loralib::nn as candle_nn;

pub struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Attention {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (n, d, heads, kv_heads) =
            (cfg.hidden_size, cfg.head_dim(), cfg.num_attention_heads, cfg.kv_heads());
        let projection = |heads, name| linear_b(n, heads * d, cfg.qkv_bias(), vb.pp(name));
        let norm = |name| cfg.qk_norm().then(|| rms_norm(d, cfg.rms_norm_eps, vb.pp(name)));
        Ok(Self {
            q_proj: projection(heads, "q_proj")?,
            k_proj: projection(kv_heads, "k_proj")?,
            v_proj: projection(kv_heads, "v_proj")?,
            o_proj: linear_b(heads * d, n, cfg.attention_bias, vb.pp("o_proj"))?,
            q_norm: norm("q_norm").transpose()?,
            k_norm: norm("k_norm").transpose()?,
            heads,
            kv_heads,
            d,
        })
    }

    /// (batch, tokens, hidden_size) to the same. The cache gets the keys and values.
    pub fn forward(
        &self,
        x: &Tensor,
        at: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let q = self.heads(&self.q_proj, self.heads, x)?;
        let k = self.heads(&self.k_proj, self.kv_heads, x)?;
        let v = self.heads(&self.v_proj, self.kv_heads, x)?;
        let rotated = |x: Tensor, norm: &Option<RmsNorm>| {
            let x = norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))?;
            rope_thd(&x, &at.cos, &at.sin)
        };
        let (q, k) = (rotated(q, &self.q_norm)?, rotated(k, &self.k_norm)?);
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k, v),
        };
        // The last token is beside the last key, and sees all that is before it.
        let y = flash_attn(&q, &k, &v, (self.d as f32).powf(-0.5), true)?;
        self.o_proj.forward(&y.flatten_from(2)?)
    }

    /// A projection of `x` as (batch, tokens, heads, d).
    fn heads(&self, projection: &Linear, heads: usize, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        projection.forward(x)?.reshape((batch, tokens, heads, self.d))
    }
}
