//! Rotary embeddings: pairs of values are rotated by a position's angles. The gradient is rotated back.

use super::backend::Backend;
use super::cpu::map_rows;
use super::elementwise::mul_frozen;
use super::fused::fused_or_composed;
use super::op::{if_tracked, Custom, Op};
use candle_core::{bail, DType, Layout, Result, Shape, Tensor, D};

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
    let fused = |x: &Tensor| {
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        let angles = (values(cos)?, values(sin)?);
        let (length, batched) = (cos.dim(D::Minus2)?, cos.rank() == 3);
        let dims = (one, two);
        x.apply_op1(Custom(RopeOp { rope, cos: angles.0, sin: angles.1, dims, length, batched }))
    };
    fused_or_composed(x, fused, |x| composed(x, cos, sin, rope, tokens))
}

struct RopeOp {
    rope: Rope,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The second and third dimension of x.
    dims: (usize, usize),
    /// Positions in cos and sin.
    length: usize,
    batched: bool,
}

impl RopeOp {
    /// Rotates a row of `x` by its position's angles, or with `sign` -1 back.
    #[inline(always)]
    fn rotate(&self, row: usize, x: &[f32], y: &mut [f32], sign: f32) {
        let (one, two) = self.dims;
        let position = match self.rope {
            Rope::HalvesThd => row / two % one,
            _ => row % two,
        };
        let batch = if self.batched { row / (one * two) } else { 0 };
        let half = x.len() / 2;
        let at = (batch * self.length + position) * half;
        let (cos, sin) = (&self.cos[at..][..half], &self.sin[at..][..half]);
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

impl Op<1> for RopeOp {
    const NAME: &'static str = "rope";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let y = S::map_rows(
            [(x, l)],
            #[inline(always)]
            |row, [x], y| self.rotate(row, x, y, 1.),
        )?;
        Ok((y, l.shape().clone()))
    }

    fn backward(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let gx = || {
            map_rows(
                [&grad.contiguous()?],
                #[inline(always)]
                |row, [g], gx| self.rotate(row, g, gx, -1.),
            )
        };
        Ok([if_tracked(x, gx)?])
    }
}

/// The same of candle's operations.
fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor, rope: Rope, tokens: usize) -> Result<Tensor> {
    // (1 or batch, 1, tokens, d/2), or (1 or batch, tokens, 1, d/2).
    let angles = |t: &Tensor| {
        let t = t.narrow(D::Minus2, 0, tokens)?.to_dtype(x.dtype())?;
        let t = if t.rank() == 2 { t.unsqueeze(0)? } else { t };
        t.unsqueeze(if rope == Rope::HalvesThd { 2 } else { 1 })
    };
    let (cos, sin, half) = (angles(cos)?, angles(sin)?, x.dim(D::Minus1)? / 2);
    let (x0, x1) = if rope == Rope::Interleaved {
        let pairs = x.reshape([&x.dims()[..3], &[half, 2]].concat())?;
        (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
    } else {
        (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?)
    };
    let y0 = (mul_frozen(&x0, &cos)? - mul_frozen(&x1, &sin)?)?;
    let y1 = (mul_frozen(&x0, &sin)? + mul_frozen(&x1, &cos)?)?;
    if rope == Rope::Interleaved {
        Tensor::stack(&[y0, y1], 4)?.reshape(x.shape())
    } else {
        Tensor::cat(&[y0, y1], D::Minus1)
    }
}
