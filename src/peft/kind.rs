//! The kinds of adapted layers, which an adapter's tensors do not tell.

/// The kind of an adapted layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kind {
    /// [`Linear`](crate::Linear).
    #[default]
    Linear,
    /// [`MergedLinear`](crate::MergedLinear) of equal parts, with its `enable_lora`.
    MergedLinear(Vec<bool>),
    /// [`MergedLinear`](crate::MergedLinear) of parts of any sizes, each (outputs, enabled).
    Splits(Vec<(usize, bool)>),
    /// [`Embedding`](crate::Embedding).
    Embedding,
    /// [`Conv1d`](crate::Conv1d).
    Conv1d {
        /// Its groups, which its tensors do not tell: 1 for a plain convolution.
        groups: usize,
    },
    /// [`Conv2d`](crate::Conv2d).
    Conv2d {
        /// Its groups.
        groups: usize,
    },
    /// [`Conv3d`](crate::Conv3d).
    Conv3d {
        /// Its groups.
        groups: usize,
    },
}

impl Kind {
    /// A convolution's spatial dimensions and groups.
    pub(crate) fn spatial(&self) -> Option<(usize, usize)> {
        match *self {
            Self::Conv1d { groups } => Some((1, groups)),
            Self::Conv2d { groups } => Some((2, groups)),
            Self::Conv3d { groups } => Some((3, groups)),
            _ => None,
        }
    }

    /// The parts of a merged linear layer's outputs; `total` is the sum of all, or of those enabled.
    pub(crate) fn splits(&self, total: Total) -> Option<Vec<(usize, bool)>> {
        match self {
            Self::MergedLinear(enabled) => {
                let (sum, parts) = match total {
                    Total::All(sum) => (sum, enabled.len()),
                    Total::Enabled(sum) => (sum, enabled.iter().filter(|on| **on).count()),
                };
                let size = (sum.checked_rem(parts) == Some(0)).then(|| sum / parts)?;
                Some(enabled.iter().map(|on| (size, *on)).collect())
            }
            Self::Splits(splits) => {
                let counted = |on| on || matches!(total, Total::All(_));
                let parts = splits.iter().filter(|(_, on)| counted(*on)).map(|(size, _)| *size);
                let sum = parts.clone().try_fold(0usize, |sum, size| sum.checked_add(size));
                let (Total::All(total) | Total::Enabled(total)) = total;
                (sum == Some(total) && parts.clone().all(|n| n > 0)).then(|| splits.clone())
            }
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Total {
    All(usize),
    Enabled(usize),
}
