//! Arithmetic on shapes whose sizes come from a user or a file, and so may overflow.

use candle_core::{bail, Result};

/// The product of some sizes. An error if it exceeds `isize::MAX`, beyond which nothing is allocated.
pub(crate) fn checked_product(sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    match product.filter(|product| isize::try_from(*product).is_ok()) {
        Some(product) => Ok(product),
        None => bail!("a tensor of sizes {sizes:?} is too large"),
    }
}

/// The number of elements of a shape, or `None` if it or one of the strides overflows.
pub(crate) fn checked_elem_count(dims: &[usize]) -> Option<usize> {
    // A stride is a product of the dimensions behind it, even where a dimension before it is 0.
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
    Some(dims.iter().product())
}
