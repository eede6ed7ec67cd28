//! Which parameters of a model an adapter contains beside its layers' updates: biases, and modules as a whole.

use super::bias::Bias;
use super::config::AdapterConfig;
use super::lora_weights::LoraWeights;
use crate::layers::{is_within, without_conv, Part};

/// Whether an adapter with these biases and modules contains a parameter, in a model whose adapted layers have the
/// paths for which `adapted` is true.
pub(crate) fn contains(
    bias: Bias,
    modules: &[String],
    name: &str,
    adapted: impl Fn(&str) -> bool,
) -> bool {
    let (path, part) = Part::parse(name);
    let selected = || match bias {
        Bias::None => false,
        Bias::All => true,
        Bias::LoraOnly => adapted(path) || without_conv(path).is_some_and(&adapted),
    };
    modules.iter().any(|module| is_within(name, module))
        || (part == Part::Base("bias") && selected())
}

impl LoraWeights {
    /// The options with what is needed to contain all tensors: a state dict may have been taken by a selection of which
    /// its options do not tell. The weight of an adapted layer is the base's, and without layers this is no adapter.
    pub(crate) fn with_selection(&self) -> Self {
        let mut weights = self.clone();
        let AdapterConfig { bias, modules_to_save, .. } = &mut weights.options;
        let adapted = |path: &str| self.layers.contains_key(path);
        for name in self.others.keys().filter(|_| !self.layers.is_empty()) {
            if contains(*bias, modules_to_save, name, adapted) || self.is_adapted_weight(name) {
                continue;
            }
            let (path, part) = Part::parse(name);
            let of_adapted = adapted(path) || without_conv(path).is_some_and(adapted);
            match part {
                Part::Base("bias") if *bias == Bias::None && of_adapted => *bias = Bias::LoraOnly,
                _ => modules_to_save.push(path.to_owned()),
            }
        }
        weights
    }
}
