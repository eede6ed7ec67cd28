//! Rotary embeddings: pairs of values are rotated by a position's angles. The gradient is rotated back.

use super::backend::Backend;
use super::cpu::{f32_slices, map_rows, on_cpu};
use super::elementwise::mul_frozen;
use super::op::{if_tracked, run, Fused, Grads, Operand};
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor, D};

/// Which values form a pair, and where the positions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rope {
    /// (batch, heads, tokens, d); value i with value i + d/2.
    Halves,
    /// (batch, heads, tokens, d); neighbouring values.
    Interleaved,
    /// (batch, tokens, heads, d); value i with value i + d/2.
    HalvesThd,
}

/// `x` rotated by `cos` and `sin`, (tokens or more, d/2), or (batch, tokens or more, d/2).
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rope: Rope) -> Result<Tensor> {
    let (batch, one, two, d) = x.dims4()?;
    let tokens = if rope == Rope::HalvesThd { one } else { two };
    let fits = |t: &Tensor| match *t.dims() {
        [length, half] => tokens <= length && 2 * half == d,
        [b, length, half] => b == batch && tokens <= length && 2 * half == d,
        _ => false,
    };
    if !fits(cos) || cos.shape() != sin.shape() {
        let (x, cos, sin) = (x.dims(), cos.dims(), sin.dims());
        bail!("rope: the input is {x:?}, cos {cos:?} and sin {sin:?} in {rope:?}")
    }
    run(RopeOp { rope, cos: cos.detach(), sin: sin.detach(), dims: (one, two) }, [x])
}

struct RopeOp {
    rope: Rope,
    cos: Tensor,
    sin: Tensor,
    /// The second and third dimension of x.
    dims: (usize, usize),
}

impl RopeOp {
    /// Rotates `x` by the angles, or back.
    fn rotate<const BACK: bool>(&self, x: Operand) -> Result<(CpuStorage, Shape)> {
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        let (cos, sin) = (values(&self.cos)?, values(&self.sin)?);
        let ((cos, cl), (sin, sl)) = (cos.storage_and_layout(), sin.storage_and_layout());
        let angles = f32_slices([(CpuStorage::of(&cos)?, cl), (CpuStorage::of(&sin)?, sl)])?;
        let batched = cl.dims().len() == 3;
        let length = cl.dims()[cl.dims().len() - 2];
        map_rows(
            [x],
            #[inline(always)]
            |row, [x], y| {
                let (one, two) = self.dims;
                let position = match self.rope {
                    Rope::HalvesThd => row / two % one,
                    _ => row % two,
                };
                let batch = if batched { row / (one * two) } else { 0 };
                let half = x.len() / 2;
                let angles = angles.map(|all| &all[(batch * length + position) * half..][..half]);
                self.rotate_row(x, y, angles, if BACK { -1. } else { 1. });
            },
        )
    }

    #[inline(always)]
    fn rotate_row(&self, x: &[f32], y: &mut [f32], [cos, sin]: [&[f32]; 2], sign: f32) {
        let half = x.len() / 2;
        if self.rope == Rope::Interleaved {
            let pairs = x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut::<2>().0);
            for (([x0, x1], [y0, y1]), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                (*y0, *y1) = (x0 * c - sign * x1 * s, sign * x0 * s + x1 * c);
            }
        } else {
            let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                y0[i] = x0[i] * cos[i] - sign * x1[i] * sin[i];
                y1[i] = sign * x0[i] * sin[i] + x1[i] * cos[i];
            }
        }
    }
}

impl Fused<1> for RopeOp {
    const NAME: &'static str = "rope";

    fn forward(&self, [x]: [Operand; 1]) -> Result<(CpuStorage, Shape)> {
        self.rotate::<false>(x)
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        let gx = || on_cpu([&grad.contiguous()?], |[g]| self.rotate::<true>(g));
        Ok([if_tracked(x, gx)?])
    }

    fn composed(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let tokens = if self.rope == Rope::HalvesThd { self.dims.0 } else { self.dims.1 };
        // (1 or batch, 1, tokens, d/2), or (1 or batch, tokens, 1, d/2).
        let angles = |t: &Tensor| {
            let t = t.narrow(D::Minus2, 0, tokens)?.to_dtype(x.dtype())?;
            let t = if t.rank() == 2 { t.unsqueeze(0)? } else { t };
            t.unsqueeze(if self.rope == Rope::HalvesThd { 2 } else { 1 })
        };
        let (cos, sin, half) = (angles(&self.cos)?, angles(&self.sin)?, x.dim(D::Minus1)? / 2);
        let (x0, x1) = if self.rope == Rope::Interleaved {
            let pairs = x.reshape([&x.dims()[..3], &[half, 2]].concat())?;
            (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
        } else {
            (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?)
        };
        let y0 = (mul_frozen(&x0, &cos)? - mul_frozen(&x1, &sin)?)?;
        let y1 = (mul_frozen(&x0, &sin)? + mul_frozen(&x1, &cos)?)?;
        if self.rope == Rope::Interleaved {
            Tensor::stack(&[y0, y1], 4)?.reshape(x.shape())
        } else {
            Tensor::cat(&[y0, y1], D::Minus1)
        }
    }
}
