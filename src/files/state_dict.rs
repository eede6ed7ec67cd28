//! Tensors by name.

use crate::ops::is_finite;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Tensors by name.
pub type StateDict = BTreeMap<String, Tensor>;

/// An error if a value of a float tensor is not finite.
pub(crate) fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    let finite = is_finite(tensor).map_err(|e| Error::tensor(name, e));
    if !tensor.dtype().is_float() || finite? {
        Ok(())
    } else {
        Err(Error::tensor(name, "it has values that are not finite"))
    }
}
