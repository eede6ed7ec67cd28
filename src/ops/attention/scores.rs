//! What attention adds to the products of queries and keys.

use crate::ops::window::Window;
use candle_core::Tensor;

/// What the scores (batch, heads, queries, keys) of attention are, beside q·kᵀ.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scores {
    pub scale: f64,
    pub softcap: Option<f64>,
    /// Which keys a query sees.
    pub window: Window,
    /// ALiBi: minus a head's slope (heads) times the distance of key and query.
    pub slopes: Option<Tensor>,
    /// Is added, and broadcasts to the scores.
    pub mask: Option<Tensor>,
}
