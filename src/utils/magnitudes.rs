//! DoRA's magnitudes when the weights below them are loaded.

use crate::layers::{initial_magnitude, Part};
use crate::ops::squares;
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;

/// Adds to the `staged` values of variables the new norms for each magnitude that has none and still has the norms
/// of its layer's weight, which is to be replaced.
pub(super) fn renew<'a>(
    vars: &'a BTreeMap<String, Var>,
    staged: &mut BTreeMap<&'a str, (&'a Var, Tensor)>,
) -> Result<()> {
    for (name, var) in vars {
        let (path, Part::Magnitude) = Part::parse(name) else { continue };
        let of = Part::Base("weight").at(path);
        let (None, Some((before, after))) = (staged.get(name.as_str()), staged.get(of.as_str()))
        else {
            continue;
        };
        let norms = || {
            for dim in [0, 1] {
                if is_initial(var, before, dim)? {
                    return Ok(Some(initial_magnitude(after, dim)?.to_dtype(var.dtype())?));
                }
            }
            Ok(None)
        };
        let norms = norms().map_err(|e: candle_core::Error| Error::tensor(of, e))?;
        staged.extend(norms.map(|norms| (name.as_str(), (var, norms))));
    }
    Ok(())
}

/// Whether a magnitude has the norms of the outputs of `w`, which are its dimension `dim`.
fn is_initial(magnitude: &Tensor, w: &Tensor, dim: usize) -> candle_core::Result<bool> {
    if w.flatten_from(1)?.dim(dim)? != magnitude.elem_count() {
        return Ok(false);
    }
    let norms = squares(w, dim)?.sqrt()?.to_dtype(magnitude.dtype())?;
    Ok(magnitude.ne(&norms)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? == 0)
}
