//! Attention as one node: heads, scores, mask, softmax and their gradients.

use super::composed;
use super::computed::{computed3, Value};
use super::heads::Heads;
use candle_core::{Result, Tensor};

/// Multi-head attention of `q`, `k`, `v` (batch, tokens, n), none empty. `mask`, which is added to the
/// scores (batch, heads, tokens, tokens), broadcasts to them.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    heads: usize,
) -> Result<Tensor> {
    let heads = Heads::new([q, k, v], heads)?;
    let values = [q.detach().contiguous()?, k.detach().contiguous()?, v.detach().contiguous()?];
    if let Some((y, p)) = heads.forward(&values, mask)? {
        let y = Value::Fresh(y, q.shape().clone());
        return computed3([q, k, v], y, move |grad| heads.backward(&values, &p, grad));
    }
    let (y, p) = composed::forward(&values, mask, &heads)?;
    computed3([q, k, v], y, move |grad| composed::backward(&values, &p, grad, &heads))
}
