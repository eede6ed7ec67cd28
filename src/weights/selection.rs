//! Which parameters of a model an adapter contains beside its layers' updates: biases, and modules as a whole.

use super::bias::Bias;
use super::config::AdapterConfig;
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

impl AdapterConfig {
    /// Adds what is needed to contain these parameters too: a state dict may have been taken by a selection of which
    /// the options do not tell. The weight of an adapted layer is the base's.
    pub(super) fn include<'a>(
        &mut self,
        names: impl Iterator<Item = &'a String>,
        adapted: impl Fn(&str) -> bool,
    ) {
        for name in names {
            if contains(self.bias, &self.modules_to_save, name, &adapted) {
                continue;
            }
            match Part::parse(name) {
                (path, Part::Base("weight")) if adapted(path) => {}
                (path, Part::Base("bias"))
                    if self.bias == Bias::None
                        && (adapted(path) || without_conv(path).is_some_and(&adapted)) =>
                {
                    self.bias = Bias::LoraOnly;
                }
                (path, _) => self.modules_to_save.push(path.to_owned()),
            }
        }
    }
}
