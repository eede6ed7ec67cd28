//! Merges of tensors in memory.

use super::new_tensors::NewTensors;
use super::plan::{Additions, Plan};
use crate::files::fp8::refuse_scaled;
use crate::files::StateDict;
use crate::weights::LoraWeights;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// All tensors of the base, the adapted weights with ΔW added and rounded once, and the biases and
/// modules of the adapter in place of the base's. Names, shapes and dtypes are the base's.
///
/// If the base ties its head to the embeddings and the adapter changes one of the two alone, the head is a tensor of its
/// own, such as `lm_head.weight`, as in PEFT's model: set `tie_word_embeddings` to `false` in the model's configuration.
/// A module that the adapter trains whole and the base has not, such as a new head, is added in the adapter's dtype.
///
/// A layer of unknown kind is a `Linear`, an `Embedding` or a convolution by the shapes of its weight and factors.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use loralib::{self as lora, merge};
/// let device = candle_core::Device::Cpu;
/// let base = lora::utils::read_state_dict("model.safetensors", &device)?.tensors;
/// let adapter = lora::Adapter::load("adapter.safetensors", &device)?.weights()?;
/// let merged = merge::merge_into(&base, &adapter)?;
/// candle_core::safetensors::save(&merged.into_iter().collect(), "merged.safetensors")?;
/// // Or from file to file, one tensor at a time:
/// merge::merge_files("model.safetensors", &adapter, "merged.safetensors", |_| {})?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// If a tensor of the adapter has no counterpart in the base, its rank is not the configuration's, a
/// shape does not fit, a merged value is not finite, or the weight of an undeclared layer is square and
/// `fan_in_fan_out` is not set: then its orientation is not known. The error names the tensor.
pub fn merge_into(base: &StateDict, adapter: &LoraWeights) -> Result<StateDict> {
    Ok(merge_tensors(base, adapter)?.0)
}

/// The merged tensors, and which of them the base has not.
pub(super) fn merge_tensors(
    base: &StateDict,
    adapter: &LoraWeights,
) -> Result<(StateDict, NewTensors)> {
    let dims = |name: &str| base.get(name).map(|tensor| tensor.dims().to_vec());
    let plan = Plan::new(adapter, |name| base.contains_key(name), dims, Additions::Modules)?;
    for name in plan.of_base().filter(|name| base.get(*name).is_some_and(is_fp8)) {
        refuse_scaled(name, |name| base.contains_key(name))?;
    }
    let mut merged = base.clone();
    for (name, tensor) in &mut merged {
        if let Some(changed) = plan.apply(name, tensor)? {
            *tensor = changed;
        }
    }
    for (head, table) in plan.untied() {
        let tensor = base.get(table).ok_or_else(|| Error::tensor(table, "it is missing"))?;
        merged.insert(head.to_owned(), plan.apply(head, tensor)?.unwrap_or(tensor.clone()));
    }
    let added = plan.added()?;
    let new = NewTensors::of(&plan, &added);
    merged.extend(added.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)));
    Ok((merged, new))
}

fn is_fp8(tensor: &Tensor) -> bool {
    tensor.dtype() == DType::F8E4M3
}
