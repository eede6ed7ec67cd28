//! Adding thin products and a bias to a matrix that a backend has just made: in place on the CPU,
//! by the backend's own operations elsewhere.

use super::in_place;
use super::product::product;
use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{
    bail, CpuStorage, CudaStorage, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
    WithDType,
};
use std::ops::Range;

/// `y[rows, cols] += u·v`, with `u` (rows, k) and `v` (k, cols), and a small `k`.
#[derive(Debug, Clone)]
pub(crate) struct Term {
    pub u: Tensor,
    pub v: Tensor,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Term {
    /// The rank, `k`.
    pub fn rank(&self) -> usize {
        self.u.layout().dims()[1]
    }
}

pub(crate) trait Backend: BackendStorage {
    /// This backend's view of a tensor's storage.
    fn of(storage: &Storage) -> Result<&Self>;

    /// `self·rhs`, two matrices. Where a backend computes in a wider dtype, the product stays in it
    /// until it is [`Backend::rounded`].
    fn product(&self, l: &Layout, rhs: &Self, rl: &Layout) -> Result<Self> {
        product_by_candle(self, l, rhs, rl)
    }

    /// `self`, a contiguous tensor, in `dtype`.
    fn rounded(self, shape: &Shape, dtype: DType) -> Result<Self> {
        rounded_by_candle(self, shape, dtype)
    }

    /// Rows of `self`, a contiguous (num, dim) table, by i64 ids that are known to be in range, plus
    /// the term.
    fn rows(&self, l: &Layout, ids: &Self, idl: &Layout, term: &Term) -> Result<Self> {
        let dims = (idl.dims()[0], l.dims()[1]);
        self.index_select(ids, l, idl, 0)?.plus(dims, None, std::slice::from_ref(term))
    }

    /// `self`, a contiguous (m, n) matrix, with the bias added to each row and each term to its
    /// block.
    fn plus(self, dims: (usize, usize), bias: Option<&Tensor>, terms: &[Term]) -> Result<Self> {
        plus_by_passes(self, dims, bias, terms)
    }
}

impl Backend for CpuStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cpu(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on the CPU", s.device().location()),
        }
    }

    fn product(&self, l: &Layout, rhs: &Self, rl: &Layout) -> Result<Self> {
        match product((self, l), (rhs, rl)) {
            Some(y) => Ok(y),
            None => product_by_candle(self, l, rhs, rl),
        }
    }

    fn rounded(self, shape: &Shape, dtype: DType) -> Result<Self> {
        match (&self, dtype) {
            (CpuStorage::F32(y), DType::BF16) => Ok(CpuStorage::BF16(in_place::rounded(y))),
            (CpuStorage::F32(y), DType::F16) => Ok(CpuStorage::F16(in_place::rounded(y))),
            _ => rounded_by_candle(self, shape, dtype),
        }
    }

    fn rows(&self, l: &Layout, ids: &Self, idl: &Layout, term: &Term) -> Result<Self> {
        let dim = l.dims()[1];
        let ids = &i64::cpu_storage_as_slice(ids)?[idl.start_offset()..][..idl.dims()[0]];
        let at = l.start_offset()..l.start_offset() + l.shape().elem_count();
        Ok(match self {
            CpuStorage::F32(t) => CpuStorage::F32(in_place::rows(&t[at], ids, dim, term)?),
            CpuStorage::F64(t) => CpuStorage::F64(in_place::rows(&t[at], ids, dim, term)?),
            CpuStorage::F16(t) => CpuStorage::F16(in_place::rows(&t[at], ids, dim, term)?),
            CpuStorage::BF16(t) => CpuStorage::BF16(in_place::rows(&t[at], ids, dim, term)?),
            t => bail!("embedding: a table of {:?}", t.dtype()),
        })
    }

    fn plus(mut self, dims: (usize, usize), bias: Option<&Tensor>, terms: &[Term]) -> Result<Self> {
        match &mut self {
            CpuStorage::F32(y) => in_place::plus(y, dims.1, bias, terms)?,
            CpuStorage::F64(y) => in_place::plus(y, dims.1, bias, terms)?,
            CpuStorage::F16(y) => in_place::plus(y, dims.1, bias, terms)?,
            CpuStorage::BF16(y) => in_place::plus(y, dims.1, bias, terms)?,
            _ => return plus_by_passes(self, dims, bias, terms),
        }
        Ok(self)
    }
}

impl Backend for CudaStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cuda(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on CUDA", s.device().location()),
        }
    }
}

impl Backend for MetalStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Metal(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on Metal", s.device().location()),
        }
    }
}

fn product_by_candle<S: Backend>(x: &S, l: &Layout, rhs: &S, rl: &Layout) -> Result<S> {
    let ((m, k), (_, n)) = (l.shape().dims2()?, rl.shape().dims2()?);
    x.matmul(rhs, (1, m, n, k), l, rl)
}

fn rounded_by_candle<S: Backend>(y: S, shape: &Shape, dtype: DType) -> Result<S> {
    match y.dtype() == dtype {
        true => Ok(y),
        false => y.to_dtype(&Layout::contiguous(shape), dtype),
    }
}

fn plus_by_passes<S: Backend>(
    mut y: S,
    (m, n): (usize, usize),
    bias: Option<&Tensor>,
    terms: &[Term],
) -> Result<S> {
    let layout = Layout::contiguous((m, n));
    for term in terms {
        let ((u, ul), (v, vl)) = (term.u.storage_and_layout(), term.v.storage_and_layout());
        let (rows, cols) = (term.rows.len(), term.cols.len());
        let block = Layout::contiguous((rows, cols));
        let add = S::of(&u)?.product(ul, S::of(&v)?, vl)?.rounded(block.shape(), y.dtype())?;
        let place = layout.narrow(0, term.rows.start, rows)?.narrow(1, term.cols.start, cols)?;
        let sum = y.binary_impl::<Add>(&add, &place, &block)?;
        if (rows, cols) == (m, n) {
            y = sum;
        } else {
            sum.copy2d(&mut y, rows, cols, cols, n, 0, place.start_offset())?;
        }
    }
    if let Some(bias) = bias {
        let bias = bias.to_dtype(y.dtype())?;
        let (b, bl) = bias.storage_and_layout();
        y = y.binary_impl::<Add>(S::of(&b)?, &layout, &bl.broadcast_as((m, n))?)?;
    }
    Ok(y)
}

/// The dtype in which low-rank products are computed beside a base of `dtype`.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The CPU's own way and the one that other devices take, on values up to about 30: apart by
    /// roundings.
    #[test]
    fn in_place_and_by_passes_agree() -> Result<()> {
        let (m, n, cpu) = (7, 10, &Device::Cpu);
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-4), (DType::BF16, 0.5)] {
            let rand =
                |dims: (usize, usize), dtype| Tensor::randn(0f64, 1., dims, cpu)?.to_dtype(dtype);
            let y = rand((m, n), dtype)?;
            // Of half-precision operands the CPU's product is in F32.
            let bias = rand((1, n), if dtype == DType::F32 { DType::BF16 } else { dtype })?;
            let bias = bias.flatten_all()?;
            let mut terms = vec![];
            for (rows, cols, k) in [(0..m, 0..n, 3), (2..5, 0..n, 40), (0..m, 4..9, 1)] {
                let u = rand((rows.len(), k), wide(dtype))?;
                let v = rand((cols.len(), k), wide(dtype))?.t()?;
                terms.push(Term { u, v, rows, cols });
            }
            let sum = |by_passes| {
                let (storage, _) = y.storage_and_layout();
                let y = CpuStorage::of(&storage)?.clone();
                let sum = match by_passes {
                    true => plus_by_passes(y, (m, n), Some(&bias), &terms)?,
                    false => y.plus((m, n), Some(&bias), &terms)?,
                };
                f64::cpu_storage_data(sum.to_dtype(&Layout::contiguous((m, n)), DType::F64)?)
            };
            let apart =
                sum(true)?.iter().zip(&sum(false)?).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(apart < tolerance, "{apart} in {dtype:?}");
        }
        Ok(())
    }
}
