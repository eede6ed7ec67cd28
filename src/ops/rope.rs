//! Rotary embeddings: pairs of values are rotated by a position's angles. The gradient is rotated back.

use super::backend::Backend;
use super::cpu::{f32_slices, map_rows, on_cpu};
use super::op::{if_tracked, run, Fused, Grads, Operand};
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor, D};
use candle_nn::rotary_emb;

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
        let gx = || on_cpu([grad], |[g]| self.rotate::<true>(g));
        Ok([if_tracked(x, gx)?])
    }

    fn composed(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        self.by_candle(x, &self.sin)
    }

    fn composed_backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        Ok([if_tracked(x, || self.by_candle(grad, &self.sin.neg()?))?])
    }
}

impl RopeOp {
    fn by_candle(&self, x: &Tensor, sin: &Tensor) -> Result<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let tokens = if self.rope == Rope::HalvesThd { self.dims.0 } else { self.dims.1 };
        // candle takes the rows of the next item for those that are too many.
        let angles = |t: &Tensor| t.narrow(D::Minus2, 0, tokens)?.to_dtype(x.dtype())?.contiguous();
        let rotate = match self.rope {
            Rope::Halves => rotary_emb::rope,
            Rope::Interleaved => rotary_emb::rope_i,
            Rope::HalvesThd => rotary_emb::rope_thd,
        };
        rotate(&x.contiguous()?, &angles(&self.cos)?, &angles(sin)?)
    }
}
