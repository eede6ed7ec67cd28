//! How an update is stored in a weight.

/// How `B·A` is stored in the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Unchanged: (out, in).
    AsIs,
    /// Transposed: (in, out), or an embedding's (num, dim).
    Transposed,
    /// Reshaped to a convolution's kernel.
    Reshaped,
}

impl Placement {
    /// The dimension of the outputs.
    pub fn output_dim(self) -> usize {
        match self {
            Self::AsIs | Self::Reshaped => 0,
            Self::Transposed => 1,
        }
    }
}
