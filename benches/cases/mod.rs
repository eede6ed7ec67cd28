//! What the benches time: each of this crate's layers, and beside it what a user would have without
//! the crate. On the first GPU in a build with `cuda`, else on the CPU.

mod adapters;
mod conv;
mod device;
mod embedding;
mod linear;
mod merge;
pub mod naive;
mod optimizer;
mod quantized;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, Var,
};
use candle_nn::{VarBuilder, VarMap};
use loralib::LoraConfig;

pub use device::device;

pub type Run = Box<dyn FnMut() -> Result<()>>;

/// One thing that is timed: ours first, then what it is compared with.
pub struct Case {
    pub group: String,
    pub ours: Run,
    pub others: Vec<(&'static str, Run)>,
}

pub fn case(group: String, ours: Run, others: Vec<(&'static str, Run)>) -> Case {
    Case { group, ours, others }
}

/// The cases whose group starts with `filter`.
pub fn cases(filter: &str) -> Result<Vec<Case>> {
    type Cases = fn() -> Result<Vec<Case>>;
    let kinds: [(&str, Cases); 12] = [
        ("Adapters", adapters::adapters),
        ("Linear", linear::linear),
        ("MergedLinear", linear::merged_linear),
        ("BF16", linear::half),
        ("DoRA", linear::dora),
        ("Embedding", embedding::embedding),
        ("Conv2d", conv::conv2d),
        ("Conv1d", conv::conv1d),
        ("Conv3d", conv::conv3d),
        ("merge", merge::merge),
        ("AdamW", optimizer::adamw),
        ("Quantized", quantized::quantized),
    ];
    let kind = filter.split(' ').next().unwrap_or_default();
    let chosen = kinds.into_iter().filter(|(name, _)| name.starts_with(kind));
    let all = chosen.map(|(_, make)| make()).collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().filter(|case| case.group.starts_with(filter)).collect())
}

pub fn rand(shape: &[usize], dtype: DType) -> Result<Tensor> {
    (Tensor::randn(0f32, 1., shape, device())? * 0.05)?.to_dtype(dtype)
}

pub fn var(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Var::from_tensor(&rand(shape, dtype)?)?.into_inner())
}

pub fn config(r: usize) -> LoraConfig {
    LoraConfig { r, lora_alpha: 2. * r as f64, ..Default::default() }
}

pub fn adapter(dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), dtype, device())
}

pub fn forward(model: &(impl Module + Clone + 'static), x: &Tensor) -> Run {
    let (model, x) = (model.clone(), x.clone());
    Box::new(move || {
        std::hint::black_box(model.forward(&x)?);
        device().synchronize()
    })
}

/// Forward and backward.
pub fn step(model: &(impl Module + Clone + 'static), x: &Tensor) -> Result<Run> {
    let (model, x) = (model.clone(), x.clone());
    let grad = model.forward(&x)?.detach().randn_like(0., 1.)?;
    Ok(Box::new(move || {
        let loss = model.forward(&x)?.apply_op1(Upstream(grad.clone()))?;
        std::hint::black_box(loss.backward()?);
        device().synchronize()
    }))
}

/// Hands a given gradient to backward, as torch's `y.backward(g)` does: what is timed is the layer
/// and not a loss.
struct Upstream(Tensor);

impl Upstream {
    fn zero<D: BackendDevice>(device: &D, dtype: DType) -> Result<(D::Storage, Shape)> {
        let shape = Shape::from(());
        Ok((device.zeros_impl(&shape, dtype)?, shape))
    }
}

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Self::zero(s.device(), s.dtype())
    }
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Self::zero(s.device(), s.dtype())
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
