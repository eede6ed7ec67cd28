//! The product of two matrices that need no gradient.

use super::backend::Backend;
use super::op::{Custom, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `a·b`, (m, k) by (k, n), without a graph.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Custom(Matmul))
}

struct Matmul;

impl Op<2> for Matmul {
    const NAME: &'static str = "product";

    fn forward<S: Backend>(&self, [(a, al), (b, bl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let ((m, k), (rows, n)) = (al.shape().dims2()?, bl.shape().dims2()?);
        if k != rows {
            bail!("product: of {:?} and {:?}", al.dims(), bl.dims())
        }
        let shape = Shape::from((m, n));
        Ok((a.product(al, b, bl)?.rounded(&shape, a.dtype())?, shape))
    }

    fn backward(&self, _: [&Tensor; 2], _: &Tensor) -> Result<[Option<Tensor>; 2]> {
        bail!("product: no gradient")
    }
}
