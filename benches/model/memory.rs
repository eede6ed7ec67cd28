//! What gradients hold, in MiB.

use candle_core::backprop::GradStore;
use std::collections::HashMap;

/// What the gradients hold.
pub fn kept(grads: &GradStore) -> f64 {
    let each: HashMap<_, _> = grads.get_ids().map(|id| (*id, grads.get_id(*id))).collect();
    let bytes = each.values().flatten().map(|g| g.elem_count() * g.dtype().size_in_bytes());
    bytes.sum::<usize>() as f64 / f64::from(1 << 20)
}
