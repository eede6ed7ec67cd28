//! Causal self-attention with rotary positions, where several heads of queries share one of keys and values.

use super::config::{Config, Span};
use super::decoder::norm;
use super::texts::Texts;
use candle_core::{Module, Result, Tensor, D};
use candle_nn::flash_attn::{
    flash_attn_alibi_windowed_softcap, flash_attn_varlen_alibi_windowed_softcap,
};
use candle_nn::kv_cache::KvCache;
use candle_nn::rotary_emb::rope_thd;
use candle_nn::{linear_b, Linear, RmsNorm, VarBuilder};
use loralib::nn as candle_nn;

pub struct Attention {
    /// Of queries, keys and values, or one of all.
    projections: Vec<Linear>,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    heads: [usize; 3],
    d: usize,
    span: Span,
    scale: f32,
    softcap: f32,
}

impl Attention {
    pub fn new(cfg: &Config, span: Span, vb: VarBuilder) -> Result<Self> {
        let (n, d, heads) =
            (cfg.hidden_size, cfg.head_dim, [cfg.heads, cfg.kv_heads, cfg.kv_heads]);
        let of = |heads, name| linear_b(n, heads * d, cfg.qkv_bias, vb.pp(name));
        let projections = match cfg.fused {
            true => vec![of(heads.iter().sum(), "qkv_proj")?],
            false => {
                let names = heads.into_iter().zip(["q_proj", "k_proj", "v_proj"]);
                names.map(|(heads, name)| of(heads, name)).collect::<Result<_>>()?
            }
        };
        let normed = |name| cfg.qk_norm.then(|| norm(cfg, d, vb.pp(name))).transpose();
        Ok(Self {
            projections,
            o_proj: linear_b(cfg.heads * d, n, cfg.output_bias, vb.pp("o_proj"))?,
            q_norm: normed("q_norm")?,
            k_norm: normed("k_norm")?,
            heads,
            d,
            span,
            scale: cfg.scale as f32,
            softcap: cfg.softcap.unwrap_or(0.) as f32,
        })
    }

    /// (batch, tokens, hidden_size) to the same. The cache gets the keys and values.
    pub fn forward(
        &self,
        x: &Tensor,
        texts: &Texts,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let [q, k, v] = self.projected(x)?;
        let rotated = |x: Tensor, norm: &Option<RmsNorm>| {
            let x = norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))?;
            self.rotated(&x, texts)
        };
        let (q, k) = (rotated(q, &self.q_norm)?, rotated(k, &self.k_norm)?);
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k, v),
        };
        let left = match self.span {
            Span::All => None,
            Span::Window(tokens) => Some(tokens - 1),
        };
        let Self { scale, softcap, .. } = *self;
        // The last token is beside the last key, and sees all that is before it.
        let y = match &texts.bounds {
            None => {
                flash_attn_alibi_windowed_softcap(&q, &k, &v, None, scale, left, Some(0), softcap)?
            }
            Some((bounds, longest)) => {
                let [q, k, v] = [q.squeeze(0)?, k.squeeze(0)?, v.squeeze(0)?];
                flash_attn_varlen_alibi_windowed_softcap(
                    &q,
                    &k,
                    &v,
                    None,
                    bounds,
                    bounds,
                    *longest,
                    *longest,
                    scale,
                    left,
                    Some(0),
                    softcap,
                )?
                .unsqueeze(0)?
            }
        };
        self.o_proj.forward(&y.flatten_from(2)?)
    }

    /// Queries, keys and values (batch, tokens, heads, d).
    fn projected(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |x: Tensor, heads| x.reshape((batch, tokens, heads, self.d));
        let [q, k, v] = self.heads;
        if let [fused] = &self.projections[..] {
            let all = split(fused.forward(x)?, q + k + v)?;
            let part = |from, heads| all.narrow(2, from, heads)?.contiguous();
            return Ok([part(0, q)?, part(q, k)?, part(q + k, v)?]);
        }
        let of = |i: usize| split(self.projections[i].forward(x)?, self.heads[i]);
        Ok([of(0)?, of(1)?, of(2)?])
    }

    /// The first values of each head as the positions say.
    fn rotated(&self, x: &Tensor, texts: &Texts) -> Result<Tensor> {
        let [cos, sin] = texts.angles(self.span);
        let n = 2 * cos.dim(D::Minus1)?;
        if n == self.d {
            return rope_thd(x, cos, sin);
        }
        let first = rope_thd(&x.narrow(D::Minus1, 0, n)?.contiguous()?, cos, sin)?;
        Tensor::cat(&[&first, &x.narrow(D::Minus1, n, self.d - n)?], D::Minus1)
    }
}
