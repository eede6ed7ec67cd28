//! `x·W + x̃·Aᵀ·(s·B)ᵀ + bias` as one operation, with gradients for `x`, `A` and `B` alone.
//!
//! Forward computes `u = x̃·Aᵀ` (m, r) and adds `u·(s·B)ᵀ` and the bias to `x·W` while a block of rows
//! is in the cache. Backward computes `h = g·(s·B)` (m, r), then `gA = hᵀ·x̃`, `gB = s·gᵀ·u` and
//! `gx = g·Wᵀ + h·A`.

use super::backend::Backend;
use super::elementwise::add_bias;
use super::low_rank::{compute_dtype, LowRank, LowRankTerm};
use super::matmul::matmul;
use super::matrix::Matrix;
use super::op::{if_tracked, Custom, Op};
use candle_core::{Layout, Result, Shape, Tensor, D};

/// `x·W`, with the update of x̃ and the bias, for a contiguous `x` of `m` rows and a mask for x̃.
pub(super) fn product(
    x: &Tensor,
    m: usize,
    w: Matrix,
    bias: Option<&Tensor>,
    update: Option<&LowRank>,
    mask: Option<Tensor>,
) -> Result<Tensor> {
    let (tracked, frozen) = match bias {
        Some(b) if b.track_op() => (Some(b), None),
        b => (None, b),
    };
    let linear = LinearOp { m, bias: frozen.map(Tensor::detach), terms: vec![] };
    let y = match (update, w) {
        (None, Matrix::Dense(w)) => x.apply_op2(&w, Custom(linear))?,
        (None, w) => x.apply_op1(Custom(FrozenLinearOp { w, linear }))?,
        (Some(update), w) => {
            let frozen = update.detached();
            let u =
                matmul(&masked(x, m, mask.as_ref())?, &frozen.a_in_compute_dtype(x.dtype())?.t()?)?;
            let op = LoraLinearOp { w: w.detach(), linear, update: frozen, u, mask };
            x.apply_op3(update.a(), update.b(), Custom(op.with_terms()?))?
        }
    };
    match tracked {
        None => Ok(y),
        Some(bias) => add_bias(&y, bias, y.rank() - 1),
    }
}

/// x̃ as a matrix of `m` rows in the compute dtype.
pub(super) fn masked(x: &Tensor, m: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let x = x.detach().to_dtype(compute_dtype(x.dtype()))?;
    let x = match mask {
        Some(mask) => (x * mask)?,
        None => x,
    };
    x.reshape((m, x.dim(D::Minus1)?))
}

/// `x·W` plus low-rank terms and a bias, with `x` seen as a matrix of `m` rows.
pub(super) struct LinearOp {
    pub m: usize,
    pub bias: Option<Tensor>,
    pub terms: Vec<LowRankTerm>,
}

impl LinearOp {
    fn run<S: Backend>(
        &self,
        (x, xl): (&S, &Layout),
        (k, n): (usize, usize),
        gemm: impl FnOnce(&S, &Layout) -> Result<S>,
    ) -> Result<(S, Shape)> {
        let rows = Layout::contiguous_with_offset((self.m, k), xl.start_offset());
        let y = gemm(x, &rows)?;
        let y = y.add_low_rank((self.m, n), self.bias.as_ref(), &self.terms)?;
        let mut dims = xl.dims().to_vec();
        dims.pop();
        dims.push(n);
        let shape = dims.into();
        Ok((y.round_to(&shape, x.dtype())?, shape))
    }

    /// With a weight that is no operand, so that candle's backward gives it no gradient.
    pub fn run_frozen<S: Backend>(&self, x: (&S, &Layout), w: &Matrix) -> Result<(S, Shape)> {
        let dims = w.dims2()?;
        match w {
            Matrix::Dense(w) => {
                let (w, wl) = w.storage_and_layout();
                self.run(x, dims, |x, xl| x.gemm(xl, S::of(&w)?, wl))
            }
            Matrix::Quantized(w) => self.run(x, dims, |x, xl| x.gemm_quantized(xl, w)),
        }
    }
}

impl Op<2> for LinearOp {
    const NAME: &'static str = "linear";

    fn forward<S: Backend>(&self, [x, (w, wl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        self.run(x, wl.shape().dims2()?, |x, xl| x.gemm(xl, w, wl))
    }

    fn backward(
        &self,
        [x, w]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let (k, n) = w.dims2()?;
        let grad = grad.contiguous()?;
        let gx = if_tracked(x, || {
            linear_no_grad(&grad, Matrix::Dense(w.detach().t()?), self.m, vec![])
        })?;
        // candle's GEMM is faster where both operands are contiguous along the summed dimension.
        let gw = if_tracked(w, || {
            x.detach().reshape((self.m, k))?.t()?.matmul(&grad.reshape((self.m, n))?)
        })?;
        Ok([gx, gw])
    }
}

/// `x·W` plus a bias, with a frozen weight.
struct FrozenLinearOp {
    w: Matrix,
    linear: LinearOp,
}

impl Op<1> for FrozenLinearOp {
    const NAME: &'static str = "frozen-linear";

    fn forward<S: Backend>(&self, [x]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        self.linear.run_frozen(x, &self.w)
    }

    fn backward(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let gx = if_tracked(x, || {
            linear_no_grad(&grad.contiguous()?, self.w.t()?, self.linear.m, vec![])
        })?;
        Ok([gx])
    }
}

/// `x·w` plus low-rank terms, without a graph.
pub(super) fn linear_no_grad(
    x: &Tensor,
    w: Matrix,
    m: usize,
    terms: Vec<LowRankTerm>,
) -> Result<Tensor> {
    let linear = LinearOp { m, bias: None, terms };
    x.apply_op1_no_bwd(&Custom(FrozenLinearOp { w, linear }))
}

/// The operands are `x`, `A` and `B`. W is a field, so that candle's backward gives it no gradient.
struct LoraLinearOp {
    w: Matrix,
    linear: LinearOp,
    update: LowRank,
    /// `x̃·Aᵀ` (m, ranks)
    u: Tensor,
    mask: Option<Tensor>,
}

impl LoraLinearOp {
    fn with_terms(mut self) -> Result<Self> {
        self.linear.terms = self
            .update
            .factors(self.w.dtype())?
            .into_iter()
            .map(|f| {
                let u = self.u.narrow(1, f.ranks.start, f.ranks.len())?.contiguous()?;
                Ok(LowRankTerm { u, v: f.b.t()?, rows: 0..self.linear.m, cols: f.outputs })
            })
            .collect::<Result<_>>()?;
        Ok(self)
    }
}

impl Op<3> for LoraLinearOp {
    const NAME: &'static str = "lora-linear";

    fn forward<S: Backend>(&self, [x, ..]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        self.linear.run_frozen(x, &self.w)
    }

    fn backward(
        &self,
        [x, a, b]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (m, (k, n)) = (self.linear.m, self.w.dims2()?);
        let grad = grad.contiguous()?;
        let g = grad.to_dtype(compute_dtype(grad.dtype()))?.reshape((m, n))?;
        let (mut h, mut gb) = (vec![], vec![]);
        for f in self.update.factors(x.dtype())? {
            let g = gemm_layout(g.narrow(1, f.outputs.start, f.outputs.len())?)?;
            h.push(matmul(&g, &f.b)?);
            let u = self.u.narrow(1, f.ranks.start, f.ranks.len())?.contiguous()?;
            // The scaling is applied to the small result.
            gb.push((matmul(&g.t()?, &u)? * self.update.scaling())?);
        }
        let (h, gb) = (concat(h, 1)?, concat(gb, 0)?);
        let ga = if_tracked(a, || {
            matmul(&h.t()?, &masked(x, m, self.mask.as_ref())?)?.to_dtype(a.dtype())
        })?;
        let gb = if_tracked(b, || gb.to_dtype(b.dtype()))?;
        let gx = if_tracked(x, || {
            let (wt, a) = (self.w.t()?, self.update.a_in_compute_dtype(x.dtype())?);
            match &self.mask {
                None => {
                    let term = LowRankTerm { u: h, v: a, rows: 0..m, cols: 0..k };
                    linear_no_grad(&grad, wt, m, vec![term])
                }
                Some(mask) => {
                    let through = (matmul(&h, &a)?.reshape(x.shape())? * mask)?;
                    linear_no_grad(&grad, wt, m, vec![])? + through.to_dtype(x.dtype())?
                }
            }
        })?;
        Ok([gx, ga, gb])
    }
}

/// The weight in a layout of [`gemm_layout`].
pub(super) fn gemm_operand(w: &Matrix) -> Result<Matrix> {
    Ok(match w {
        Matrix::Dense(w) => Matrix::Dense(gemm_layout(w.clone())?),
        quantized => quantized.clone(),
    })
}

/// `x` if the backend's GEMM accepts its layout (CPU: any strides; devices, MKL and Accelerate:
/// contiguous or transposed contiguous), else a contiguous copy.
pub(super) fn gemm_layout(x: Tensor) -> Result<Tensor> {
    let any = x.device().is_cpu() && !cfg!(any(feature = "mkl", feature = "accelerate"));
    if any || x.is_contiguous() || x.t()?.is_contiguous() {
        Ok(x)
    } else {
        x.contiguous()
    }
}

fn concat(mut tensors: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    match tensors.len() {
        1 => Ok(tensors.remove(0)),
        _ => Tensor::cat(&tensors, dim),
    }
}
