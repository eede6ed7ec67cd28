//! Merges of tensors in memory.

use super::orientation::with_orientations;
use super::plan::Plan;
use crate::utils::{AdapterConfig, StateDict};
use crate::Result;

/// All tensors of the base, the adapted weights with ΔW added and rounded once, and the biases and
/// modules of the adapter in place of the base's. Names, shapes and dtypes are the base's.
///
/// `config` is a [`LoraConfig`](crate::LoraConfig), or an [`AdapterConfig`] with the kinds of layers, which
/// [`read_adapter`](crate::read_adapter) and [`peft::load_pretrained`](crate::peft::load_pretrained)
/// return. An undeclared layer is a `Linear`, an `Embedding` or a convolution by the shapes of its weight
/// and factors.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use loralib as lora;
/// let device = candle_core::Device::Cpu;
/// let base = lora::read_state_dict("model.safetensors", &device)?.tensors;
/// let (config, adapter) = lora::read_adapter("adapter.safetensors", &device)?;
/// let config = config.unwrap_or_default();
/// let merged = lora::merge_into(&base, &adapter, &config)?;
/// candle_core::safetensors::save(&merged.into_iter().collect(), "merged.safetensors")?;
/// // Or from file to file, one tensor at a time:
/// lora::merge_files("model.safetensors", &adapter, &config, "merged.safetensors", |_| {})?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// If a tensor of the adapter has no counterpart in the base, its rank is not the configuration's, a
/// shape does not fit, a merged value is not finite, or the weight of an undeclared layer is square and
/// `fan_in_fan_out` is not set: then its orientation is not known. The error names the tensor.
pub fn merge_into(
    base: &StateDict,
    adapter: &StateDict,
    config: impl Into<AdapterConfig>,
) -> Result<StateDict> {
    let dims = |name: &str| base.get(name).map(|tensor| tensor.dims().to_vec());
    let config = with_orientations(config.into(), adapter, dims);
    let plan = Plan::new(adapter, config, |name| base.contains_key(name))?;
    let mut merged = base.clone();
    for (name, tensor) in &mut merged {
        if let Some(changed) = plan.apply(name, tensor)? {
            *tensor = changed;
        }
    }
    Ok(merged)
}
