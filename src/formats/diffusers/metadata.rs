//! The options in a file's header: PEFT's configurations of all components in one JSON object, each key after
//! its component and a dot.

use crate::formats::component::{has_component, NO_COMPONENT};
use crate::formats::layers::Saved;
use crate::layers::LoraConfig;
use crate::peft::{malformed, object, read_saved_config, write_config, Json};
use crate::utils::names::join;
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};
use serde_json::value::{to_raw_value, RawValue};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The key in the header.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// The configurations by component. The file of a single model has one without a name.
pub(super) struct Components(BTreeMap<String, Json>);

impl Components {
    pub fn read(text: &str) -> Result<Self> {
        // Raw, because the order of patterns counts.
        let options: BTreeMap<String, Box<RawValue>> =
            serde_json::from_str(text).map_err(malformed)?;
        let mut components = BTreeMap::<String, BTreeMap<String, _>>::new();
        for (key, value) in options {
            let (component, option) = key.split_once('.').unwrap_or(("", &key));
            components.entry(component.to_owned()).or_default().insert(option.to_owned(), value);
        }
        let read = |(component, mut options): (String, BTreeMap<String, _>)| {
            // It is not always there.
            if !options.contains_key("peft_type") {
                options.insert("peft_type".to_owned(), to_raw_value("LORA").map_err(malformed)?);
            }
            Ok((component, read_saved_config(&serde_json::to_vec(&options).map_err(malformed)?)?))
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
        let given = &json.config.lora;
        let r = json.patterns.rank(path)?.unwrap_or(given.r);
        Ok((r, json.patterns.alpha(path)?.unwrap_or(given.lora_alpha)))
    }

    /// The options other than ranks and alphas. Those that change the update are the same for all components; of the
    /// others, those that all have are kept.
    pub fn config(self) -> Result<AdapterConfig> {
        let mut common: Option<AdapterConfig> = None;
        for (component, json) in self.0 {
            let AdapterConfig { lora, base_model_name_or_path, task_type, .. } = json.config;
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
pub(super) fn write(config: &AdapterConfig, layers: &[Saved]) -> Result<String> {
    let mut components = BTreeMap::<&str, Vec<_>>::new();
    for layer in layers {
        let parts = layer.path.split_once('.').filter(|_| has_component(layer.path));
        let (component, path) = match parts {
            Some(parts) if layer.kind.is_linear() || layer.kind.spatial().is_some() => parts,
            Some(_) => {
                let reason = format!("diffusers' format has no {:?}", layer.kind);
                return Err(Error::tensor(join(layer.path, "lora_A"), reason));
            }
            None => {
                return Err(Error::tensor(join(layer.path, "lora_A"), NO_COMPONENT));
            }
        };
        let layer = (path, layer.factors.r, layer.alpha());
        components.entry(component).or_default().push(layer);
    }
    let mut all = Map::<String, Value>::new();
    for (component, layers) in components {
        for (option, value) in object(write_config(config, &layers, &StateDict::new())?.as_bytes())?
        {
            all.insert(format!("{component}.{option}"), value);
        }
    }
    serde_json::to_string(&all).map_err(|e| Error::Invalid(e.to_string()))
}
