//! An adapter's files: this crate's format, PEFT's and llama.cpp's.

use super::tied::{add_tied, take_tied};
use super::{Adapter, Targets};
use crate::formats::peft;
use crate::layers::Part;
use crate::utils::{load_weights, LoadReport, StateDict, Strict, Trainable};
use crate::weights::{self, is_equal, parameter_of, LoraWeights};
use crate::{gguf, Error, Result};
use candle_core::{DType, Device, Var};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::PoisonError;

impl Adapter {
    /// The options and a copy of the variables, to save in any [format](crate::formats), to merge, or to add to others,
    /// and the tensors of a loaded adapter that replace the base's. It is the same in training and evaluation.
    ///
    /// A table of embeddings that is trained as a whole in a model that ties its head to it is there for both, so that
    /// PEFT's model computes the same, as with `ensure_weight_tying`.
    ///
    /// # Errors
    /// If nothing is trained.
    pub fn weights(&self) -> Result<LoraWeights> {
        let mut tensors = self.state_dict()?;
        tensors.extend(self.options.frozen.clone());
        // A layer of rank 0 has options and no tensors.
        let mut weights = LoraWeights::parse(self.config(), &tensors)?;
        add_tied(&mut weights, self.tied())?;
        weights.with_fused(|parameter| self.options.trains_parameter(parameter))
    }

    /// An adapter of these weights, such as those of a [format](crate::formats). Initial factors become a part of its
    /// own. Its layers are its targets: build the model by [`var_builder`](Self::var_builder), or give
    /// [`merged`](Self::merged) to any candle model. A tensor outside the selection of biases and modules, such as a
    /// table of a resized vocabulary that PEFT saved, replaces the base's and is not trained.
    ///
    /// # Errors
    /// If nothing in it is a factor or in its selection of biases and modules.
    pub fn from_weights(weights: &LoraWeights) -> Result<Self> {
        let weights = weights.joined()?.into_owned();
        let weights = weights.with_kernels(|_, layer| layer.conv_rank.is_some())?;
        let (mut weights, parameters) = weights.with_unfused()?;
        let tied = take_tied(&mut weights)?;
        let (config, tensors) = (weights.config(), weights.state_dict());
        let selection = Trainable::from(&config);
        let selects = |name: &str| selection.selects(name, |other| tensors.contains_key(other));
        if !tensors.keys().any(|name| selects(name)) {
            let names =
                tensors.keys().next().map(|name| format!(", but {name:?}")).unwrap_or_default();
            return Err(Error::Invalid(format!("the adapter has no lora_A and lora_B{names}")));
        }
        let is_own =
            |path: &&String| parameter_of(path).is_none_or(|own| !parameters.contains(&own));
        let layers = weights.layers.keys().filter(is_own);
        let adapter = Self::new(config).targets(Targets::paths(layers));
        let is_frozen = |name: &str| weights.is_adapted_weight(name) || !selects(name);
        let (frozen, vars): (StateDict, StateDict) =
            tensors.clone().into_iter().partition(|(name, _)| is_frozen(name));
        {
            let mut data = adapter.vars.data().lock().unwrap_or_else(PoisonError::into_inner);
            for (name, tensor) in vars {
                // In half precision AdamW does not train factors; PEFT converts them too.
                let tensor = match tensor.dtype() {
                    DType::F16 | DType::BF16 | DType::F8E4M3
                        if Part::parse(&name).1.is_adapter() =>
                    {
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
            options.parameters = parameters;
            options.tied = tied;
        }))
    }

    /// Writes a safetensors file with the variables of [`state_dict`](Self::state_dict) and, in its metadata, the
    /// options and the kinds, ranks and alphas of the layers; see [`save_state_dict`](crate::save_state_dict).
    ///
    /// # Errors
    /// As [`save_state_dict`](crate::save_state_dict).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        weights::save(path.as_ref(), &self.weights()?)
    }

    /// Writes a folder in PEFT's format; see [`peft::save`].
    ///
    /// # Errors
    /// As [`peft::save`].
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        peft::save(dir, &self.weights()?)
    }

    /// Writes the adapter as a GGUF file for programs on llama.cpp, such as `llama-cli --lora`, beside a base of
    /// the same model; see [`gguf::save_adapter`].
    ///
    /// # Errors
    /// As [`gguf::save_adapter`].
    pub fn save_gguf(&self, path: impl AsRef<Path>, base: &gguf::File) -> Result<()> {
        gguf::save_adapter(path, &self.weights()?, base)
    }

    /// Reads an adapter that [`save`](Self::save), [`save_pretrained`](Self::save_pretrained) or PEFT wrote, a
    /// file or a folder; see [`from_weights`](Self::from_weights). An adapter with initial factors becomes a plain one:
    /// training it further trains twice the rank, see [`restore`](Self::restore).
    ///
    /// # Errors
    /// If the file or folder cannot be read, or a file has no configuration, as torch's.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        Self::from_weights(&read(path, device)?).map_err(|e| e.at(path))
    }

    /// Reads an adapter that [`save_gguf`](Self::save_gguf) or llama.cpp's converter wrote. As in
    /// [`load`](Self::load), its layers are its targets; see [`gguf::load_adapter`].
    ///
    /// # Errors
    /// As [`gguf::load_adapter`].
    pub fn load_gguf(path: impl AsRef<Path>, base: &gguf::File, device: &Device) -> Result<Self> {
        Self::from_weights(&gguf::load_adapter(path, base, device)?)
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
    /// `classifier` also trains `pre_classifier`. New convolutions have PEFT's factors; see
    /// [`conv_kernels`](crate::LoraConfig::conv_kernels).
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
    /// [`peft::load`], or an initialisation that is not one of [`InitLoraWeights`](crate::layers::InitLoraWeights);
    /// if it names no targets; and if a regular expression is invalid. The error names the file and the option.
    pub fn from_peft_config(path: impl AsRef<Path>) -> Result<Self> {
        let file = peft::config_file(path.as_ref());
        let read = || {
            let (config, selection) = peft::new_adapter(&file)?;
            let adapter = Self::new(config.options)
                .targets(selection.targets)
                .exclude(Targets::excluded(selection.exclude))
                .layers(selection.layers)
                .layers_pattern(selection.layers_pattern)
                .target_parameters(config.target_parameters)
                .with(|options| options.patterns = config.patterns);
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
    /// As [`load`](Self::load) and [`load_weights`]; and if a layer's rank, scaling or use_dora differs.
    pub fn restore(&self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let path = path.as_ref();
        let (mut saved, _) = read(path, &Device::Cpu)?.with_unfused().map_err(|e| e.at(path))?;
        let (theirs, own) = (take_tied(&mut saved)?, self.tied());
        let trains = |table: &String| saved.others.contains_key(table);
        let differs = |one: &BTreeMap<String, String>, other: &BTreeMap<String, String>| {
            one.iter()
                .find(|(head, table)| trains(table) && !other.contains_key(*head))
                .map(|(h, _)| h.clone())
        };
        if let Some(head) = differs(&theirs, &own).or_else(|| differs(&own, &theirs)) {
            let reason =
                "it is one tensor with the embeddings in one of the saved adapter and the model \
                          (`tie_word_embeddings`), and two in the other";
            return Err(Error::tensor(head, reason).at(path));
        }
        // What replaces the base's already. A table under an adapted embedding is in the report.
        for (name, own) in &self.options.frozen {
            let Some(tensor) = saved.others.get(name) else { continue };
            if !saved.is_adapted_weight(name) && is_equal(tensor, &own.to_device(&Device::Cpu)?)? {
                saved.others.remove(name);
            }
        }
        // Without a model there are no variables to set: its error says so.
        self.named_vars()?;
        load_weights(&saved, &self.vars, self.config(), Strict::Yes).map_err(|e| e.at(path))
    }
}

fn read(path: &Path, device: &Device) -> Result<LoraWeights> {
    match path.is_dir() {
        true => peft::load(path, device),
        false => weights::load(path, device),
    }
}
