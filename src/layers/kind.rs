//! What an adapted layer is. Its tensors do not tell: the factors of an [`Embedding`](crate::Embedding)
//! have the shapes of a [`Linear`](crate::Linear)'s.

use serde::{Deserialize, Serialize};

/// The kind of an adapted layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayerKind {
    /// [`Linear`](crate::Linear).
    Linear,
    /// [`MergedLinear`](crate::MergedLinear) with equal splits: its `enable_lora`.
    MergedLinear(Vec<bool>),
    /// [`MergedLinear`](crate::MergedLinear) with splits of any sizes, each (outputs, enabled).
    MergedSplits(Vec<(usize, bool)>),
    /// [`Embedding`](crate::Embedding).
    Embedding,
    /// [`Conv1d`](crate::Conv1d).
    Conv1d {
        /// Groups of channels.
        groups: usize,
    },
    /// [`Conv2d`](crate::Conv2d).
    Conv2d {
        /// Groups of channels.
        groups: usize,
    },
    /// [`Conv3d`](crate::Conv3d).
    Conv3d {
        /// Groups of channels.
        groups: usize,
    },
    /// A parameter that is no layer's weight, or fused experts, as PEFT's `target_parameters`: its path is the
    /// parameter's own name. It is merged, and not computed beside the base.
    Parameter {
        /// Its place among the adapted parameters of its module, from 0, in the order in which the module has
        /// them: PEFT's format has the order instead of names.
        index: usize,
    },
}

impl LayerKind {
    /// Whether this is a linear layer, merged or not, which may have `fan_in_fan_out`.
    pub(crate) fn is_linear(&self) -> bool {
        matches!(self, Self::Linear | Self::MergedLinear(_) | Self::MergedSplits(_))
    }

    /// The spatial dimensions and groups of a convolution.
    pub(crate) fn spatial(&self) -> Option<(usize, usize)> {
        match *self {
            Self::Conv1d { groups } => Some((1, groups)),
            Self::Conv2d { groups } => Some((2, groups)),
            Self::Conv3d { groups } => Some((3, groups)),
            _ => None,
        }
    }

    /// The convolution of `n` spatial dimensions, if there is one.
    pub(crate) fn conv(n: usize, groups: usize) -> Option<Self> {
        match n {
            1 => Some(Self::Conv1d { groups }),
            2 => Some(Self::Conv2d { groups }),
            3 => Some(Self::Conv3d { groups }),
            _ => None,
        }
    }

    /// The splits of a merged linear layer, each (outputs, enabled), if they make up `total` outputs.
    pub(crate) fn splits(&self, total: Total) -> Option<Vec<(usize, bool)>> {
        match self {
            Self::MergedLinear(enabled) => {
                let (sum, count) = match total {
                    Total::All(sum) => (sum, enabled.len()),
                    Total::Enabled(sum) => (sum, enabled.iter().filter(|on| **on).count()),
                };
                let size = (sum.checked_rem(count) == Some(0)).then(|| sum / count)?;
                Some(enabled.iter().map(|on| (size, *on)).collect())
            }
            Self::MergedSplits(splits) => {
                let counted = |on| on || matches!(total, Total::All(_));
                let sizes = splits.iter().filter(|(_, on)| counted(*on)).map(|(size, _)| *size);
                let sum = sizes.clone().try_fold(0usize, |sum, size| sum.checked_add(size));
                let (Total::All(total) | Total::Enabled(total)) = total;
                (sum == Some(total) && sizes.clone().all(|n| n > 0)).then(|| splits.clone())
            }
            _ => None,
        }
    }
}

/// The number of outputs of all splits, or of the enabled ones.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Total {
    All(usize),
    Enabled(usize),
}
