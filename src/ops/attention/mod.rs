//! Scaled dot-product attention with grouped heads as one operation: `y = softmax(cap(scale·q·kᵀ) + bias)·v`, with
//! `cap(s) = c·tanh(s/c)`.
//!
//! Queries are computed in blocks, whose scores alone are in memory; the graph keeps q, k, v and y. With the probabilities
//! p, which the backward computes again, `gv = pᵀ·g`, `gp = g·vᵀ`, `gs = cap'·p ∘ (gp - Σ p∘gp)`, `gq = scale·gs·k` and
//! `gk = scale·gsᵀ·q`.

mod blocks;
mod op;
mod scores;
mod varlen;

pub(crate) use op::attention;
pub(crate) use scores::Scores;
pub(crate) use varlen::attention_varlen;
