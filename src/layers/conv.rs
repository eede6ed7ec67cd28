//! The convolutions, written once for any number n of spatial dimensions: `A` is (r·k, in·k^⌈n/2⌉) and
//! `B` (out/g·k^⌊n/2⌋, r·k).

use super::adapted::{sealed::Sealed, wrapped_bias, Adapted, Kind};
use super::config::{refuse_options, LoraConfig};
use super::init::{bias_of_b, kernels, low_rank, uniform, FactorInit};
use super::kind::LayerKind;
use super::names::Part;
use super::placement::Placement;
use super::weight::{Effective, MergedCopy, Weight, WeightTensors};
use crate::ops::{self, checked_product, Geometry, Matrix};
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};

/// The options of a [`Conv3d`], the same in all three dimensions. candle has no such layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv3dConfig {
    /// Zeros added on both sides of each spatial dimension. Default 0.
    pub padding: usize,
    /// Default 1.
    pub stride: usize,
    /// Default 1.
    pub dilation: usize,
    /// Groups of channels, as in torch. Default 1.
    pub groups: usize,
}

impl Default for Conv3dConfig {
    fn default() -> Self {
        Self { padding: 0, stride: 1, dilation: 1, groups: 1 }
    }
}

/// The options of a convolution: candle's `Conv1dConfig` and `Conv2dConfig`, and [`Conv3dConfig`].
pub trait ConvConfig: Copy + std::fmt::Debug + Kind {
    /// The number of spatial dimensions.
    const N: usize;
    /// (padding, stride, dilation, groups)
    fn options(&self) -> (usize, usize, usize, usize);
}

macro_rules! conv_config {
    ($($config:ty, $n:literal, $kind:ident;)*) => {$(
        impl Sealed for $config {}
        impl Kind for $config {
            fn layer_kind(&self) -> LayerKind {
                LayerKind::$kind { groups: self.groups }
            }
        }
        impl ConvConfig for $config {
            const N: usize = $n;
            fn options(&self) -> (usize, usize, usize, usize) {
                (self.padding, self.stride, self.dilation, self.groups)
            }
        }
    )*};
}
conv_config! { Conv1dConfig, 1, Conv1d; Conv2dConfig, 2, Conv2d; Conv3dConfig, 3, Conv3d; }

/// [`candle_nn::Conv1d`] with a low-rank update of its kernel, as [`Conv2d`]: `x` is (batch, in,
/// length), `W` (out, in/g, k), `A` (r·k, in·k) and `B` (out/g, r·k). loralib's fails for every k > 1.
pub type Conv1d = Adapted<Conv1dConfig>;

/// [`candle_nn::Conv2d`] with a low-rank update of its kernel:
/// `y = conv(x, W) + conv(dropout(x), ΔW) + bias`, with `ΔW = (alpha/r)·(B·A)` reshaped to the kernel.
///
/// With g groups and a kernel of k in each dimension, `x` is (batch, in, height, width), `W` (out,
/// in/g, k, k), `A` (r·k, in·k) and `B` (out/g·k, r·k). A is initialised with U(±1/√(in·k)) and B with zeros.
/// `cudnn_fwd_algo` of candle's configuration has no effect. With
/// [`conv_kernels`](LoraConfig::conv_kernels) the factors have PEFT's shapes instead.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
/// let layer = lora::conv2d(3, 8, 3, Conv2dConfig { padding: 1, ..Default::default() }, cfg, vb)?;
/// let y = layer.forward(&Tensor::ones((2, 3, 16, 12), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 8, 16, 12]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type Conv2d = Adapted<Conv2dConfig>;

/// A convolution over (batch, in, depth, height, width) with a low-rank update of its kernel, as
/// [`Conv2d`]: `W` is (out, in/g, k, k, k), `A` (r·k, in·k²), initialised with U(±1/√(in·k²)), and `B`
/// (out/g·k, r·k). loralib's fails for every k > 1.
pub type Conv3d = Adapted<Conv3dConfig>;

impl Conv1d {
    /// Wraps a layer. `vb`, at the layer's path, gives `lora_A` and `lora_B`, and the bias if `vb` trains
    /// it.
    ///
    /// # Errors
    /// If an option is out of range or not supported (`fan_in_fan_out`), or `vb` has tensors of other
    /// shapes.
    pub fn new(base: candle_nn::Conv1d, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        wrap(base.weight(), base.bias(), *base.config(), cfg, vb)
    }

    /// The candle_nn layer with the merged kernel.
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Conv1d> {
        let MergedCopy { weight, bias } = self.weight.merged_copy()?;
        Ok(candle_nn::Conv1d::new(weight, bias, self.kind))
    }
}

impl Conv2d {
    /// Wraps a layer, as [`Conv1d::new`].
    ///
    /// # Errors
    /// As [`Conv1d::new`].
    pub fn new(base: candle_nn::Conv2d, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        wrap(base.weight(), base.bias(), *base.config(), cfg, vb)
    }

    /// The candle_nn layer with the merged kernel.
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Conv2d> {
        let MergedCopy { weight, bias } = self.weight.merged_copy()?;
        Ok(candle_nn::Conv2d::new(weight, bias, self.kind))
    }
}

impl Conv3d {
    /// A layer around a weight (out, in/g, k, k, k) and a bias (out), as [`Conv1d::new`].
    ///
    /// # Errors
    /// As [`Conv1d::new`].
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        conv_cfg: Conv3dConfig,
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        wrap(&weight, bias.as_ref(), conv_cfg, cfg, vb)
    }

    /// The layer with the merged kernel and without an adapter; candle_nn has no such layer.
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<Self> {
        let MergedCopy { weight, bias } = self.weight.merged_copy()?;
        let weight = Weight::plain(weight, bias, Placement::Reshaped);
        Ok(Self { weight, kind: self.kind })
    }
}

impl<C: ConvConfig> Adapted<C> {
    fn geometry(&self) -> Geometry {
        let (padding, stride, dilation, groups) = self.kind.options();
        let spatial = |value, none| {
            let mut sizes = [none; 3];
            sizes[3 - C::N..].fill(value);
            sizes
        };
        let mut kernel = [1; 3];
        for (size, dim) in
            kernel[3 - C::N..].iter_mut().zip(self.weight.base().tensor().dims().iter().skip(2))
        {
            *size = *dim;
        }
        Geometry {
            groups,
            kernel,
            padding: spatial(padding, 0),
            stride: spatial(stride, 1),
            dilation: spatial(dilation, 1),
        }
    }
}

fn wrap<C: ConvConfig>(
    weight: &Tensor,
    bias: Option<&Tensor>,
    kind: C,
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<Adapted<C>> {
    let weight = adapt_kernel(weight, kind, &cfg, &vb)?;
    let bias = wrapped_bias(bias, &at_prefix(&vb, "bias"))?;
    Ok(Adapted { kind, weight: weight.with_bias(bias).into() })
}

/// The kernel of a convolution of this kind with its update.
fn adapt_kernel<C: ConvConfig>(
    base: &Tensor,
    kind: C,
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    let (_, stride, dilation, groups) = kind.options();
    if stride == 0 || dilation == 0 {
        bail!("conv{}d: the weight {:?} does not fit the options {kind:?}", C::N, base.dims())
    }
    adapt(base, C::N, groups, cfg, vb)
}

/// The kernel of a convolution of `n` spatial dimensions with its update from `vb`.
pub(super) fn adapt(
    base: &Tensor,
    n: usize,
    groups: usize,
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    cfg.validate(base.dtype())?;
    refuse_options(
        "a convolution",
        &[
            ("fan_in_fan_out", cfg.fan_in_fan_out),
            ("init_lora_weights", cfg.init_lora_weights.of_base()),
        ],
    )?;
    let dims = base.dims();
    if dims.len() != n + 2 || dims[2..].iter().any(|k| *k != dims[2]) {
        bail!("conv{n}d: the weight is {dims:?}, expected (out, in/groups) and {n} equal kernel sizes")
    }
    let (out, per_group, k) = (dims[0], dims[1], dims[2]);
    if groups == 0 || out % groups != 0 || dims.contains(&0) {
        bail!("conv{n}d: the weight {dims:?} does not fit {groups} groups")
    }
    let ranks = checked_product(&[cfg.r, k])?;
    let columns = checked_product(&[&[per_group, groups], &[k; 3][..n.div_ceil(2)]].concat())?;
    let rows = out / groups * k.pow(n as u32 / 2);
    let placed = (base, Placement::Reshaped);
    let update = || match ranks_of_kernels(n, groups, cfg, vb) {
        Some(ranks) => kernels(ranks, cfg, base, vb),
        None => low_rank((ranks, columns), rows, FactorInit::RandomA, cfg, placed, vb),
    };
    let update = (cfg.r > 0).then(update).transpose()?;
    let bias_of_b = bias_of_b(out, cfg, base.dtype(), vb)?;
    Ok(WeightTensors::new(base.clone(), update, Placement::Reshaped, cfg)?
        .with_bias_of_b(bias_of_b))
}

/// The ranks, if the factors are kernels as PEFT's: those that `vb` has, or new ones.
fn ranks_of_kernels(n: usize, groups: usize, cfg: &LoraConfig, vb: &VarBuilder) -> Option<usize> {
    let name = Part::A.name();
    if groups > 1 {
        return None;
    }
    let held = vb.contains_tensor(name).then(|| vb.get_unchecked(name).ok()).flatten();
    match held {
        Some(a) => a.dim(0).ok().filter(|_| a.rank() == n + 2),
        None => cfg.conv_kernels.then_some(cfg.r),
    }
}

/// `vb` at the prefix of a convolution's tensor: the layer's own, or loralib's second one, as in
/// `conv.weight` and `conv.bias`.
fn at_prefix<'a>(vb: &VarBuilder<'a>, name: &str) -> VarBuilder<'a> {
    if !vb.contains_tensor(name) && vb.contains_tensor(&format!("conv.{name}")) {
        vb.pp("conv")
    } else {
        vb.clone()
    }
}

impl<C: ConvConfig> Module for Adapted<C> {
    /// (batch, in, spatial..) to (batch, out, spatial..).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Effective { weight, bias, update } = self.weight.effective()?;
        let Matrix::Dense(weight) = weight else {
            bail!("a convolution's kernel cannot be quantised")
        };
        let y = update.apply(x, |x, update| ops::conv(x, &weight, update, self.geometry()))?;
        match bias {
            None => Ok(y),
            Some(bias) => ops::add_bias(&y, &bias, 1),
        }
    }
}

fn build<C: ConvConfig>(
    (in_channels, out_channels, k): (usize, usize, usize),
    bias: bool,
    kind: C,
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<Adapted<C>> {
    let (_, _, _, groups) = kind.options();
    let Some(0) = in_channels.checked_rem(groups) else {
        bail!("conv{}d: {groups} groups do not divide {in_channels} input channels", C::N)
    };
    let per_group = in_channels / groups;
    let shape = [&[out_channels, per_group][..], &[k; 3][..C::N]].concat();
    if checked_product(&shape)? == 0 {
        bail!("conv{}d: the weight's shape {shape:?} is empty", C::N)
    }
    let init = uniform(checked_product(&shape[1..])?);
    let weight = at_prefix(&vb, "weight").get_with_hints(shape, "weight", init)?;
    let weight = adapt_kernel(&weight, kind, &cfg, &vb)?;
    let bias = bias.then(|| at_prefix(&vb, "bias").get_with_hints(out_channels, "bias", init));
    Ok(Adapted { kind, weight: weight.with_bias(bias.transpose()?).into() })
}

macro_rules! constructors {
    ($($with_bias:ident, $without:ident, $config:ty, $layer:ty, $name:literal;)*) => {$(
        #[doc = concat!("A ", $name, "-dimensional convolution with a bias and a kernel of `k` in each \
            dimension, its base and adapter from `vb`: `weight` (or `conv.weight`), `bias` (or \
            `conv.bias`), `lora_A`, `lora_B`.")]
        ///
        /// # Errors
        /// If the groups do not divide the channels, an option is out of range or not supported
        /// (`fan_in_fan_out`), or `vb` lacks a tensor or has it in another shape.
        pub fn $with_bias(
            in_channels: usize,
            out_channels: usize,
            k: usize,
            conv_cfg: $config,
            cfg: LoraConfig,
            vb: VarBuilder,
        ) -> Result<$layer> {
            build((in_channels, out_channels, k), true, conv_cfg, cfg, vb)
        }

        #[doc = concat!("[`", stringify!($with_bias), "`] without a bias.")]
        ///
        /// # Errors
        #[doc = concat!("As [`", stringify!($with_bias), "`].")]
        pub fn $without(
            in_channels: usize,
            out_channels: usize,
            k: usize,
            conv_cfg: $config,
            cfg: LoraConfig,
            vb: VarBuilder,
        ) -> Result<$layer> {
            build((in_channels, out_channels, k), false, conv_cfg, cfg, vb)
        }
    )*};
}
constructors! {
    conv1d, conv1d_no_bias, Conv1dConfig, Conv1d, "one";
    conv2d, conv2d_no_bias, Conv2dConfig, Conv2d, "two";
    conv3d, conv3d_no_bias, Conv3dConfig, Conv3d, "three";
}
