//! What candle lacks or gets wrong: products that cost a frozen weight no gradient, and
//! convolutions in 1, 2 and 3 dimensions whose gradients are right.

mod backend;
mod buffer;
mod conv;
mod convolve;
mod dropout;
mod embedding;
mod frozen;
mod gather;
mod in_place;
mod linear;
mod matmul;
mod merge;
mod op;
#[cfg(all(
    feature = "faer",
    target_arch = "x86_64",
    not(any(feature = "mkl", feature = "accelerate"))
))]
mod product;
#[cfg(not(all(
    feature = "faer",
    target_arch = "x86_64",
    not(any(feature = "mkl", feature = "accelerate"))
)))]
mod product {
    //! candle's own, always.
    use candle_core::{CpuStorage, Layout};

    type Operand<'a> = (&'a CpuStorage, &'a Layout);

    pub(super) trait Real {}
    impl<T> Real for T {}

    pub(super) fn product(_: Operand, _: Operand) -> Option<CpuStorage> {
        None
    }

    pub(super) fn product_into<T>(_: &mut [T], _: bool, _: Operand, _: Operand) -> bool {
        false
    }
}
mod thin;
mod unfold;

pub(crate) use backend::{wide, Term};
pub(crate) use conv::{conv, Geometry};
pub(crate) use dropout::dropout_mask;
pub(crate) use embedding::embedding;
pub(crate) use frozen::{biased, plus, times_frozen};
pub(crate) use linear::linear;
pub(crate) use merge::{is_finite, merge};
