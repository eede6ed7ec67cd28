//! Which parameters of a model an adapter contains beside its layers' updates: biases, and modules as a whole.

use super::bias::Bias;
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
