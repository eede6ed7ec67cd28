//! Some training steps of a model of linear layers, by one of three methods.

use super::device::device;
use super::memory;
use super::naive::Naive;
use super::peak;
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::init::{DEFAULT_KAIMING_NORMAL, ZERO};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use lora::{Bias, LoraConfig};
use loralib as lora;
use std::time::Instant;

const STEPS: usize = 5;

#[derive(Debug, Clone, Copy)]
pub enum Method {
    Full,
    Naive,
    Ours,
}

pub const METHODS: [Method; 3] = [Method::Full, Method::Naive, Method::Ours];

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::Full => "full fine-tuning",
            Method::Naive => "naive LoRA",
            Method::Ours => "loralib",
        }
    }

    pub fn named(name: &str) -> Result<Self> {
        match METHODS.into_iter().find(|method| method.name() == name) {
            Some(method) => Ok(method),
            None => candle_core::bail!("no method {name:?}"),
        }
    }
}

/// `layers` of `dim` features, for `rows` of batch × length.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub layers: usize,
    pub dim: usize,
    pub rows: usize,
    pub rank: usize,
    pub dtype: DType,
}

/// Milliseconds, MiB and MiB.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub step: f64,
    pub gradients: f64,
    pub peak: f64,
}

impl Figures {
    /// The median of each figure.
    pub fn median(all: Vec<Self>) -> Self {
        let of = |figure: fn(&Self) -> f64| median(all.iter().map(figure).collect());
        Self { step: of(|f| f.step), gradients: of(|f| f.gradients), peak: of(|f| f.peak) }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn run(method: Method, size: Size) -> Result<Figures> {
    let before = peak::peak()?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, size.dtype, device());
    let layers = (0..size.layers).map(|i| layer(method, &size, vb.pp(i)));
    let model = layers.collect::<Result<Vec<_>>>()?;
    let trained = match method {
        Method::Full => vars.all_vars(),
        _ => lora::mark_only_lora_as_trainable(&vars, Bias::None)?,
    };
    let mut optimizer = AdamW::new_lr(trained, 1e-3)?;
    let x = Tensor::randn(0f32, 1., (size.rows, size.dim), device())?.to_dtype(size.dtype)?;
    let (mut times, mut gradients, mut peak) = (vec![], 0., f64::NAN);
    for i in 0..STEPS {
        let start = Instant::now();
        let y = model.iter().try_fold(x.clone(), |y, layer| layer.forward(&y)?.gelu())?;
        let grads = y.sqr()?.mean_all()?.backward()?;
        optimizer.step(&grads)?;
        if i == 0 {
            // Before a device is waited for, which makes its allocator give back what is free.
            peak = peak::peak()? - before;
            gradients = memory::kept(&grads);
        }
        drop(grads);
        device().synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Figures { step: median(times), gradients, peak })
}

fn layer(method: Method, size: &Size, vb: VarBuilder) -> Result<Box<dyn Module>> {
    let (dim, r) = (size.dim, size.rank);
    if let Method::Full = method {
        return Ok(Box::new(candle_nn::linear_no_bias(dim, dim, vb)?));
    }
    let weight = Tensor::randn(0f32, 0.05, (dim, dim), vb.device())?.to_dtype(size.dtype)?;
    let base = candle_nn::Linear::new(weight, None);
    Ok(match method {
        Method::Ours => {
            let cfg = LoraConfig { r, lora_alpha: 2. * r as f64, ..Default::default() };
            Box::new(lora::Linear::new(base, cfg, vb)?)
        }
        _ => Box::new(Naive {
            base,
            a: vb.get_with_hints((r, dim), "lora_A", DEFAULT_KAIMING_NORMAL)?,
            b: vb.get_with_hints((dim, r), "lora_B", ZERO)?,
        }),
    })
}
