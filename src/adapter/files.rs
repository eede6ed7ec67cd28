//! An adapter's files: this crate's format and PEFT's.

use super::{Adapter, Targets};
use crate::utils::names::{is_adapted_weight, is_lora, refuse_other_names, split};
use crate::utils::{
    check_same_options, factors, load_state_dict, plain, read_adapter, save_state_dict,
    AdapterConfig, LoadReport, StateDict, Strict, Trainable,
};
use crate::{peft, Error, Result};
use candle_core::{DType, Device, Var};
use std::path::Path;
use std::sync::PoisonError;

impl Adapter {
    /// Writes a safetensors file with the variables of [`state_dict`](Self::state_dict) and, in its metadata, the
    /// options and the kinds, ranks and alphas of the layers; see [`save_state_dict`].
    ///
    /// # Errors
    /// As [`save_state_dict`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save_state_dict(&self.state_dict()?, self.config(), path)
    }

    /// Writes a folder in PEFT's format; see [`peft::save_pretrained`].
    ///
    /// # Errors
    /// As [`peft::save_pretrained`].
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        peft::save_pretrained(dir, &self.state_dict()?, self.config())
    }

    /// Reads an adapter that [`save`](Self::save), [`save_pretrained`](Self::save_pretrained) or PEFT wrote, a
    /// file or a folder. Initial factors become a part of its own: training it further trains twice the rank, see
    /// [`restore`](Self::restore). Its layers are its targets: build the model by
    /// [`var_builder`](Self::var_builder), or give [`merged`](Self::merged) to any candle model.
    ///
    /// # Errors
    /// If the file or folder cannot be read, or a file has no configuration, as torch's.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let (config, tensors) = read(path, device)?;
        Self::loaded(config, tensors)
    }

    /// An adapter of tensors that were read before, such as those of [`formats`](crate::formats). Its layers are
    /// its targets, as of [`load`](Self::load).
    ///
    /// # Errors
    /// If the names are PEFT's; if no tensor is a factor or in the configuration's selection; if a layer lacks one of
    /// its factors or its magnitude; and if the configuration has a layer that the adapter lacks.
    pub fn from_tensors(config: impl Into<AdapterConfig>, tensors: StateDict) -> Result<Self> {
        let config = config.into();
        refuse_other_names(tensors.keys())?;
        let selection = Trainable::from(&config);
        if !tensors.keys().any(|name| selection.selects(name, |n| tensors.contains_key(n))) {
            let names =
                tensors.keys().next().map(|name| format!(", but {name:?}")).unwrap_or_default();
            return Err(Error::Invalid(format!("the adapter has no lora_A and lora_B{names}")));
        }
        config.check_used(factors(&tensors, &config)?.into_keys())?;
        Self::loaded(config, tensors)
    }

    /// An adapter of these tensors, whose layers are its targets.
    pub(super) fn loaded(config: AdapterConfig, tensors: StateDict) -> Result<Self> {
        let (tensors, config) = plain(&tensors, &config)?;
        let layers = tensors.keys().map(|name| split(name)).filter(|(_, last)| *last == "lora_A");
        let adapter = Self::new(&*config).targets(Targets::paths(layers.map(|(path, _)| path)));
        // PEFT loads a saved table in place of the base's.
        let exists = |name: &str| tensors.contains_key(name);
        let replaces = |name: &str| is_adapted_weight(name, exists);
        let (frozen, vars): (StateDict, StateDict) = tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .partition(|(name, _)| replaces(name));
        {
            let mut data = adapter.vars.data().lock().unwrap_or_else(PoisonError::into_inner);
            for (name, tensor) in vars {
                // In half precision AdamW does not train factors; PEFT converts them too.
                let tensor = match tensor.dtype() {
                    DType::F16 | DType::BF16 | DType::F8E4M3 if is_lora(&name) => {
                        tensor.to_dtype(DType::F32)?
                    }
                    _ => tensor,
                };
                data.insert(name, Var::from_tensor(&tensor)?);
            }
        }
        Ok(adapter.with(|options| {
            options.loaded = true;
            options.frozen = frozen;
        }))
    }

    /// A new adapter with the options of PEFT's `adapter_config.json`, the file or its folder, such as
    /// `LoraConfig(...).save_pretrained(folder)` writes. The file gives r, lora_alpha and the other options,
    /// the targets, excluded modules and transformer layers, ranks and alphas by `rank_pattern` and
    /// `alpha_pattern`, and the biases and modules to train. Weights beside it are not read; see
    /// [`load`](Self::load).
    ///
    /// Methods such as [`targets`](Self::targets) and [`trainable`](Self::trainable) replace what the file
    /// says. PEFT adds heads to `modules_to_save` by the task: both `classifier` and `score` for `SEQ_CLS`. Name
    /// the one that the model has. A name means whole components of a path, and not its end as in PEFT, where
    /// `classifier` also trains `pre_classifier`. The rank of a convolution is loralib's, times its kernel.
    ///
    /// ```no_run
    /// # fn main() -> loralib::Result<()> {
    /// # let base = || candle_nn::VarBuilder::zeros(candle_core::DType::F32, &candle_core::Device::Cpu);
    /// let adapter = loralib::Adapter::from_peft_config("adapter_config.json")?.seed(0);
    /// let vb = adapter.var_builder(base()); // for the model
    /// # let _ = vb; Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the file cannot be read or is malformed; if it has an option that is not supported, as in
    /// [`peft::load_pretrained`], or an initialisation that is not one of [`InitLoraWeights`](crate::InitLoraWeights);
    /// if it names no targets; and if a regular expression is invalid. The error names the file and the option.
    pub fn from_peft_config(path: impl AsRef<Path>) -> Result<Self> {
        let file = peft::config_file(path.as_ref());
        let read = || {
            let fresh = peft::read_fresh(&file)?;
            let adapter = Self::new(fresh.config)
                .targets(fresh.targets)
                .exclude(Targets::excluded(fresh.exclude))
                .layers(fresh.layers)
                .layers_pattern(fresh.layers_pattern)
                .with(|options| options.patterns = fresh.patterns);
            adapter.options.valid().map_err(Error::Invalid)?;
            Ok(adapter)
        };
        read().map_err(|e: Error| e.at(&file))
    }

    /// Sets the variables to those of a file or folder, all of them or, on an error, none: to go on with a saved run.
    /// An adapter with initial factors is restored from [`save`](Self::save)'s file alone: the folder has it as a plain
    /// one. In evaluation they count from the next `eval()` on. The report lists a table that PEFT saved with an
    /// adapted embedding as unexpected.
    ///
    /// # Errors
    /// As [`load`](Self::load) and [`load_state_dict`]; and if a layer's rank, scaling or use_dora differs.
    pub fn restore(&self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let path = path.as_ref();
        let (saved, tensors) = read(path, &Device::Cpu)?;
        // Without a model there are no variables to set: its error says so.
        self.named_vars()?;
        check_same_options(&tensors, &saved, &self.config()).map_err(|e| e.at(path))?;
        let report = match path.is_dir() {
            true => peft::load_beside_base(&self.vars, tensors, Strict::Yes),
            false => load_state_dict(&self.vars, &tensors, Strict::Yes),
        };
        report.map_err(|e| e.at(path))
    }
}

/// An error for a folder of another program.
fn refuse_others(dir: &Path) -> Result<()> {
    if peft::has_tensors(dir) {
        return Ok(());
    }
    for (file, program, module) in [
        ("adapters.safetensors", "MLX", "mlx"),
        ("pytorch_lora_weights.safetensors", "diffusers", "diffusers"),
    ] {
        if dir.join(file).exists() {
            let reason =
                format!("it is a folder of {program}: read it by `formats::{module}::load`");
            return Err(Error::Invalid(reason).at(dir));
        }
    }
    Ok(())
}

fn read(path: &Path, device: &Device) -> Result<(AdapterConfig, StateDict)> {
    if path.is_dir() {
        refuse_others(path)?;
        return peft::load_pretrained(path, device);
    }
    let (config, tensors) = read_adapter(path, device)?;
    refuse_other_names(tensors.keys()).map_err(|e| e.at(path))?;
    let config = config.ok_or_else(|| {
        let reason = "it has no configuration of this crate: of PEFT's format load the folder; read files of \
                      other programs by `formats`, and torch's by `read_state_dict` and `Adapter::from_tensors`";
        Error::Invalid(reason.to_owned()).at(path)
    })?;
    Ok((config, tensors))
}
