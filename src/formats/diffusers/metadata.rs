//! The options in a file's header: PEFT's configurations of all components in one JSON object, each key after
//! its component and a dot.

use crate::formats::peft::{config_json, malformed, Fields, PeftConfig};
use crate::layers::{LoraConfig, Part};
use crate::weights::{
    has_component, AdapterConfig, Factors, LayerWeights, LoraWeights, NO_COMPONENT,
};
use crate::{Error, Result};
use indexmap::IndexMap;
use serde_json::value::{to_raw_value, RawValue};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The key in the header.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// The configurations by component. The file of a single model has one without a name.
pub(super) struct Components(BTreeMap<String, PeftConfig>);

impl Components {
    pub fn read(text: &str) -> Result<Self> {
        // Raw, because the order of patterns counts.
        let options: BTreeMap<String, Box<RawValue>> =
            serde_json::from_str(text).map_err(malformed)?;
        let mut components = BTreeMap::<String, IndexMap<String, _>>::new();
        for (key, value) in options {
            let (component, option) = key.split_once('.').unwrap_or(("", &key));
            components.entry(component.to_owned()).or_default().insert(option.to_owned(), value);
        }
        let read = |(component, mut options): (String, IndexMap<String, _>)| {
            // It is not always there.
            if !options.contains_key("peft_type") {
                options.insert("peft_type".to_owned(), to_raw_value("LORA").map_err(malformed)?);
            }
            Ok((component, PeftConfig::of(Fields(options))?.saved()?))
        };
        components.into_iter().map(read).collect::<Result<_>>().map(Self)
    }

    /// The rank and alpha of the layer whose factor has this key.
    pub fn rank_alpha(&self, path: &str, key: &str) -> Result<(usize, f64)> {
        let within = path.split_once('.').unwrap_or(("", path));
        let (path, json) = match (self.0.get(within.0), self.0.get("")) {
            (Some(json), _) => (within.1, json),
            (None, Some(json)) => (path, json),
            (None, None) => {
                return Err(Error::tensor(key, "the metadata has no options of its component"))
            }
        };
        let given = &json.options.lora;
        let r = json.patterns.rank(path)?.unwrap_or(given.r);
        Ok((r, json.patterns.alpha(path)?.unwrap_or(given.lora_alpha)))
    }

    /// The options other than ranks and alphas. Those that change the update are the same for all components; of the
    /// others, those that all have are kept.
    pub fn config(self) -> Result<AdapterConfig> {
        let mut common: Option<AdapterConfig> = None;
        for (component, json) in self.0 {
            let AdapterConfig { lora, base_model_name_or_path, task_type, .. } = json.options;
            let lora = LoraConfig { r: 0, lora_alpha: 1., ..lora };
            let own =
                AdapterConfig { lora, base_model_name_or_path, task_type, ..Default::default() };
            let Some(common) = &mut common else {
                common = Some(own);
                continue;
            };
            let lora_dropout = common.lora.lora_dropout;
            if common.lora != (LoraConfig { lora_dropout, ..lora }) {
                let reason = format!(
                    "use_rslora, use_dora or fan_in_fan_out of {component:?} differs from other components'"
                );
                return Err(Error::unsupported("an adapter with several configurations", reason));
            }
            if lora_dropout != lora.lora_dropout {
                common.lora.lora_dropout = 0.;
            }
            keep_equal(&mut common.base_model_name_or_path, &own.base_model_name_or_path);
            keep_equal(&mut common.task_type, &own.task_type);
        }
        Ok(common.unwrap_or_default())
    }
}

fn keep_equal(common: &mut Option<String>, own: &Option<String>) {
    if common != own {
        *common = None;
    }
}

/// The metadata of layers whose paths begin with the component.
pub(super) fn write(
    weights: &LoraWeights,
    layers: &[(&str, &LayerWeights, Factors)],
) -> Result<String> {
    let mut components = BTreeMap::<&str, Vec<_>>::new();
    for (path, layer, factors) in layers {
        let wrong = |reason: String| Error::tensor(Part::A.at(path), reason);
        let (component, within) = path
            .split_once('.')
            .filter(|_| has_component(path))
            .ok_or_else(|| wrong(NO_COMPONENT.to_owned()))?;
        if let Some(kind) = &layer.kind {
            if !kind.is_linear() && kind.spatial().is_none() {
                return Err(wrong(format!("diffusers' format has no {kind:?}")));
            }
        }
        components.entry(component).or_default().push((within, factors.clone()));
    }
    let mut all = Map::<String, Value>::new();
    for (component, layers) in components {
        let text = config_json(&weights.options, &layers, weights)?;
        let options: Map<_, _> = serde_json::from_str(&text).map_err(malformed)?;
        all.extend(options.into_iter().map(|(key, value)| (format!("{component}.{key}"), value)));
    }
    serde_json::to_string(&all).map_err(|e| Error::Invalid(e.to_string()))
}
