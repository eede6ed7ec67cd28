//! Several adapters of one base as one.

use super::{is_lora, join, split, StateDict};
use crate::{Error, Result};
use candle_core::{bail, DType, Tensor};

/// The adapter whose `B·A` is the sum of the given ones' times their weights, exactly: their ranks
/// are concatenated, and the weights go into `B`.
///
/// The sum has rank Σ r. An update is `lora_alpha / r` times `B·A`, so that where all adapters have
/// one scaling s, the sum's configuration is `r = Σ r` and `lora_alpha = s · Σ r`; fold another
/// scaling into a weight, as `weight · own / s`. Half-precision factors become F32, because weighted
/// ones would be rounded.
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
/// When there are no adapters, a weight is not finite, the adapters differ in their names or shapes,
/// or one has a tensor that is no factor of an update: a bias or a head has no weighted sum that
/// means the same.
pub fn add_weighted(adapters: &[(&StateDict, f64)]) -> Result<StateDict> {
    let Some((first, _)) = adapters.first().filter(|(first, _)| !first.is_empty()) else {
        return Err(Error::Empty { wanted: "a sum of no adapters".to_owned(), held: 0 });
    };
    let mut sum = StateDict::new();
    for (adapter, weight) in adapters {
        if let Some(name) = adapter.keys().find(|name| !is_lora(name)) {
            return Err(Error::tensor(name, "only lora_A and lora_B can be added"));
        }
        let names = |a: &StateDict, b: &StateDict| -> Vec<String> {
            a.keys().filter(|name| !b.contains_key(*name)).cloned().collect()
        };
        let (missing, unexpected) = (names(first, adapter), names(adapter, first));
        if !(missing.is_empty() && unexpected.is_empty()) {
            return Err(Error::Names { missing, unexpected });
        }
        if !weight.is_finite() {
            let reason = format!("the weight of its adapter is {weight}");
            return Err(Error::tensor(first.keys().next().cloned().unwrap_or_default(), reason));
        }
    }
    for path in first.keys().map(|name| split(name).0) {
        let (a_name, b_name) = (join(path, "lora_A"), join(path, "lora_B"));
        let pairs: Option<Vec<_>> = adapters
            .iter()
            .map(|(tensors, weight)| Some((tensors.get(&a_name)?, tensors.get(&b_name)?, *weight)))
            .collect();
        let Some(pairs) = pairs else {
            return Err(Error::tensor(a_name, "one of lora_A and lora_B stands alone"));
        };
        let (a, b) = concatenated(&pairs).map_err(|e| Error::tensor(&a_name, e))?;
        sum.extend([(a_name, a), (b_name, b)]);
    }
    Ok(sum)
}

/// A (parts·r, in) and B (outputs, r), with one part except in a merged linear layer.
fn concatenated(pairs: &[(&Tensor, &Tensor, f64)]) -> candle_core::Result<(Tensor, Tensor)> {
    let (mut all_a, mut all_b, mut common) = (vec![], vec![], None);
    for (a, b, weight) in pairs {
        let ((rows, columns), (outs, r)) = (a.dims2()?, b.dims2()?);
        let parts = rows.checked_div(r).filter(|parts| parts * r == rows);
        let shape = (parts, columns, outs);
        if parts.is_none() || *common.get_or_insert(shape) != shape {
            bail!("lora_A {:?} and lora_B {:?} do not fit the others", a.dims(), b.dims())
        }
        let wide = |t: &Tensor| match t.dtype() {
            DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
            _ => Ok(t.clone()),
        };
        all_a.push(wide(a)?.reshape((rows / r, r, columns))?);
        all_b.push((wide(b)? * *weight)?);
    }
    let a = Tensor::cat(&all_a, 1)?;
    let (parts, ranks, columns) = a.dims3()?;
    Ok((a.reshape((parts * ranks, columns))?, Tensor::cat(&all_b, 1)?))
}
