//! The formulas, by candle's operations in F64.

use candle_core::{DType, Result, Tensor};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    Linear,
    Embedding,
    Conv,
    /// An embedding and a head on the same table.
    Tied,
    /// An embedding and a head that follows its update.
    TiedUpdate,
    /// An embedding, a linear layer, and a head on the same table, which has rows of the adapter.
    Rows,
}

/// The trained tensors of a layer, and PiSSA's frozen ones.
pub struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub magnitude: Option<Tensor>,
    pub initial: Option<[Tensor; 2]>,
    /// Of B, (out).
    pub bias: Option<Tensor>,
    /// In place of the table's.
    pub rows: Option<Tensor>,
    pub scaling: f64,
}

/// ΔW in the shape of `w`.
fn delta(layer: Layer, w: &Tensor, f: &Factors) -> Result<Tensor> {
    let wide = |t: &Tensor| t.to_dtype(DType::F64);
    let mut product = wide(&f.b)?.matmul(&wide(&f.a)?)?;
    if let Some([a, b]) = &f.initial {
        product = (product - wide(b)?.matmul(&wide(a)?)?)?;
    }
    let product = match layer {
        Layer::Embedding | Layer::Tied | Layer::TiedUpdate => product.t()?,
        Layer::Linear | Layer::Conv | Layer::Rows => product,
    };
    product.reshape(w.shape())? * f.scaling
}

/// The weight that a layer computes with: the base's, in F64, with the weighted sum of updates.
pub fn weight(layer: Layer, w: &Tensor, summands: &[(&Factors, f64)]) -> Result<Tensor> {
    let mut sum = w.to_dtype(DType::F64)?;
    for (factors, strength) in summands {
        sum = (sum + (delta(layer, w, factors)? * *strength)?)?;
    }
    let Some((Factors { magnitude: Some(m), .. }, _)) = summands.first() else { return Ok(sum) };
    // Of each output: a row, or a column of a table.
    let m = m.to_dtype(DType::F64)?;
    match layer {
        Layer::Embedding | Layer::Tied | Layer::TiedUpdate => {
            let norms = sum.detach().sqr()?.sum_keepdim(0)?.sqrt()?;
            sum.broadcast_mul(&m.unsqueeze(0)?.div(&norms)?)
        }
        Layer::Linear | Layer::Conv | Layer::Rows => {
            let flat = sum.flatten_from(1)?;
            let norms = flat.detach().sqr()?.sum_keepdim(1)?.sqrt()?;
            flat.broadcast_mul(&m.unsqueeze(1)?.div(&norms)?)?.reshape(sum.shape())
        }
    }
}

/// The rows whose indices are trained.
pub const TRAINED: [usize; 2] = [3, 8];

/// A table with the adapter's rows.
pub fn with_rows(table: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let all = (0..table.dim(0)?).map(|i| match TRAINED.iter().position(|at| *at == i) {
        Some(row) => rows.narrow(0, row, 1),
        None => table.narrow(0, i, 1)?.to_dtype(DType::F64),
    });
    Tensor::cat(&all.collect::<Result<Vec<_>>>()?, 0)
}

/// The layer's output, flat; `table` is what a tied head computes with.
pub fn forward(layer: Layer, x: &Tensor, w: &Tensor, table: &Tensor) -> Result<Tensor> {
    let rows = |ids: &Tensor, table: &Tensor| {
        table.index_select(&ids.flatten_all()?, 0)?.reshape([ids.dims(), &[table.dim(1)?]].concat())
    };
    match layer {
        Layer::Linear => x.to_dtype(DType::F64)?.broadcast_matmul(&w.t()?),
        Layer::Embedding => rows(x, w),
        Layer::Conv => x.to_dtype(DType::F64)?.conv2d(w, 1, 1, 1, 1),
        Layer::Tied => rows(x, w)?.broadcast_matmul(&table.to_dtype(DType::F64)?.t()?),
        Layer::TiedUpdate => rows(x, w)?.broadcast_matmul(&w.t()?),
        Layer::Rows => {
            let table = table.to_dtype(DType::F64)?;
            rows(x, &table)?.broadcast_matmul(&w.t()?)?.broadcast_matmul(&table.t()?)
        }
    }
}
