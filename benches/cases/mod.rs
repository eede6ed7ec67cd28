//! What the benches time: each of this crate's layers, and beside it what a user would have without
//! the crate.

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Module, Result, Shape, Tensor, Var,
};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use lora::{LoraConfig, LoraModule};
use loralib as lora;

const DEVICE: Device = Device::Cpu;

pub type Run = Box<dyn FnMut() -> Result<()>>;

/// One thing that is timed: ours first, then what it is compared with.
pub struct Case {
    pub group: String,
    pub ours: Run,
    pub others: Vec<(&'static str, Run)>,
}

fn case(group: String, ours: Run, others: Vec<(&'static str, Run)>) -> Case {
    Case { group, ours, others }
}

type Cases = fn() -> Result<Vec<Case>>;

/// The cases of each kind whose name contains `filter`.
pub fn cases(filter: &str) -> Result<Vec<Case>> {
    let kinds: [(&str, Cases); 8] = [
        ("Linear", || of_sizes(linear)),
        ("MergedLinear", || of_sizes(merged_linear)),
        ("Embedding", embedding),
        ("Conv2d", conv2d),
        ("Conv1d", conv1d),
        ("Conv3d", conv3d),
        ("BF16", half),
        ("merge", merge),
    ];
    let chosen = kinds.into_iter().filter(|(name, _)| name.contains(filter));
    let all = chosen.map(|(_, make)| make()).collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().collect())
}

fn of_sizes(make: fn(usize, usize, usize) -> Result<Vec<Case>>) -> Result<Vec<Case>> {
    let sizes = [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)];
    let all = sizes.into_iter().map(|(m, d, r)| make(m, d, r)).collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().collect())
}

fn rand(shape: &[usize], dtype: DType) -> Result<Tensor> {
    (Tensor::randn(0f32, 1., shape, &DEVICE)? * 0.05)?.to_dtype(dtype)
}

fn var(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Var::from_tensor(&rand(shape, dtype)?)?.into_inner())
}

/// Hands a given gradient to backward, as torch's `y.backward(g)` does: what is timed is the layer
/// and not a loss.
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), Shape::from(())))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn forward(model: &(impl Module + Clone + 'static), x: &Tensor) -> Run {
    let (model, x) = (model.clone(), x.clone());
    Box::new(move || {
        std::hint::black_box(model.forward(&x)?);
        Ok(())
    })
}

/// Forward and backward.
fn step(model: &(impl Module + Clone + 'static), x: &Tensor) -> Result<Run> {
    let (model, x) = (model.clone(), x.clone());
    let grad = model.forward(&x)?.detach().randn_like(0., 1.)?;
    Ok(Box::new(move || {
        let loss = model.forward(&x)?.apply_op1(Upstream(grad.clone()))?;
        std::hint::black_box(loss.backward()?);
        Ok(())
    }))
}

/// LoRA of plain candle layers.
#[derive(Clone)]
struct Naive {
    base: candle_nn::Linear,
    a: Tensor,
    b: Tensor,
}

impl Module for Naive {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let update = x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)?;
        self.base.forward(x)? + (update * 2.)?
    }
}

fn config(r: usize) -> LoraConfig {
    LoraConfig { r, lora_alpha: 2. * r as f64, ..Default::default() }
}

fn adapter(dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), dtype, &DEVICE)
}

fn linear(m: usize, d: usize, r: usize) -> Result<Vec<Case>> {
    // Inside a model the input has a gradient.
    let x = var(&[m, d], DType::F32)?;
    let data = x.detach();
    let plain = candle_nn::Linear::new(rand(&[d, d], DType::F32)?, None);
    let full = candle_nn::Linear::new(var(&[d, d], DType::F32)?, None);
    let naive =
        Naive { base: plain.clone(), a: var(&[r, d], DType::F32)?, b: var(&[d, r], DType::F32)? };
    let ours = lora::Linear::new(plain.clone(), config(r), adapter(DType::F32))?;
    let mut merged = ours.clone();
    merged.eval()?;
    let name = |what: &str| format!("Linear {m}x{d} r {r} {what}");
    let plain = || ("candle_nn::Linear", forward(&plain, &data));
    Ok(vec![
        case(
            name("forward"),
            forward(&ours, &data),
            vec![plain(), ("naive LoRA", forward(&naive, &data))],
        ),
        case(name("forward, merged"), forward(&merged, &data), vec![plain()]),
        case(
            name("step"),
            step(&ours, &x)?,
            vec![("full fine-tuning", step(&full, &x)?), ("naive LoRA", step(&naive, &x)?)],
        ),
    ])
}

fn merged_linear(m: usize, d: usize, r: usize) -> Result<Vec<Case>> {
    let x = var(&[m, d], DType::F32)?;
    let data = x.detach();
    let plain = candle_nn::Linear::new(rand(&[3 * d, d], DType::F32)?, None);
    let full = candle_nn::Linear::new(var(&[3 * d, d], DType::F32)?, None);
    let enable = [true, false, true];
    let ours = lora::MergedLinear::new(plain.clone(), &enable, config(r), adapter(DType::F32))?;
    let mut merged = ours.clone();
    merged.eval()?;
    let name = |what: &str| format!("MergedLinear {m}x{d} r {r} {what}");
    let plain = || vec![("candle_nn::Linear", forward(&plain, &data))];
    Ok(vec![
        case(name("forward"), forward(&ours, &data), plain()),
        case(name("forward, merged"), forward(&merged, &data), plain()),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}

fn embedding() -> Result<Vec<Case>> {
    let (num, dim, r, ids) = (32_000, 512, 8, 2048);
    let x = Tensor::rand(0f32, num as f32, ids, &DEVICE)?.to_dtype(DType::U32)?;
    let plain = candle_nn::Embedding::new(rand(&[num, dim], DType::F32)?, dim);
    let full = candle_nn::Embedding::new(var(&[num, dim], DType::F32)?, dim);
    let ours = lora::Embedding::new(plain.clone(), config(r), adapter(DType::F32))?;
    let name = |what: &str| format!("Embedding {num}x{dim} r {r} {what}");
    Ok(vec![
        case(
            name("forward"),
            forward(&ours, &x),
            vec![("candle_nn::Embedding", forward(&plain, &x))],
        ),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}

fn conv2d() -> Result<Vec<Case>> {
    let mut all = vec![];
    for (c, side) in [(64, 56), (256, 14)] {
        let x = var(&[8, c, side, side], DType::F32)?;
        let cfg = Conv2dConfig { padding: 1, ..Default::default() };
        let plain = candle_nn::Conv2d::new(rand(&[c, c, 3, 3], DType::F32)?, None, cfg);
        let full = candle_nn::Conv2d::new(var(&[c, c, 3, 3], DType::F32)?, None, cfg);
        let ours = lora::Conv2d::new(plain.clone(), config(8), adapter(DType::F32))?;
        let (data, name) = (x.detach(), |what| format!("Conv2d {c} channels {side}x{side} {what}"));
        all.push(case(
            name("forward"),
            forward(&ours, &data),
            vec![("candle_nn::Conv2d", forward(&plain, &data))],
        ));
        let full = vec![("full fine-tuning", step(&full, &x)?)];
        all.push(case(name("step"), step(&ours, &x)?, full));
    }
    Ok(all)
}

fn conv1d() -> Result<Vec<Case>> {
    let x = var(&[8, 256, 512], DType::F32)?;
    let cfg = Conv1dConfig { padding: 1, ..Default::default() };
    let plain = candle_nn::Conv1d::new(rand(&[256, 256, 3], DType::F32)?, None, cfg);
    let full = candle_nn::Conv1d::new(var(&[256, 256, 3], DType::F32)?, None, cfg);
    let ours = lora::Conv1d::new(plain.clone(), config(8), adapter(DType::F32))?;
    let (data, name) = (x.detach(), |what| format!("Conv1d 256 channels 512 {what}"));
    let plain = vec![("candle_nn::Conv1d", forward(&plain, &data))];
    Ok(vec![
        case(name("forward"), forward(&ours, &data), plain),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}

/// candle has none: full fine-tuning is that of our own plain layer.
fn conv3d() -> Result<Vec<Case>> {
    let x = var(&[2, 32, 16, 16, 16], DType::F32)?;
    let w = var(&[32, 32, 3, 3, 3], DType::F32)?;
    let cfg = lora::Conv3dConfig { padding: 1, ..Default::default() };
    let layer = |w, lora| lora::Conv3d::new(w, None, cfg, lora, adapter(DType::F32));
    let (ours, full) = (layer(w.detach(), config(8))?, layer(w, LoraConfig::default())?);
    let full = vec![("full fine-tuning (ours)", step(&full, &x)?)];
    Ok(vec![case("Conv3d 32 channels 16x16x16 step".into(), step(&ours, &x)?, full)])
}

fn half() -> Result<Vec<Case>> {
    let mut all = vec![];
    for (m, d, r) in [(2048, 1024, 16), (512, 768, 8)] {
        let x = var(&[m, d], DType::BF16)?;
        let full = candle_nn::Linear::new(var(&[d, d], DType::BF16)?, None);
        let plain = candle_nn::Linear::new(rand(&[d, d], DType::BF16)?, None);
        let ours = lora::Linear::new(plain, config(r), adapter(DType::BF16))?;
        let full = vec![("full fine-tuning", step(&full, &x)?)];
        all.push(case(format!("BF16 Linear {m}x{d} r {r} step"), step(&ours, &x)?, full));
    }
    Ok(all)
}

fn merge() -> Result<Vec<Case>> {
    let (d, r) = (4096, 16);
    let w = rand(&[d, d], DType::F32)?;
    let base = candle_nn::Linear::new(w.clone(), None);
    let mut ours = lora::Linear::new(base, config(r), adapter(DType::F32))?;
    let (a, b) = (rand(&[r, d], DType::F32)?, rand(&[d, r], DType::F32)?);
    let floor = move || {
        std::hint::black_box((w.copy()?, b.matmul(&a)?));
        Ok(())
    };
    let group = format!("merge {d}x{d} r {r}");
    let others: Vec<(&str, Run)> = vec![("a copy of W, and B·A", Box::new(floor))];
    Ok(vec![case(group, Box::new(move || ours.eval()), others)])
}
