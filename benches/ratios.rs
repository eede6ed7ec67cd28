//! `cargo bench --bench ratios [-- FILTER]`: this crate's layers beside candle's own, each pair timed
//! in turn in one run, as medians and their ratio.
//!
//! Forward and training step (forward and backward) on the CPU, in F32 unless a line says
//! otherwise. "full" is full fine-tuning of the plain layer, "naive" is LoRA composed of plain
//! candle layers.

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Module, Result, Shape, Tensor, Var,
};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const DEVICE: Device = Device::Cpu;

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("{:<44} {:>9} {:>9} {:>6}", "ours / theirs, ms", "ours", "theirs", "ratio");
    let groups: [(&str, fn() -> Result<()>); 6] = [
        ("linear", linear),
        ("merged_linear", merged_linear),
        ("embedding", embedding),
        ("conv", conv),
        ("half", half),
        ("merge", merge),
    ];
    for (name, run) in groups {
        if name.contains(&filter) {
            run()?;
        }
    }
    Ok(())
}

/// Times two things in turn and prints both medians, in milliseconds.
fn compare(
    name: &str,
    mut ours: impl FnMut() -> Result<()>,
    mut theirs: impl FnMut() -> Result<()>,
) -> Result<()> {
    fn time(f: &mut impl FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        f()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
    fn median(mut times: Vec<f64>) -> f64 {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }
    let warm = time(&mut ours)?.max(time(&mut theirs)?);
    let runs = ((3000. / warm) as usize).clamp(7, 101);
    let (mut a, mut b) = (vec![], vec![]);
    for _ in 0..runs {
        a.push(time(&mut ours)?);
        b.push(time(&mut theirs)?);
    }
    let (a, b) = (median(a), median(b));
    println!("{name:<44} {a:>9.3} {b:>9.3} {:>6.3}", a / b);
    Ok(())
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

fn step(model: &impl Module, x: &Tensor, grad: &Tensor) -> Result<()> {
    let loss = model.forward(x)?.apply_op1(Upstream(grad.clone()))?;
    std::hint::black_box(loss.backward()?);
    Ok(())
}

fn forward(model: &impl Module, x: &Tensor) -> Result<()> {
    std::hint::black_box(model.forward(x)?);
    Ok(())
}

/// LoRA of plain candle layers.
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

const SHAPES: [(usize, usize, usize); 3] = [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)];

fn linear() -> Result<()> {
    for (m, d, r) in SHAPES {
        // Inside a model the input has a gradient.
        let x = var(&[m, d], DType::F32)?;
        let name = |what: &str| format!("Linear {m}×{d}→{d} r {r} {what}");
        let plain = candle_nn::Linear::new(rand(&[d, d], DType::F32)?, None);
        let full = candle_nn::Linear::new(var(&[d, d], DType::F32)?, None);
        let naive = Naive {
            base: plain.clone(),
            a: var(&[r, d], DType::F32)?,
            b: var(&[d, r], DType::F32)?,
        };
        let mut ours = lora::Linear::new(plain.clone(), config(r), adapter(DType::F32))?;
        let data = x.detach();
        let g = plain.forward(&data)?.randn_like(0., 1.)?;
        compare(&name("forward"), || forward(&ours, &data), || forward(&plain, &data))?;
        compare(&name("step / full"), || step(&ours, &x, &g), || step(&full, &x, &g))?;
        compare(&name("step / naive"), || step(&ours, &x, &g), || step(&naive, &x, &g))?;
        ours.eval()?;
        compare(&name("forward, merged"), || forward(&ours, &data), || forward(&plain, &data))?;
    }
    Ok(())
}

fn merged_linear() -> Result<()> {
    for (m, d, r) in SHAPES {
        let x = var(&[m, d], DType::F32)?;
        let name = |what: &str| format!("MergedLinear {m}×{d}→{} r {r} {what}", 3 * d);
        let plain = candle_nn::Linear::new(rand(&[3 * d, d], DType::F32)?, None);
        let full = candle_nn::Linear::new(var(&[3 * d, d], DType::F32)?, None);
        let enable = [true, false, true];
        let mut ours =
            lora::MergedLinear::new(plain.clone(), &enable, config(r), adapter(DType::F32))?;
        let data = x.detach();
        let g = plain.forward(&data)?.randn_like(0., 1.)?;
        compare(&name("forward"), || forward(&ours, &data), || forward(&plain, &data))?;
        compare(&name("step / full"), || step(&ours, &x, &g), || step(&full, &x, &g))?;
        ours.eval()?;
        compare(&name("forward, merged"), || forward(&ours, &data), || forward(&plain, &data))?;
    }
    Ok(())
}

fn embedding() -> Result<()> {
    let (num, dim, r, ids) = (32_000, 512, 8, 2048);
    let x = Tensor::rand(0f32, num as f32, ids, &DEVICE)?.to_dtype(DType::U32)?;
    let plain = candle_nn::Embedding::new(rand(&[num, dim], DType::F32)?, dim);
    let full = candle_nn::Embedding::new(var(&[num, dim], DType::F32)?, dim);
    let ours = lora::Embedding::new(plain.clone(), config(r), adapter(DType::F32))?;
    let g = plain.forward(&x)?.randn_like(0., 1.)?;
    let name = |what: &str| format!("Embedding {num}×{dim} r {r} {what}");
    compare(&name("forward"), || forward(&ours, &x), || forward(&plain, &x))?;
    compare(&name("step / full"), || step(&ours, &x, &g), || step(&full, &x, &g))
}

fn conv() -> Result<()> {
    for (c, side) in [(64, 56), (256, 14)] {
        let x = var(&[8, c, side, side], DType::F32)?;
        let data = x.detach();
        let conv_cfg = Conv2dConfig { padding: 1, ..Default::default() };
        let plain = candle_nn::Conv2d::new(rand(&[c, c, 3, 3], DType::F32)?, None, conv_cfg);
        let full = candle_nn::Conv2d::new(var(&[c, c, 3, 3], DType::F32)?, None, conv_cfg);
        let ours = lora::Conv2d::new(plain.clone(), config(8), adapter(DType::F32))?;
        let g = plain.forward(&data)?.randn_like(0., 1.)?;
        let name = |what: &str| format!("Conv2d {c} channels {side}² r 8 {what}");
        compare(&name("forward"), || forward(&ours, &data), || forward(&plain, &data))?;
        compare(&name("step / full"), || step(&ours, &x, &g), || step(&full, &x, &g))?;
    }
    let x = var(&[8, 256, 512], DType::F32)?;
    let data = x.detach();
    let conv_cfg = Conv1dConfig { padding: 1, ..Default::default() };
    let plain = candle_nn::Conv1d::new(rand(&[256, 256, 3], DType::F32)?, None, conv_cfg);
    let full = candle_nn::Conv1d::new(var(&[256, 256, 3], DType::F32)?, None, conv_cfg);
    let ours = lora::Conv1d::new(plain.clone(), config(8), adapter(DType::F32))?;
    let g = plain.forward(&data)?.randn_like(0., 1.)?;
    compare("Conv1d 256×512 r 8 forward", || forward(&ours, &data), || forward(&plain, &data))?;
    compare("Conv1d 256×512 r 8 step / full", || step(&ours, &x, &g), || step(&full, &x, &g))?;

    let x = var(&[2, 32, 16, 16, 16], DType::F32)?;
    let (w, conv_cfg) = (
        rand(&[32, 32, 3, 3, 3], DType::F32)?,
        lora::Conv3dConfig { padding: 1, ..Default::default() },
    );
    let ours = lora::Conv3d::new(w.clone(), None, conv_cfg, config(8), adapter(DType::F32))?;
    let full = lora::Conv3d::new(
        Var::from_tensor(&w)?.into_inner(),
        None,
        conv_cfg,
        LoraConfig::default(),
        adapter(DType::F32),
    )?;
    let g = ours.forward(&x)?.detach().randn_like(0., 1.)?;
    // candle has none: full fine-tuning of our own plain layer.
    compare("Conv3d 32×16³ r 8 step / full (ours)", || step(&ours, &x, &g), || step(&full, &x, &g))
}

fn half() -> Result<()> {
    for (m, d, r) in [(2048, 1024, 16), (512, 768, 8)] {
        let x = var(&[m, d], DType::BF16)?;
        let full = candle_nn::Linear::new(var(&[d, d], DType::BF16)?, None);
        let plain = candle_nn::Linear::new(rand(&[d, d], DType::BF16)?, None);
        let g = plain.forward(&x.detach())?.randn_like(0., 1.)?;
        let ours = lora::Linear::new(plain, config(r), adapter(DType::BF16))?;
        let name = format!("Linear BF16 {m}×{d}→{d} r {r} step / full");
        compare(&name, || step(&ours, &x, &g), || step(&full, &x, &g))?;
    }
    Ok(())
}

fn merge() -> Result<()> {
    let d = 4096;
    let w = rand(&[d, d], DType::F32)?;
    let mut ours = lora::Linear::new(
        candle_nn::Linear::new(w.clone(), None),
        config(16),
        adapter(DType::F32),
    )?;
    let (a, b) = (ours.lora_a().unwrap().detach(), ours.lora_b().unwrap().detach());
    compare(
        "eval() 4096² r 16 / copy of W and B·A",
        || ours.eval(),
        || {
            std::hint::black_box((w.copy()?, b.matmul(&a)?));
            Ok(())
        },
    )
}
