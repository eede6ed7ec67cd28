//! A decoder layer of Llama with adapters on all linear layers, twice: of `lora::nn`, and of candle's operations that have
//! a backward, as one writes it without a library.

use super::shapes::Shape;
use candle_core::{DType, Device, Module, Result, Tensor, Var, D};
use loralib::nn::{self, flash_attn::flash_attn, ops, rotary_emb::rope_thd};
use loralib::{Adapter, LoraConfig};
use std::collections::HashMap;

/// The rank of the adapters.
pub const RANK: usize = 16;

/// Runs an operation of a layer, whose name it is given.
pub trait Observer {
    fn stage<T>(&self, name: &'static str, f: impl FnOnce() -> Result<T>) -> Result<T>;
}

/// How a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Lora,
    Candle,
}

enum Linear {
    Lora(nn::Linear),
    Plain { w: Tensor, a: Var, b: Var },
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Lora(layer) => layer.forward(x),
            Self::Plain { w, a, b } => {
                let update = x.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)?;
                x.broadcast_matmul(&w.t()?)? + (update * 2.)?
            }
        }
    }
}

pub struct Layer {
    by: By,
    shape: Shape,
    linears: HashMap<&'static str, Linear>,
    norms: [Tensor; 2],
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
    adapter: Option<Adapter>,
}

fn random(dims: (usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
    (Tensor::rand(-1f32, 1., dims, device)? * 0.05)?.to_dtype(dtype)
}

impl Layer {
    pub fn new(by: By, shape: Shape, tokens: usize, dtype: DType, device: &Device) -> Result<Self> {
        let matrices = shape.linears().into_iter().map(|(name, out, inputs)| {
            Ok((format!("{name}.weight"), random((out, inputs), dtype, device)?))
        });
        let matrices = matrices.collect::<Result<HashMap<_, _>>>()?;
        let mut adapter = None;
        let linears: Result<HashMap<_, _>> = match by {
            By::Lora => {
                let base = nn::VarBuilder::from_tensors(matrices, dtype, device);
                let cfg = LoraConfig { r: RANK, lora_alpha: 32., ..Default::default() };
                let new = Adapter::new(cfg).targets("all-linear");
                let vb = new.var_builder(base);
                adapter = Some(new);
                let layers = shape.linears().into_iter().map(|(name, out, inputs)| {
                    Ok((name, Linear::Lora(nn::linear_no_bias(inputs, out, vb.pp(name))?)))
                });
                layers.collect()
            }
            By::Candle => {
                let layers = shape.linears().into_iter().map(|(name, out, inputs)| {
                    let w = matrices[&format!("{name}.weight")].clone();
                    let a = Var::from_tensor(&random((RANK, inputs), dtype, device)?)?;
                    let b = Var::from_tensor(&random((out, RANK), dtype, device)?)?;
                    Ok((name, Linear::Plain { w, a, b }))
                });
                layers.collect()
            }
        };
        let norm = || Tensor::ones(shape.hidden, dtype, device);
        let angles = Tensor::rand(0f32, 1., (tokens, shape.d / 2), device)?;
        let mask = match by {
            By::Lora => None,
            By::Candle => {
                let hidden = |i: usize, j: usize| if j > i { f32::NEG_INFINITY } else { 0. };
                let mask = (0..tokens).flat_map(|i| (0..tokens).map(move |j| hidden(i, j)));
                let mask = Tensor::from_vec(mask.collect(), (tokens, tokens), device)?;
                Some(mask.to_dtype(dtype)?)
            }
        };
        Ok(Self {
            by,
            shape,
            linears: linears?,
            norms: [norm()?, norm()?],
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            mask,
            adapter,
        })
    }

    /// That of a layer of `lora::nn`.
    #[allow(dead_code)] // Not every bench trains.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    #[allow(dead_code)]
    pub fn vars(&self) -> Vec<Var> {
        let plain = self.linears.values().flat_map(|linear| match linear {
            Linear::Plain { a, b, .. } => vec![a.clone(), b.clone()],
            Linear::Lora(_) => vec![],
        });
        let adapted = self.adapter.iter().flat_map(|adapter| adapter.var_map().all_vars());
        plain.chain(adapted).collect()
    }

    /// (1, tokens, hidden) to the same.
    pub fn forward(&self, x: &Tensor, o: &impl Observer) -> Result<Tensor> {
        let h = o.stage("norm", || self.norm(x, 0))?;
        let y = self.attention(&h, o)?;
        let y = o.stage("o_proj", || self.linear("o_proj", &y))?;
        let x = o.stage("residual", || x + y)?;
        let h = o.stage("norm", || self.norm(&x, 1))?;
        let gate = o.stage("gate_proj, up_proj", || self.linear("gate_proj", &h))?;
        let up = o.stage("gate_proj, up_proj", || self.linear("up_proj", &h))?;
        let y = o.stage("silu, product", || match self.by {
            By::Lora => ops::silu(&gate)? * up,
            By::Candle => gate.silu()? * up,
        })?;
        let y = o.stage("down_proj", || self.linear("down_proj", &y))?;
        o.stage("residual", || x + y)
    }

    fn linear(&self, name: &'static str, x: &Tensor) -> Result<Tensor> {
        self.linears[name].forward(x)
    }

    fn norm(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        match self.by {
            By::Lora => ops::rms_norm(x, &self.norms[i], 1e-5),
            By::Candle => candle_nn::ops::rms_norm_slow(x, &self.norms[i], 1e-5),
        }
    }

    fn attention(&self, h: &Tensor, o: &impl Observer) -> Result<Tensor> {
        let Shape { heads, kv_heads, d, .. } = self.shape;
        let tokens = h.dim(1)?;
        let project = |name, heads| {
            o.stage("q_proj, k_proj, v_proj", || {
                self.linear(name, h)?.reshape((1, tokens, heads, d))
            })
        };
        let (q, k, v) =
            (project("q_proj", heads)?, project("k_proj", kv_heads)?, project("v_proj", kv_heads)?);
        let scale = (d as f64).powf(-0.5);
        match self.by {
            By::Lora => {
                let q = o.stage("rope", || rope_thd(&q, &self.cos, &self.sin))?;
                let k = o.stage("rope", || rope_thd(&k, &self.cos, &self.sin))?;
                let y = o.stage("attention", || flash_attn(&q, &k, &v, scale as f32, true))?;
                y.flatten_from(2)
            }
            By::Candle => {
                let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
                let slow = candle_nn::rotary_emb::rope_slow;
                let q = o.stage("rope", || slow(&by_head(&q)?, &self.cos, &self.sin))?;
                let k = o.stage("rope", || slow(&by_head(&k)?, &self.cos, &self.sin))?;
                o.stage("attention", || {
                    let repeated = |x: &Tensor| {
                        let dims = (1, kv_heads, heads / kv_heads, tokens, d);
                        x.unsqueeze(2)?.expand(dims)?.reshape((1, heads, tokens, d))
                    };
                    let (k, v) = (repeated(&k)?, repeated(&by_head(&v)?)?);
                    let s = (q.matmul(&k.t()?)? * scale)?;
                    let s = match &self.mask {
                        Some(mask) => {
                            s.broadcast_add(&mask.narrow(0, 0, tokens)?.narrow(1, 0, tokens)?)?
                        }
                        None => s,
                    };
                    let p = candle_nn::ops::softmax(&s, D::Minus1)?;
                    p.matmul(&v)?.transpose(1, 2)?.flatten_from(2)
                })
            }
        }
    }
}
