//! `y = x·W + x̃·Aᵀ·(s·B)ᵀ + bias`: the product with a frozen weight and a low-rank update of it as
//! one operation. It adds the update where the product already lies, and computes gradients for
//! `x`, `A` and `B` alone.

use super::backend::{wide, Backend, Term};
use super::matmul::matmul;
use super::op::{if_tracked, Custom, Op};
use super::{biased, dropout_mask};
use crate::layers::LowRank;
use candle_core::{bail, Layout, Result, Shape, Tensor, D};

/// `x` (.., in) to (.., out), with `w` (in, out) in any layout and `bias` (out).
///
/// Without an update this is a linear layer whose operands get a gradient only where a variable
/// lies behind them. With one, `w` is frozen.
pub(crate) fn linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    update: Option<&LowRank>,
) -> Result<Tensor> {
    let (k, n) = w.dims2()?;
    let Some((&last, leading)) = x.dims().split_last() else {
        bail!("linear: the input is a scalar, expected (.., in_features = {k})")
    };
    if last != k {
        bail!("linear: the input is {:?}, expected (.., in_features = {k})", x.dims())
    }
    if x.dtype() != w.dtype() {
        bail!("linear: the input is {:?} and the weight {:?}", x.dtype(), w.dtype())
    }
    let fits = |b: &Tensor| {
        b.dims() == [n] && b.dtype() == w.dtype() && b.device().same_device(w.device())
    };
    if let Some(b) = bias.filter(|b| !fits(b)) {
        bail!("linear: the bias is {b:?}, expected {n} values beside {w:?}")
    }
    let m: usize = leading.iter().product();
    if m == 0 || k == 0 {
        // Some backends refuse empty products.
        let y = Tensor::zeros([leading, &[n]].concat(), x.dtype(), x.device())?;
        return bias.map_or(Ok(y.clone()), |bias| biased(&y, bias, y.rank() - 1));
    }
    let (x, w) = (x.contiguous()?, &packed(w.clone())?);
    let (tracked, frozen) = match bias {
        Some(b) if b.track_op() => (Some(b), None),
        b => (None, b),
    };
    let product = Product { m, bias: frozen.map(Tensor::detach), terms: vec![] };
    let y = match update {
        None => x.apply_op2(w, Custom(product))?,
        Some(update) => {
            let mask = dropout_mask(&x, update.dropout(), wide(x.dtype()))?;
            let frozen = update.frozen();
            let u = matmul(&dropped(&x, m, mask.as_ref())?, &frozen.wide_a(x.dtype())?.t()?)?;
            let op = Adapted { w: w.detach(), product, update: frozen, u, mask };
            x.apply_op3(update.a(), update.b(), Custom(op.with_terms()?))?
        }
    };
    match tracked {
        None => Ok(y),
        Some(bias) => biased(&y, bias, y.rank() - 1),
    }
}

/// `x` as a matrix of `m` rows, after dropout, in the dtype of the low-rank products.
fn dropped(x: &Tensor, m: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let x = x.detach().to_dtype(wide(x.dtype()))?;
    let x = match mask {
        Some(mask) => (x * mask)?,
        None => x,
    };
    x.reshape((m, x.dim(D::Minus1)?))
}

/// `x·W` plus a bias and thin products, `x` seen as a matrix of `m` rows.
struct Product {
    m: usize,
    bias: Option<Tensor>,
    terms: Vec<Term>,
}

impl Product {
    fn of<S: Backend>(&self, (x, xl): (&S, &Layout), (w, wl): (&S, &Layout)) -> Result<(S, Shape)> {
        let (k, n) = wl.shape().dims2()?;
        let rows = Layout::contiguous_with_offset((self.m, k), xl.start_offset());
        let y = x.product(&rows, w, wl)?;
        let y = y.plus((self.m, n), self.bias.as_ref(), &self.terms)?;
        let mut dims = xl.dims().to_vec();
        dims.pop();
        dims.push(n);
        let shape = dims.into();
        Ok((y.rounded(&shape, x.dtype())?, shape))
    }
}

impl Op<2> for Product {
    const NAME: &'static str = "frozen-product";

    fn forward<S: Backend>(&self, [x, w]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        self.of(x, w)
    }

    fn backward(&self, [x, w]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (k, n) = w.dims2()?;
        let grad = grad.contiguous()?;
        let gx = if_tracked(x, || product(&grad, &w.detach().t()?, self.m, vec![]))?;
        // By candle, which is the faster where both operands are long in the direction of the sum.
        let gw = if_tracked(w, || {
            x.detach().reshape((self.m, k))?.t()?.matmul(&grad.reshape((self.m, n))?)
        })?;
        Ok([gx, gw])
    }
}

/// `x·w` plus thin products, without a graph.
fn product(x: &Tensor, w: &Tensor, m: usize, terms: Vec<Term>) -> Result<Tensor> {
    x.apply_op2_no_bwd(w, &Custom(Product { m, bias: None, terms }))
}

struct Adapted {
    w: Tensor,
    product: Product,
    update: LowRank,
    /// `x̃·Aᵀ` (m, ranks)
    u: Tensor,
    mask: Option<Tensor>,
}

impl Adapted {
    fn with_terms(mut self) -> Result<Self> {
        self.product.terms = self
            .update
            .factors(self.w.dtype())?
            .into_iter()
            .map(|f| {
                let u = self.u.narrow(1, f.ranks.start, f.ranks.len())?.contiguous()?;
                Ok(Term { u, v: f.b.t()?, rows: 0..self.product.m, cols: f.out })
            })
            .collect::<Result<_>>()?;
        Ok(self)
    }
}

impl Op<3> for Adapted {
    const NAME: &'static str = "adapted-product";

    fn forward<S: Backend>(&self, [x, ..]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        let (w, wl) = self.w.storage_and_layout();
        self.product.of(x, (S::of(&w)?, wl))
    }

    fn backward(&self, [x, a, b]: [&Tensor; 3], grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (m, (k, n)) = (self.product.m, self.w.dims2()?);
        let grad = grad.contiguous()?;
        let g = grad.to_dtype(wide(grad.dtype()))?.reshape((m, n))?;
        let (mut h, mut gb) = (vec![], vec![]);
        for f in self.update.factors(x.dtype())? {
            let g = packed(g.narrow(1, f.out.start, f.out.len())?)?;
            h.push(matmul(&g, &f.b)?);
            let u = self.u.narrow(1, f.ranks.start, f.ranks.len())?.contiguous()?;
            // The scaling is applied to the product's small result.
            gb.push((matmul(&g.t()?, &u)? * self.update.scaling())?);
        }
        let (h, gb) = (joined(h, 1)?, joined(gb, 0)?);
        let ga = if_tracked(a, || {
            matmul(&h.t()?, &dropped(x, m, self.mask.as_ref())?)?.to_dtype(a.dtype())
        })?;
        let gb = if_tracked(b, || gb.to_dtype(b.dtype()))?;
        let gx = if_tracked(x, || {
            let (wt, wide_a) = (self.w.t()?, self.update.wide_a(x.dtype())?);
            match &self.mask {
                None => {
                    let term = Term { u: h, v: wide_a, rows: 0..m, cols: 0..k };
                    product(&grad, &wt, m, vec![term])
                }
                Some(mask) => {
                    let through = (matmul(&h, &wide_a)?.reshape(x.shape())? * mask)?;
                    product(&grad, &wt, m, vec![])? + through.to_dtype(x.dtype())?
                }
            }
        })?;
        Ok([gx, ga, gb])
    }
}

/// A matrix as the products take it: the CPU's with any strides, the others without gaps, also
/// transposed.
fn packed(x: Tensor) -> Result<Tensor> {
    let any = x.device().is_cpu() && !cfg!(any(feature = "mkl", feature = "accelerate"));
    match any || x.is_contiguous() || x.t()?.is_contiguous() {
        true => Ok(x),
        false => x.contiguous(),
    }
}

fn joined(mut parts: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Tensor::cat(&parts, dim),
    }
}
