//! The parameter selection: which variables are trained, and therefore saved.

use crate::layers::{is_within, Part};
use crate::weights::{contains, AdapterConfig, Bias};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::sync::PoisonError;

/// The parameters that are trained and saved: the factors, biases by [`Bias`], and whole modules.
///
/// The last component of a name decides (`lora_A`, `lora_B`, `bias`); loralib searches the whole name for
/// these words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trainable {
    bias: Bias,
    modules: Vec<String>,
    all_parameters: bool,
}

impl From<Bias> for Trainable {
    fn from(bias: Bias) -> Self {
        Self { bias, modules: vec![], all_parameters: false }
    }
}

impl From<&AdapterConfig> for Trainable {
    fn from(config: &AdapterConfig) -> Self {
        config.modules_to_save.iter().fold(config.bias.into(), Self::and)
    }
}

impl AdapterConfig {
    /// Takes the biases and modules of a selection, which are trained and saved with the adapter.
    /// `Trainable::from(&config)` gives the selection back.
    ///
    /// ```
    /// use loralib::{adapter::AdapterConfig, utils::Trainable, Bias, LoraConfig};
    /// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
    /// let selection = Bias::All.and("classifier");
    /// let config = AdapterConfig::from(cfg).with_trainable(selection.clone())?;
    /// assert_eq!(config.modules_to_save, ["classifier"]);
    /// assert_eq!(Trainable::from(&config), selection);
    /// # Ok::<(), loralib::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it is [`Trainable::all_parameters`], which is not an adapter.
    pub fn with_trainable(mut self, trainable: impl Into<Trainable>) -> Result<Self> {
        let Trainable { bias, modules, all_parameters } = trainable.into();
        if all_parameters {
            let reason = "full fine-tuning has no adapter";
            return Err(Error::unsupported("`Trainable::all_parameters`", reason));
        }
        (self.bias, self.modules_to_save) = (bias, modules);
        Ok(self)
    }
}

impl Bias {
    /// Also trains and saves a whole module, such as a new head.
    ///
    /// ```
    /// use loralib::Bias;
    /// let trainable = Bias::None.and("classifier");
    /// ```
    pub fn and(self, module: impl Into<String>) -> Trainable {
        Trainable::from(self).and(module)
    }
}

impl Trainable {
    /// All parameters: full fine-tuning with the same model code, its layers at r = 0. They are
    /// initialised with the base's values; a tensor that the base lacks is an error unless it is in a
    /// module of [`and`](Self::and).
    ///
    /// ```
    /// use loralib::utils::Trainable;
    /// let trainable = Trainable::all_parameters().and("classifier");
    /// ```
    pub fn all_parameters() -> Self {
        Self { all_parameters: true, ..Self::default() }
    }

    /// Adds a module: every variable with these components in its path. `"classifier"` selects
    /// `classifier.weight` and `bert.classifier.bias`. If the base has the module, it is initialised with
    /// the base's values; for a head of another size see
    /// [`Adapter::ignore_mismatched_sizes`](crate::Adapter::ignore_mismatched_sizes).
    pub fn and(mut self, module: impl Into<String>) -> Self {
        self.modules.push(module.into());
        self
    }

    /// Whether `name` is selected in a model that has the names for which `exists` is true.
    pub(crate) fn selects(&self, name: &str, exists: impl Fn(&str) -> bool) -> bool {
        let adapted = |path: &str| exists(&Part::A.at(path));
        self.all_parameters
            || Part::parse(name).1.is_adapter()
            || contains(self.bias, &self.modules, name, adapted)
    }

    /// Whether `name` is in a module that is trained as a whole.
    pub(crate) fn in_module(&self, name: &str) -> bool {
        self.modules.iter().any(|module| is_within(name, module))
    }

    /// The selected variables that are trained: all but the initial factors. The errors of [`select`](Self::select).
    pub(crate) fn trained(&self, vars: &VarMap) -> Result<BTreeMap<String, Var>> {
        Ok(self.select(vars)?.into_iter().filter(|(name, _)| !is_untrained(name)).collect())
    }

    /// The selected variables by name, as they are saved. An error if there are none, or none in a named module.
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
        for (layer, _) in selected.keys().map(|name| Part::parse(name)).filter(|n| n.1 == Part::A) {
            for weight in weights(layer) {
                if selected.contains_key(&weight) {
                    return Err(Error::tensor(weight, FROZEN_WEIGHT));
                }
            }
        }
        if selected.is_empty() {
            return Err(empty(if self.all_parameters {
                "all parameters".to_owned()
            } else {
                format!("lora_A, lora_B or bias ({})", self.bias)
            }));
        }
        Ok(selected)
    }
}

/// Selecting a weight that has an adapter would have no effect.
const FROZEN_WEIGHT: &str =
    "its layer has an adapter, which keeps it frozen: to train the whole layer set r = 0";

/// Whether this is the name of an initial factor, which is saved and not trained.
pub(crate) fn is_initial(name: &str) -> bool {
    Part::parse(name).1.is_initial()
}

/// Whether a variable of this name is saved and not trained: an initial factor, or the statistics of a batch norm.
pub(crate) fn is_untrained(name: &str) -> bool {
    is_statistic(name) || is_initial(name)
}

/// Whether the name is that of a running statistic of a batch norm.
pub(crate) fn is_statistic(name: &str) -> bool {
    matches!(Part::parse(name).1, Part::Base("running_mean" | "running_var"))
}

/// A variable of a map.
pub(crate) fn variable(vars: &VarMap, name: &str) -> Option<Var> {
    vars.data().lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
}

/// All variables of a map, by name.
pub(crate) fn variables(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// The names that a state dict is expected to have, with `factors` or without: all names of the map, or,
/// if the map also holds the frozen base, only the factors and only the others.
pub(crate) fn expected(vars: &BTreeMap<String, Var>, factors: bool) -> impl Iterator<Item = &str> {
    let in_map = |layer: &str| weights(layer).iter().any(|weight| vars.contains_key(weight));
    let holds_base = vars
        .keys()
        .map(|name| Part::parse(name))
        .any(|(layer, part)| part == Part::A && in_map(layer));
    let wanted = move |name: &&str| !holds_base || Part::parse(name).1.is_adapter() == factors;
    vars.keys().map(String::as_str).filter(wanted)
}

/// The two names of a layer's weight.
fn weights(layer: &str) -> [String; 2] {
    ["weight", "conv.weight"].map(|weight| Part::Base(weight).at(layer))
}

/// The variables to train, sorted by name, for an optimizer.
///
/// # Errors
/// If there are none, none in a named module, or a selected weight has an adapter and so stays frozen.
pub fn mark_only_lora_as_trainable(
    vars: &VarMap,
    trainable: impl Into<Trainable>,
) -> Result<Vec<Var>> {
    Ok(trainable.into().trained(vars)?.into_values().collect())
}

/// The names of adapter variables without a gradient in `grads`, sorted. Call it after the first backward.
///
/// Some of candle's fused operations (`softmax_last_dim`, `RmsNorm`, `LayerNorm` with a bias, `rope`) have
/// no backward: layers before them get no gradient, without an error. A model in evaluation gets none at
/// all. An operation that cuts only one of several paths is not detected here: the gradients are there,
/// and wrong. If `vars` holds the frozen base too, only `lora_A` and `lora_B` are checked.
pub fn missing_grads(vars: &VarMap, grads: &GradStore) -> Vec<String> {
    let vars = variables(vars);
    expected(&vars, true)
        .filter(|name| !is_untrained(name))
        .filter(|name| vars.get(*name).is_some_and(|var| grads.get(var).is_none()))
        .map(str::to_owned)
        .collect()
}

/// An error with the names of the variables that have no gradient.
pub(crate) fn require_grads<'a>(
    vars: impl IntoIterator<Item = (&'a String, &'a Var)>,
    grads: &GradStore,
) -> Result<()> {
    let missing = vars.into_iter().filter(|(_, var)| grads.get(var).is_none());
    let missing: Vec<_> = missing.map(|(name, _)| name).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "no gradient reaches {missing:?}: an operation of the model has no backward, the loss does not depend on \
             them, or the adapter is in evaluation; does the model's file have `use loralib::nn as candle_nn;` at its \
             top?"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_by_their_last_component_and_modules_by_whole_components() {
        let all =
            ["q.lora_A", "q.bias", "k.bias", "x.conv.bias", "x.lora_A", "conv.bias", "lora_A"];
        let exists = |name: &str| all.contains(&name);
        let selects = |trainable: Trainable, name: &str| trainable.selects(name, exists);
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
        assert!(selects(Trainable::all_parameters(), "k.weight"));
    }
}
