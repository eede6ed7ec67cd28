//! Matrix product without a graph.

use crate::ops::backend::Backend;
use crate::ops::op::{Custom, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `a·b`, (m, k) by (k, n), without a graph.
pub(in crate::ops) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Custom(MatmulOp))
}

struct MatmulOp;

impl Op<2> for MatmulOp {
    const NAME: &'static str = "matmul-no-grad";

    fn forward<S: Backend>(&self, [(a, al), (b, bl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let ((m, k), (rows, n)) = (al.shape().dims2()?, bl.shape().dims2()?);
        if k != rows {
            bail!("matmul: the shapes {:?} and {:?} do not match", al.dims(), bl.dims())
        }
        let shape = Shape::from((m, n));
        Ok((a.gemm(al, b, bl)?.round_to(&shape, a.dtype())?, shape))
    }
}
