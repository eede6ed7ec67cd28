//! Reads `adapter_config.json`. An unknown key with a value is an error, because it might change the update.

use super::fields::{Fields, OneOrMany};
use super::folder::malformed;
use super::patterns::Patterns;
use super::tokens::TokenIndices;
use crate::layers::{InitLoraWeights, LayerKind};
use crate::weights::{AdapterConfig, Bias};
use crate::Result;
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Keys that do not change the update, or are read apart: how the adapter was made and trained, and which modules have one,
/// which the tensors tell too.
const HARMLESS_KEYS: [&str; 18] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "velora_config",
];

/// Initialisations that do not change the base.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The options of the file.
#[derive(Debug)]
pub(crate) struct PeftConfig {
    pub options: AdapterConfig,
    pub patterns: Patterns,
    pub lora_bias: bool,
    pub target_parameters: Vec<String>,
    pub(super) token_indices: TokenIndices,
    init_lora_weights: Option<Value>,
    /// All keys of the file.
    fields: Fields,
}

/// What the file of a new adapter says of the layers to adapt.
#[derive(Debug)]
pub(crate) struct Selection {
    pub targets: Modules,
    pub exclude: Modules,
    /// `layers_to_transform`; empty for all.
    pub layers: Vec<usize>,
    pub layers_pattern: Vec<String>,
}

/// Modules by name, or by a regular expression.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Modules {
    Expression(String),
    Names(Vec<String>),
}

impl PeftConfig {
    /// Reads the text of the file.
    pub fn parse(text: &[u8]) -> Result<Self> {
        Self::of(Fields::parse(text)?)
    }

    pub fn of(fields: Fields) -> Result<Self> {
        for required in ["peft_type", "r", "lora_alpha"] {
            if !fields.0.contains_key(required) {
                return Err(malformed(format!("the configuration has no {required:?}")));
            }
        }
        let mut unknown: Vec<_> = fields.0.keys().filter(|key| fields.is_set(key)).collect();
        unknown.retain(|key| !HARMLESS_KEYS.contains(&key.as_str()));
        let unknown = &mut unknown;
        if fields.take("peft_type", unknown)? != Some(Value::from("LORA")) {
            return Err(fields.unsupported("peft_type", "only LORA is"));
        }
        let mut options = AdapterConfig::default();
        let lora = &mut options.lora;
        let r = fields.take("r", unknown)?.filter(|r| *r > 0);
        lora.r = r.ok_or_else(|| fields.wrong("r"))?;
        let alpha = fields.take("lora_alpha", unknown)?;
        lora.lora_alpha = alpha.ok_or_else(|| fields.wrong("lora_alpha"))?;
        if let Some(p) = fields.take::<f64>("lora_dropout", unknown)? {
            if !(0. ..=1.).contains(&p) {
                return Err(fields.wrong("lora_dropout"));
            }
            lora.lora_dropout = p as f32;
        }
        lora.fan_in_fan_out = fields.take("fan_in_fan_out", unknown)?.unwrap_or(false);
        lora.use_dora = fields.take("use_dora", unknown)?.unwrap_or(false);
        lora.rslora = fields.take("use_rslora", unknown)?.unwrap_or(false);
        if let Some(word) = fields.take::<String>("bias", unknown)? {
            options.bias = word.parse::<Bias>()?;
        }
        options.base_model_name_or_path = fields.take("base_model_name_or_path", unknown)?;
        options.task_type = fields.take("task_type", unknown)?;
        options.modules_to_save = fields.take("modules_to_save", unknown)?.unwrap_or_default();
        options.ensure_weight_tying = fields.take("ensure_weight_tying", unknown)?.unwrap_or(false);
        // Until PEFT 0.2, of all layers.
        if let Some(enabled) = fields.take("enable_lora", unknown)? {
            options = options.with_layer("", LayerKind::MergedLinear(enabled));
        }
        let ranks = fields.patterns("rank_pattern", unknown, |r: &usize| *r > 0)?;
        let alphas = fields.patterns("alpha_pattern", unknown, |_: &f64| true)?;
        let config = Self {
            options,
            patterns: Patterns::new(ranks, alphas)?,
            lora_bias: fields.take("lora_bias", unknown)?.unwrap_or(false),
            target_parameters: fields.take("target_parameters", unknown)?.unwrap_or_default(),
            token_indices: fields.take("trainable_token_indices", unknown)?.unwrap_or_default(),
            init_lora_weights: fields.value("init_lora_weights"),
            fields: Fields::default(),
        };
        match unknown.first() {
            None => Ok(Self { fields, ..config }),
            Some(key) => Err(fields.unsupported(key, "this option of PEFT is not known here")),
        }
    }

    /// The configuration of an adapter that was saved. An error if its initialisation changed the base.
    pub fn saved(self) -> Result<Self> {
        match &self.init_lora_weights {
            None | Some(Value::Null | Value::Bool(_)) => Ok(self),
            Some(Value::String(how)) if HARMLESS_INITS.contains(&how.as_str()) => Ok(self),
            Some(how) => Err(self.fields.unsupported("init_lora_weights", &changed_base(how))),
        }
    }

    /// The configuration of a new adapter, which has no tensors yet.
    pub fn fresh(mut self) -> Result<(Self, Selection)> {
        let fields = &self.fields;
        check_trained(fields)?;
        self.options.lora.conv_kernels = true;
        self.options.lora.lora_bias = self.lora_bias;
        self.options.trainable_token_indices = self.token_indices.by_table();
        self.options.lora.init_lora_weights = match &self.init_lora_weights {
            None => InitLoraWeights::Uniform,
            Some(Value::String(name)) => name.parse()?,
            Some(other) => other.to_string().parse()?,
        };
        let targets = match fields.get("target_modules")? {
            Some(targets) => targets,
            None if !self.target_parameters.is_empty() => Modules::Names(vec![]),
            None => {
                let reason = "PEFT then selects by the model's type: name the targets";
                return Err(fields.unsupported("target_modules", reason));
            }
        };
        let selected = ["layers_to_transform", "layers_pattern"];
        let selected = selected.into_iter().find(|key| fields.is_set(key));
        let layers = fields.get::<OneOrMany<usize>>("layers_to_transform")?;
        match (&targets, selected, &layers) {
            (Modules::Expression(_), Some(key), _) => {
                let reason = "with a string as target_modules PEFT refuses it: use a list";
                return Err(fields.unsupported(key, reason));
            }
            (_, Some(key), None) => {
                return Err(fields.unsupported(key, "it needs layers_to_transform"))
            }
            _ => {}
        }
        let pattern = fields.get::<OneOrMany<String>>("layers_pattern")?;
        let exclude = fields.get("exclude_modules")?.unwrap_or(Modules::Names(vec![]));
        let selection = Selection {
            targets,
            exclude,
            layers: layers.map(Vec::from).unwrap_or_default(),
            layers_pattern: pattern.map(Vec::from).unwrap_or_default(),
        };
        Ok((self, selection))
    }
}

/// The options of a new adapter by a configuration's file.
pub(crate) fn new_adapter(file: &Path) -> Result<(PeftConfig, Selection)> {
    PeftConfig::parse(&fs::read(file)?)?.fresh()
}

/// Why an initialisation like PiSSA is not read. PEFT converts all but LoftQ.
fn changed_base(init: &Value) -> String {
    let converted = match init == "loftq" {
        true => "",
        false => {
            "save the adapter as a plain LoRA for the unchanged base, by PEFT's `save_pretrained(folder, \
             path_initial_model_for_weight_conversion=...)`; or, "
        }
    };
    format!(
        "the initialisation also changed the base model, and the folder does not tell how: {converted}if your base \
         is the changed one, as `model.unload().save_pretrained(...)` writes it, set init_lora_weights to true"
    )
}

/// An error for options that count in training alone, or that are only read and merged.
fn check_trained(fields: &Fields) -> Result<()> {
    let refused = [("velora_config", "gradients are not compressed")];
    match refused.into_iter().find(|(key, _)| fields.is_set(key)) {
        Some((key, reason)) => Err(fields.unsupported(key, reason)),
        None if fields.get::<f64>("lora_dropout")? == Some(1.) => {
            Err(fields.unsupported("lora_dropout", "nothing would be left to train"))
        }
        None => Ok(()),
    }
}
