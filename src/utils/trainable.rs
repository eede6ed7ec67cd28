//! The selection: which variables are trained, and so which are saved.

use super::names::{is_lora, is_within, join, split};
use super::Bias;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::sync::PoisonError;

/// What is trained and saved: the adapters, some biases, and perhaps whole modules.
///
/// The last component of a name decides (`lora_A`, `lora_B`, `bias`); loralib looks for the words
/// anywhere in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trainable {
    bias: Bias,
    modules: Vec<String>,
    everything: bool,
}

impl From<Bias> for Trainable {
    fn from(bias: Bias) -> Self {
        Self { bias, modules: vec![], everything: false }
    }
}

impl Trainable {
    /// Every variable: full fine-tuning with the same model code, its layers at r = 0. All of it
    /// starts from the base's values; a tensor that the base lacks is still an error, unless a
    /// module of [`and`](Self::and) has it.
    ///
    /// ```
    /// use loralib::Trainable;
    /// let what = Trainable::everything().and("classifier");
    /// ```
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Adds a module: every variable with these components somewhere on its path, so that
    /// `"classifier"` selects `classifier.weight` and `bert.classifier.bias`. Where the base has the
    /// module it starts from the base's values: a head of another size needs another name.
    pub fn and(mut self, module: impl Into<String>) -> Self {
        self.modules.push(module.into());
        self
    }

    /// The biases and modules, unless everything is selected.
    pub(crate) fn into_parts(self) -> Option<(Bias, Vec<String>)> {
        (!self.everything).then_some((self.bias, self.modules))
    }

    /// Whether `name` is selected, in a model in which `exists` tells which names there are.
    pub(crate) fn selects(&self, name: &str, exists: impl Fn(&str) -> bool) -> bool {
        let (layer, last) = split(name);
        if self.everything || is_lora(last) || self.is_new(name) {
            return true;
        }
        last == "bias"
            && match self.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => {
                    // A convolution's bias may stand under loralib's second name, conv.bias.
                    let (parent, own) = split(layer);
                    exists(&join(layer, "lora_A"))
                        || (own == "conv" && exists(&join(parent, "lora_A")))
                }
            }
    }

    /// Whether `name` lies in one of the modules that are trained as a whole.
    pub(crate) fn is_new(&self, name: &str) -> bool {
        self.modules.iter().any(|module| is_within(name, module))
    }

    /// The selected variables, by name. An error if there are none, or none in one of the modules.
    pub(crate) fn select(&self, vars: &VarMap) -> Result<BTreeMap<String, Var>> {
        let all = variables(vars);
        let selected: BTreeMap<_, _> = all
            .iter()
            .filter(|(name, _)| self.selects(name, |n| all.contains_key(n)))
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect();
        let empty = |wanted: String| Error::Empty { wanted, held: all.len() };
        for module in &self.modules {
            if !all.keys().any(|name| is_within(name, module)) {
                return Err(empty(format!("the module {module:?}")));
            }
        }
        for (layer, _) in selected.keys().map(|name| split(name)).filter(|n| n.1 == "lora_A") {
            for weight in weights(layer) {
                if selected.contains_key(&weight) {
                    return Err(Error::tensor(weight, FROZEN));
                }
            }
        }
        if selected.is_empty() {
            return Err(empty(match self.everything {
                true => "everything".to_owned(),
                false => format!("lora_A, lora_B or bias ({})", self.bias),
            }));
        }
        Ok(selected)
    }
}

/// A layer never trains the weight under its update, so that to select it would be without effect.
const FROZEN: &str =
    "it lies under an adapter, which keeps it frozen: train the layer whole with r = 0";

/// All variables of a map, by name.
pub(crate) fn variables(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// The names of a map that a state dict, with `factors` or without, is expected to have: all of them,
/// unless the map holds the frozen base of an adapter too; then the factors, or all others.
pub(crate) fn expected(vars: &BTreeMap<String, Var>, factors: bool) -> impl Iterator<Item = &str> {
    let in_map = |layer: &str| weights(layer).iter().any(|weight| vars.contains_key(weight));
    let holds_base =
        vars.keys().map(|name| split(name)).any(|(layer, last)| last == "lora_A" && in_map(layer));
    let wanted = move |name: &&str| !holds_base || is_lora(name) == factors;
    vars.keys().map(String::as_str).filter(wanted)
}

/// A layer's weight under its two names.
fn weights(layer: &str) -> [String; 2] {
    ["weight", "conv.weight"].map(|weight| join(layer, weight))
}

/// The variables to train, sorted by name.
///
/// # Errors
/// When there are none, or none in a module that was named, or a weight is selected that lies under an
/// adapter and so stays frozen.
pub fn mark_only_lora_as_trainable(vars: &VarMap, what: impl Into<Trainable>) -> Result<Vec<Var>> {
    Ok(what.into().select(vars)?.into_values().collect())
}

/// The names of adapter variables that `grads` has no gradient for, sorted.
///
/// Some of candle's fused operations (`softmax_last_dim`, `RmsNorm`, `LayerNorm` with a bias,
/// `rope`) cut the graph without an error, so that what lies before them is never trained; and a model
/// in evaluation gets no gradients at all. Check once, after the first backward. Where `vars` holds the
/// frozen base too, only `lora_A` and `lora_B` are looked at.
pub fn missing_grads(vars: &VarMap, grads: &GradStore) -> Vec<String> {
    let vars = variables(vars);
    expected(&vars, true)
        .filter(|name| vars.get(*name).is_some_and(|var| grads.get(var).is_none()))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_by_their_last_component_and_modules_by_whole_components() {
        let all =
            ["q.lora_A", "q.bias", "k.bias", "x.conv.bias", "x.lora_A", "conv.bias", "lora_A"];
        let exists = |name: &str| all.contains(&name);
        let selects = |what: Trainable, name: &str| what.selects(name, exists);
        let none = || Trainable::from(Bias::None);
        let only = || Trainable::from(Bias::LoraOnly);
        assert!(selects(none(), "q.lora_A"));
        assert!(!selects(none(), "my_lora_Adapter.weight"));
        assert!(!selects(none(), "lora_A.weight"));
        assert!(!selects(none(), "q.bias"));
        assert!(selects(Bias::All.into(), "k.bias"));
        assert!(!selects(Bias::All.into(), "relative_attention_bias.weight"));
        assert!(selects(only(), "q.bias"));
        assert!(!selects(only(), "k.bias"));
        assert!(selects(only(), "x.conv.bias"));
        assert!(selects(only(), "conv.bias"));
        assert!(!selects(only(), "qconv.bias"));
        assert!(selects(none().and("head"), "bert.head.weight"));
        assert!(selects(none().and("bert.head"), "bert.head.weight"));
        assert!(!selects(none().and("head"), "overhead.weight"));
        assert!(selects(Trainable::everything(), "k.weight"));
    }
}
