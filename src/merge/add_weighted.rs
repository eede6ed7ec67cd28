//! The weighted sum of adapters.

use crate::utils::names::{is_factor, is_initial, join, split};
use crate::utils::StateDict;
use crate::{Error, Result};
use candle_core::{bail, DType, Tensor};

/// The adapter whose `B·A` is the weighted sum of the given adapters', exactly: the ranks are
/// concatenated and `B` is multiplied by the weight.
///
/// The sum has rank Σ r. If all adapters have the scaling s, its configuration is `r = Σ r` and
/// `lora_alpha = s · Σ r`; multiply the weight of an adapter with another scaling by `own / s`.
/// Half-precision factors are converted to F32, so that weighting does not round them.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib as lora;
/// let factor = |dims: (usize, usize)| Tensor::ones(dims, DType::F32, &Device::Cpu);
/// let adapter = lora::StateDict::from([
///     ("q.lora_A".to_owned(), factor((2, 6))?),
///     ("q.lora_B".to_owned(), factor((4, 2))?),
/// ]);
/// let sum = lora::add_weighted(&[(&adapter, 0.7), (&adapter, -0.2)])?;
/// assert_eq!(sum["q.lora_A"].dims(), [4, 6]);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If there are no adapters, a weight is not finite, the adapters differ in names or shapes, or one has a
/// tensor that is not a factor: biases, heads and DoRA's magnitudes have no such sum.
pub fn add_weighted(adapters: &[(&StateDict, f64)]) -> Result<StateDict> {
    let Some((first, _)) = adapters.first().filter(|(first, _)| !first.is_empty()) else {
        return Err(Error::Invalid("there are no adapters to add".to_owned()));
    };
    let mut sum = StateDict::new();
    for (adapter, weight) in adapters {
        if let Some(name) = adapter.keys().find(|name| !is_factor(name)) {
            let reason = match is_initial(name) {
                true => {
                    "initial factors have no weighted sum: load the adapters by `Adapter::load`"
                }
                false => "only lora_A and lora_B have a weighted sum",
            };
            return Err(Error::tensor(name, reason));
        }
        let names = |a: &StateDict, b: &StateDict| -> Vec<String> {
            a.keys().filter(|name| !b.contains_key(*name)).cloned().collect()
        };
        let (missing, unexpected) = (names(first, adapter), names(adapter, first));
        if !(missing.is_empty() && unexpected.is_empty()) {
            let reason = format!(
                "adapters with different names have no sum: {missing:?} and {unexpected:?} are not in \
                 both"
            );
            return Err(Error::Invalid(reason));
        }
        if !weight.is_finite() {
            return Err(Error::Invalid(format!("the weight of an adapter is {weight}")));
        }
    }
    for path in first.keys().map(|name| split(name).0) {
        let (a_name, b_name) = (join(path, "lora_A"), join(path, "lora_B"));
        let pairs: Option<Vec<_>> = adapters
            .iter()
            .map(|(tensors, weight)| Some((tensors.get(&a_name)?, tensors.get(&b_name)?, *weight)))
            .collect();
        let Some(pairs) = pairs else {
            return Err(Error::tensor(a_name, "its lora_A or lora_B is missing"));
        };
        let (a, b) = concatenated(&pairs).map_err(|e| Error::tensor(&a_name, e))?;
        sum.extend([(a_name, a), (b_name, b)]);
    }
    Ok(sum)
}

/// A (splits·r, in) and B (outputs, r), with several splits in a merged linear layer.
fn concatenated(pairs: &[(&Tensor, &Tensor, f64)]) -> candle_core::Result<(Tensor, Tensor)> {
    let (mut all_a, mut all_b, mut common) = (vec![], vec![], None);
    for (a, b, weight) in pairs {
        let ((rows, columns), (outs, r)) = (a.dims2()?, b.dims2()?);
        let splits = rows.checked_div(r).filter(|splits| splits * r == rows);
        let shape = (splits, columns, outs);
        if splits.is_none() || *common.get_or_insert(shape) != shape {
            bail!(
                "the shapes of lora_A {:?} and lora_B {:?} do not fit the other adapters",
                a.dims(),
                b.dims()
            )
        }
        let upcast = |t: &Tensor| match t.dtype() {
            DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
            _ => Ok(t.clone()),
        };
        all_a.push(upcast(a)?.reshape((rows / r, r, columns))?);
        all_b.push((upcast(b)? * *weight)?);
    }
    let a = Tensor::cat(&all_a, 1)?;
    let (splits, ranks, columns) = a.dims3()?;
    Ok((a.reshape((splits * ranks, columns))?, Tensor::cat(&all_b, 1)?))
}
