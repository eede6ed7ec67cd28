//! Convolutions against nested loops over one to three dimensions, which share no code with the crate.

use crate::common::{device, difference, rnd, CFG};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use lora::layers::{Adapted, Conv3dConfig};
use loralib as lora;

const IN: usize = 4;
const OUT: usize = 6;

#[derive(Debug, Clone, Copy)]
struct Options {
    k: usize,
    padding: usize,
    stride: usize,
    dilation: usize,
    groups: usize,
}

/// One spatial dimension.
#[derive(Clone, Copy)]
struct Axis {
    input: usize,
    k: usize,
    padding: usize,
    stride: usize,
    dilation: usize,
}

impl Axis {
    /// A dimension that the convolution does not have.
    const NONE: Self = Self { input: 1, k: 1, padding: 0, stride: 1, dilation: 1 };

    fn outputs(self) -> usize {
        (self.input + 2 * self.padding - self.dilation * (self.k - 1) - 1) / self.stride + 1
    }

    /// The input index of kernel offset `k` at output `o`, or `None` in the padding.
    fn index(self, o: usize, k: usize) -> Option<usize> {
        let at = (o * self.stride + k * self.dilation).checked_sub(self.padding)?;
        (at < self.input).then_some(at)
    }
}

/// The convolution by its definition.
fn by_definition(x: &Tensor, w: &Tensor, options: Options) -> Result<Tensor> {
    let Options { k, padding, stride, dilation, groups } = options;
    let mut axes = [Axis::NONE; 3];
    let skipped = 5 - x.rank();
    for (axis, &input) in axes[skipped..].iter_mut().zip(&x.dims()[2..]) {
        *axis = Axis { input, k, padding, stride, dilation };
    }
    let [d0, d1, d2] = axes;
    let flat = |t: &Tensor| t.flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<f64>();
    let (x_values, w_values) = (flat(x)?, flat(w)?);
    let (ins, out_group) = (IN / groups, OUT / groups);
    let mut y = vec![];
    for (sample, out) in pairs(x.dim(0)?, OUT) {
        for (i, (j, l)) in triples(axes.map(Axis::outputs)) {
            let mut sum = 0.;
            for (c, (a, (b, e))) in
                (0..ins).flat_map(|c| triples(axes.map(|axis| axis.k)).map(move |at| (c, at)))
            {
                let at = (d0.index(i, a), d1.index(j, b), d2.index(l, e));
                if let (Some(i), Some(j), Some(l)) = at {
                    let channel = sample * IN + out / out_group * ins + c;
                    let x = ((channel * d0.input + i) * d1.input + j) * d2.input + l;
                    let w = (((out * ins + c) * d0.k + a) * d1.k + b) * d2.k + e;
                    sum += x_values[x] * w_values[w];
                }
            }
            y.push(sum);
        }
    }
    let dims = [&[x.dim(0)?, OUT], &axes.map(Axis::outputs)[skipped..]].concat();
    Tensor::from_vec(y, dims, &device())
}

fn pairs(a: usize, b: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..a).flat_map(move |i| (0..b).map(move |j| (i, j)))
}

fn triples([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, (usize, usize))> {
    (0..a).flat_map(move |i| pairs(b, c).map(move |rest| (i, rest)))
}

/// The forward of a layer with random factors, against the loops with `W + s·(B·A)` as the kernel.
fn agree<C>(
    dims: &[usize],
    options: Options,
    make: impl Fn(VarBuilder) -> Result<Adapted<C>>,
) -> Result<()>
where
    Adapted<C>: Module,
{
    let vars = VarMap::new();
    let mut layer = make(VarBuilder::from_varmap(&vars, DType::F64, &device()))?;
    for (seed, var) in vars.data().lock().unwrap().values().enumerate() {
        var.set(&rnd(seed as u64, var.dims(), DType::F64)?)?;
    }
    let x = rnd(9, dims, DType::F64)?;
    let update = layer.lora_b().unwrap().matmul(layer.lora_a().unwrap())?;
    let kernel = (layer.weight() + (update.reshape(layer.weight().shape())? * layer.scaling())?)?;
    let expected = by_definition(&x, &kernel, options)?;
    let apart = difference(&layer.forward(&x)?, &expected)?;
    assert!(apart < 1e-13, "{dims:?} {options:?}: {apart}");
    lora::LoraModule::eval(&mut layer)?;
    let apart = difference(&layer.forward(&x)?, &expected)?;
    assert!(apart < 1e-13, "merged, {dims:?} {options:?}: {apart}");
    Ok(())
}

#[test]
fn convolutions_agree_with_nested_loops() -> Result<()> {
    for (k, padding) in [(1, 0), (2, 1), (3, 0), (3, 4)] {
        for (stride, dilation) in pairs(3, 4).map(|(s, d)| (s + 1, d + 1)) {
            for groups in [1, 2] {
                let options = Options { k, padding, stride, dilation, groups };
                let cudnn_fwd_algo = None;
                let one = Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo };
                let two = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo };
                let three = Conv3dConfig { padding, stride, dilation, groups };
                agree(&[2, IN, 11], options, |vb| lora::conv1d_no_bias(IN, OUT, k, one, CFG, vb))?;
                agree(&[2, IN, 9, 10], options, |vb| {
                    lora::conv2d_no_bias(IN, OUT, k, two, CFG, vb)
                })?;
                agree(&[1, IN, 9, 10, 11], options, |vb| {
                    lora::conv3d_no_bias(IN, OUT, k, three, CFG, vb)
                })?;
            }
        }
    }
    Ok(())
}
