//! An adapter as one value: its options, targets, variables and mode.

pub(crate) mod check;
mod choice;
mod disabled;
mod files;
mod merged;
pub(crate) mod merged_only;
mod mode;
mod options;
mod recompute;
pub(crate) mod record;
mod shared_update;
pub(crate) mod state;
pub(crate) mod target;
mod targets;
mod tied;
mod transformer_layers;
pub(crate) mod var_builder;
mod vars;

use crate::layers::{LayerKind, Part};
use crate::ops::DropoutStream;
use crate::utils::{lora_state_dict, summary, variables, StateDict, Summary, Trainable};
use crate::Result;
use candle_nn::{VarBuilder, VarMap};
use options::Options;
use record::Record;
use state::State;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use target::AdapterParts;

pub use crate::weights::{
    AdapterConfig, ExpertNames, LayerConfig, LayerWeights, LoraWeights, Resized,
};
pub use choice::Choice;
pub use targets::Targets;

/// A LoRA adapter for a model on [`lora::nn`](crate::nn), whose layers it finds by name.
///
/// It holds what otherwise is passed around: the options, the selection of layers and parameters, the
/// variables, the kinds of layers and the mode. A clone is the same adapter. For several adapters in one model see
/// [`Adapters`](crate::Adapters).
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{loss::mse, AdamW, Optimizer};
/// use loralib::{self as lora, nn as candle_nn, LoraConfig};
///
/// // Model code on candle_nn's names, unchanged.
/// struct Mlp(candle_nn::Linear, candle_nn::Linear);
/// impl Mlp {
///     fn new(vb: candle_nn::VarBuilder) -> candle_core::Result<Self> {
///         let up = candle_nn::linear(4, 8, vb.pp("up_proj"))?;
///         Ok(Self(up, candle_nn::linear(8, 4, vb.pp("down_proj"))?))
///     }
///     fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
///         self.1.forward(&candle_nn::ops::silu(&self.0.forward(x)?)?)
///     }
/// }
///
/// let device = Device::Cpu;
/// # let pretrained = candle_nn::VarMap::new();
/// # Mlp::new(candle_nn::VarBuilder::from_varmap(&pretrained, DType::F32, &device))?;
/// # let base = || candle_nn::VarBuilder::from_varmap(&pretrained, DType::F32, &device);
/// let cfg = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
/// let adapter = lora::Adapter::new(cfg).targets(["up_proj", "down_proj"]);
/// let model = Mlp::new(adapter.var_builder(base()))?; // `base` is a VarBuilder over the weights
/// adapter.check()?; // every target is a layer
///
/// let x = Tensor::ones((2, 4), DType::F32, &device)?;
/// let mut opt = AdamW::new_lr(adapter.vars()?, 1e-2)?;
/// opt.backward_step(&mse(&model.forward(&x)?, &x)?)?;
/// adapter.eval()?; // merged, in every layer of the model
/// let y = model.forward(&x)?;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("adapter.safetensors");
/// adapter.save(&path)?;
/// // Any candle model over `merged` computes with the adapter, also one that does not know it.
/// let served = Mlp::new(lora::Adapter::load(&path, &device)?.merged(base())?)?;
/// # let diff = (served.forward(&x)? - y)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// # assert!(diff < 1e-6);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Adapter {
    pub(crate) options: Arc<Options>,
    pub(crate) vars: VarMap,
    pub(crate) record: Arc<Record>,
    pub(crate) state: Arc<Mutex<State>>,
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let adapted = self.adapted();
        f.debug_struct("Adapter")
            .field("options", &self.options)
            .field("adapted", &adapted)
            .finish()
    }
}

impl Adapter {
    /// An adapter without targets. `config` is a [`LoraConfig`](crate::LoraConfig), or an [`AdapterConfig`]
    /// with ranks, alphas and kinds of single layers.
    pub fn new(config: impl Into<AdapterConfig>) -> Self {
        let options = Options::new(config.into());
        let (record, state) = Default::default();
        Self { options: Arc::new(options), vars: VarMap::new(), record, state }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        state::lock(&self.state)
    }

    fn with(mut self, set: impl FnOnce(&mut Options)) -> Self {
        set(Arc::make_mut(&mut self.options));
        self
    }

    /// The layers to adapt, as PEFT's `target_modules`; see [`Targets`].
    pub fn targets(self, targets: impl Into<Targets>) -> Self {
        self.with(|options| options.targets = targets.into())
    }

    /// Targets that are not adapted, as PEFT's `exclude_modules`.
    pub fn exclude(self, exclude: impl Into<Targets>) -> Self {
        self.with(|options| options.exclude = exclude.into())
    }

    /// Adapts only the transformer layers of these indices, as PEFT's `layers_to_transform`: the index is
    /// the first number between dots in a path with two components or more before it, as 3 in
    /// `model.layers.3.mlp.experts.0.up_proj`. For other paths see [`layers_pattern`](Self::layers_pattern).
    /// None selects all, and a target that is a layer's whole path is adapted whatever its index, as in PEFT.
    /// PEFT refuses indices beside a regular expression or `"all-linear"`; here they count.
    pub fn layers(self, indices: impl IntoIterator<Item = usize>) -> Self {
        self.with(|options| options.layers.indices = indices.into_iter().collect())
    }

    /// The names before the index of [`layers`](Self::layers), as PEFT's `layers_pattern`: with `["h"]` the
    /// index of `h.3.attn.c_attn` is 3. Each name is a regular expression; the first that matches counts, at
    /// the first place in a path where it does. None is PEFT's rule without names.
    ///
    /// ```
    /// use loralib::{Adapter, LoraConfig};
    /// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
    /// // The first two layers of the decoder alone.
    /// let adapter =
    ///     Adapter::new(cfg).targets(["q_proj"]).layers([0, 1]).layers_pattern([r"decoder\.layers"]);
    /// ```
    pub fn layers_pattern<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        self.with(|options| options.layers.set_patterns(names.into_iter().map(Into::into)))
    }

    /// Declares the kind of the layers whose path is `module` or ends in it after a dot, as
    /// [`AdapterConfig::with_layer`] does: a fused `qkv` can be a
    /// [`LayerKind::MergedLinear`](crate::layers::LayerKind), also with the options of a file. A longer entry counts
    /// instead, as those of the layers of a loaded adapter: for these see
    /// [`LoraWeights::with_kind`](crate::LoraWeights::with_kind).
    pub fn with_layer(self, module: impl Into<String>, kind: LayerKind) -> Self {
        let config = self.options.config.clone().with_layer(module, kind);
        self.with(|options| options.config = config)
    }

    /// The biases and modules to train and save with the adapter, such as `Bias::None.and("classifier")`.
    ///
    /// # Errors
    /// If it is [`Trainable::all_parameters`], which is not an adapter.
    pub fn trainable(self, trainable: impl Into<Trainable>) -> Result<Self> {
        let config = self.options.config.clone().with_trainable(trainable)?;
        Ok(self.with(|options| options.config = config))
    }

    /// Trains parameters of fused experts, as PEFT's `target_parameters`: `["experts.gate_up_proj", "experts.down_proj"]`, in
    /// a model that has layers for each expert, such as `experts.0.gate_proj` or Mixtral's `w1`. The gate and the up projection
    /// of an expert share A, as in the parameter that transformers 5 has of them, and the adapter is saved as PEFT's. A name
    /// is the end of the parameter's path, whose module is `mlp.experts` also in Mixtral.
    ///
    /// PEFT's restrictions hold: no dropout, `use_dora` or `lora_bias`. An adapter that was [loaded](Self::load) has its
    /// own parameters.
    pub fn target_parameters<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        self.with(|options| options.parameters = names.into_iter().map(Into::into).collect())
    }

    /// A module of [`trainable`](Self::trainable) of another size than the base's is new, as by transformers' option of
    /// this name: a head for other labels, under the name that the base's has. Without it such a module is an error.
    pub fn ignore_mismatched_sizes(self) -> Self {
        self.with(|options| options.ignore_mismatched_sizes = true)
    }

    /// Initialises new variables from a seed; see [`seeded`](crate::base::seeded). Dropout draws its masks from it too,
    /// on every device: a mask depends on the seed and on how many were drawn before, see
    /// [`dropout_position`](Self::dropout_position).
    pub fn seed(self, seed: u64) -> Self {
        self.with(|options| {
            options.seed = Some(seed);
            options.dropout = Some(Arc::new(DropoutStream::new(seed)));
        })
    }

    /// A `VarBuilder` for the model: frozen tensors from `base`, adapters for the targets, and the trainable
    /// parameters as variables of this adapter.
    pub fn var_builder<'a>(&self, base: VarBuilder<'a>) -> VarBuilder<'a> {
        self.state().options = Some(self.options.clone());
        let Self { options, vars, record, state } = self.clone();
        var_builder::recorded(base, record, Some(AdapterParts { options, vars, state }))
    }

    /// The paths of the adapted layers, sorted.
    pub fn adapted(&self) -> Vec<String> {
        self.state().adapted.layers.keys().cloned().collect()
    }

    /// The options, with the kinds, ranks and alphas of the adapted layers.
    pub fn config(&self) -> AdapterConfig {
        let mut config = self.options.config.clone();
        let state = self.state();
        let adapted = &state.adapted.layers;
        // A loaded adapter has all layers by their paths, of which a model may have some.
        if !adapted.is_empty() && !self.options.loaded {
            config.layers.clear();
        }
        if !(state.adapted.tokens.is_empty() || self.options.loaded) {
            config.trainable_token_indices = state.adapted.tokens.clone();
        }
        let mut layers = adapted.clone();
        for name in variables(&self.vars).keys().filter(|_| !adapted.is_empty()) {
            // Of one that no model has built yet: the entry of another would count for it.
            if let (path, Part::A) = Part::parse(name) {
                let own = || config.layer(path).map(|(_, own)| own.clone()).unwrap_or_default();
                layers.entry(path.to_owned()).or_insert_with(own);
            }
        }
        config.layers.extend(layers);
        config
    }

    /// A copy of the variables that are trained and of [`frozen_vars`](Self::frozen_vars), to save. It is the same in
    /// training and evaluation.
    ///
    /// # Errors
    /// If nothing is trained.
    pub fn state_dict(&self) -> Result<StateDict> {
        self.named_vars()?;
        lora_state_dict(&self.vars, &self.options.config)
    }

    /// The adapted layers and the trainable parameters as a table, with their share of all parameters if a model has
    /// read them from [`var_builder`](Self::var_builder), and not from that of [`Adapters`](crate::Adapters).
    ///
    /// # Errors
    /// If nothing is trainable.
    pub fn summary(&self) -> Result<Summary> {
        let (trained, summary) = (self.named_vars()?, summary(&self.vars, &self.options.config)?);
        // Those that the model has read, and factors, which the layers have read.
        let beside = trained.iter().filter(|(name, _)| !self.record.has(name));
        let beside: usize = beside.map(|(_, var)| var.elem_count()).sum();
        let total = self.record.values() + beside;
        Ok(if total > summary.trainable() { summary.with_total(total) } else { summary })
    }
}
