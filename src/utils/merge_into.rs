//! An adapter folded into its base by name, without the model: a plain checkpoint, to serve without
//! this crate.

use super::merge_plan::Plan;
use super::{read_state_dict, Shards, StateDict};
use crate::peft::PeftConfig;
use crate::{Error, Result};
use candle_core::Device;
use std::path::{Path, PathBuf};

/// The base of a merge: tensors, or where they lie.
#[derive(Debug, Clone)]
pub enum Base {
    /// Tensors in memory.
    Tensors(StateDict),
    /// A checkpoint, the index of a sharded one (`model.safetensors.index.json`), or a folder with
    /// either.
    Path(PathBuf),
}

impl From<StateDict> for Base {
    fn from(tensors: StateDict) -> Self {
        Self::Tensors(tensors)
    }
}

impl From<&StateDict> for Base {
    fn from(tensors: &StateDict) -> Self {
        Self::Tensors(tensors.clone())
    }
}

impl From<PathBuf> for Base {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&Path> for Base {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<&str> for Base {
    fn from(path: &str) -> Self {
        Self::Path(path.into())
    }
}

/// Gives every tensor of the base, with ΔW added to the adapted ones, rounded once, and the biases and
/// modules that the adapter carries in place of the base's. Names, shapes and dtypes are the base's.
///
/// `cfg` is a [`LoraConfig`](crate::LoraConfig), or a [`PeftConfig`] for a model with merged linear
/// layers or with layers of their own rank or alpha. What a layer is tells the shape of its weight,
/// and whether it lies transposed; for a square one `fan_in_fan_out` does, and a square embedding
/// must be declared.
///
/// The result is a plain model, with no configuration to save beside it:
/// [`merge_files`](crate::merge_files) writes it without holding it in memory, and
/// [`candle_core::safetensors::save`] takes what is here.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// # let (adapter, cfg) = (loralib::StateDict::new(), loralib::LoraConfig::default());
/// # use std::collections::HashMap;
/// let merged: HashMap<_, _> =
///     loralib::merge_into("model.safetensors", &adapter, cfg)?.into_iter().collect();
/// candle_core::safetensors::save(&merged, "merged.safetensors")?;
/// // Or from file to file:
/// loralib::merge_files("model.safetensors", &adapter, cfg, "merged.safetensors", |_| {})?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// When a tensor of the adapter has no counterpart in the base, its rank is not the configuration's, a
/// shape does not fit, a merged value is not finite, or the base cannot be read. The error names the
/// tensor.
pub fn merge_into(
    base: impl Into<Base>,
    adapter: &StateDict,
    cfg: impl Into<PeftConfig>,
) -> Result<StateDict> {
    let mut tensors = match base.into() {
        Base::Tensors(tensors) => tensors,
        Base::Path(path) => {
            let mut tensors = StateDict::new();
            for shard in Shards::find(&path)?.paths() {
                for (name, tensor) in read_state_dict(&shard, &Device::Cpu)?.tensors {
                    if tensors.insert(name.clone(), tensor).is_some() {
                        return Err(Error::tensor(name, "another shard has it too").at(&shard));
                    }
                }
            }
            tensors
        }
    };
    let plan = Plan::new(adapter, cfg.into(), |name| tensors.contains_key(name))?;
    for (name, tensor) in &mut tensors {
        if let Some(changed) = plan.apply(name, tensor)? {
            *tensor = changed;
        }
    }
    Ok(tensors)
}
