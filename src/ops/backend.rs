//! What an operation asks of a backend, with defaults composed of candle's own operations. CUDA and
//! Metal use the defaults; the CPU has its own implementation in [`cpu`](super::cpu).

use super::matrix::Quantized;
use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{bail, CudaStorage, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor};
use std::ops::Range;

/// A rank-k term of a sum: `y[rows, cols] += u·v`, with `u` (rows, k) and `v` (k, cols).
#[derive(Debug, Clone)]
pub(crate) struct LowRankTerm {
    pub u: Tensor,
    pub v: Tensor,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl LowRankTerm {
    /// k
    pub fn rank(&self) -> usize {
        self.u.layout().dims()[1]
    }
}

pub(crate) trait Backend: BackendStorage {
    /// This backend's view of a tensor's storage.
    fn of(storage: &Storage) -> Result<&Self>;

    /// The matrix product `self·rhs`. A backend that upcasts its operands returns the wider dtype; the
    /// caller rounds the result by [`Backend::round_to`].
    fn gemm(&self, l: &Layout, rhs: &Self, rl: &Layout) -> Result<Self> {
        candle_gemm(self, l, rhs, rl)
    }

    /// [`Backend::gemm`] with a quantised `rhs`. By default the whole of it is dequantised, in the dtype of
    /// `self`, and freed after the product.
    fn gemm_quantized(&self, l: &Layout, rhs: &Quantized) -> Result<Self> {
        dequantized_gemm(self, l, rhs)
    }

    /// `self`, a contiguous tensor, in `dtype`.
    fn round_to(self, shape: &Shape, dtype: DType) -> Result<Self> {
        candle_round_to(self, shape, dtype)
    }

    /// `self`, a contiguous (m, n) matrix, plus a bias on each row and each term on its block.
    fn add_low_rank(
        self,
        dims: (usize, usize),
        bias: Option<&Tensor>,
        terms: &[LowRankTerm],
    ) -> Result<Self> {
        add_low_rank_by_passes(self, dims, bias, terms)
    }
}

impl Backend for CudaStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cuda(s) => Ok(s),
            s => bail!("an operand is on {:?}, expected CUDA", s.device().location()),
        }
    }
}

impl Backend for MetalStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Metal(s) => Ok(s),
            s => bail!("an operand is on {:?}, expected Metal", s.device().location()),
        }
    }
}

pub(super) fn candle_gemm<S: Backend>(x: &S, l: &Layout, rhs: &S, rl: &Layout) -> Result<S> {
    let ((m, k), (_, n)) = (l.shape().dims2()?, rl.shape().dims2()?);
    x.matmul(rhs, (1, m, n, k), l, rl)
}

pub(super) fn dequantized_gemm<S: Backend>(x: &S, l: &Layout, rhs: &Quantized) -> Result<S> {
    let rhs = rhs.dequantize()?;
    let (rhs, rl) = rhs.storage_and_layout();
    x.gemm(l, S::of(&rhs)?, rl)
}

pub(super) fn candle_round_to<S: Backend>(y: S, shape: &Shape, dtype: DType) -> Result<S> {
    if y.dtype() == dtype {
        Ok(y)
    } else {
        y.to_dtype(&Layout::contiguous(shape), dtype)
    }
}

/// One pass over `y` for each term and one for the bias: safe code cannot ask candle for a GEMM that
/// adds to its output.
pub(super) fn add_low_rank_by_passes<S: Backend>(
    mut y: S,
    (m, n): (usize, usize),
    bias: Option<&Tensor>,
    terms: &[LowRankTerm],
) -> Result<S> {
    let layout = Layout::contiguous((m, n));
    for term in terms {
        let ((u, ul), (v, vl)) = (term.u.storage_and_layout(), term.v.storage_and_layout());
        let (rows, cols) = (term.rows.len(), term.cols.len());
        let block = Layout::contiguous((rows, cols));
        let product = S::of(&u)?.gemm(ul, S::of(&v)?, vl)?.round_to(block.shape(), y.dtype())?;
        let place = layout.narrow(0, term.rows.start, rows)?.narrow(1, term.cols.start, cols)?;
        let sum = y.binary_impl::<Add>(&product, &place, &block)?;
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
