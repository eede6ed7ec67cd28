//! [`candle_nn::moe`], and routing with a backward.

use candle_core::{bail, Result, Tensor, D};

pub use candle_nn::moe::*;

/// A mixture of experts: for each token the sum of the outputs of its `top_k` most probable experts, by their
/// probabilities or, with `norm_topk_prob`, by these divided by their sum. Not in candle_nn.
///
/// `xs` is (tokens, d), `probabilities` (tokens, experts), a softmax of the router's logits. `expert` is called with an
/// expert's number and its tokens (n, d), and gives (n, out); the result is (tokens, out). Gradients reach the experts, the
/// router and `xs`. The models of candle-transformers read the probabilities to the host, which cuts the graph before the
/// router. Here the chosen numbers alone are read. An expert without a token is not called, and its variables have no
/// gradient: [`train::AdamW::allow_unused`](crate::train::AdamW::allow_unused) allows that in the first step, and
/// [`Adapter::require_grads`](crate::Adapter::require_grads) names them.
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{Device, Tensor, Var};
/// use loralib::nn as candle_nn;
///
/// let xs = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let logits = Var::new(&[[0f32, 5., 5.], [9., 0., 0.]], &Device::Cpu)?;
/// let probabilities = candle_nn::ops::softmax_last_dim(&logits)?;
/// // The i-th expert multiplies by i.
/// let ys = candle_nn::moe::route(&xs, &probabilities, 2, true, |i, xs| xs * i as f64)?;
/// assert_eq!(ys.get(0)?.to_vec1::<f32>()?, [1.5, 3.]);
/// assert!(ys.sum_all()?.backward()?.get(&logits).is_some());
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of `expert`; and if the shapes do not fit, there are no tokens, or `top_k` is 0 or above the number of experts.
pub fn route(
    xs: &Tensor,
    probabilities: &Tensor,
    top_k: usize,
    norm_topk_prob: bool,
    expert: impl Fn(usize, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (tokens, experts) = match (xs.dims(), probabilities.dims()) {
        (&[tokens, _], &[of, experts]) if tokens == of && tokens > 0 => (tokens, experts),
        (xs, probabilities) => bail!(
            "route: xs is {xs:?} and the probabilities {probabilities:?}, expected (tokens, d) and (tokens, experts)"
        ),
    };
    if top_k == 0 || top_k > experts {
        bail!("route: top_k is {top_k}, expected 1 to {experts}, the number of experts")
    }
    // Sorting has no backward, and needs none.
    let order = probabilities.detach().contiguous()?.arg_sort_last_dim(false)?;
    let chosen = order.narrow(D::Minus1, 0, top_k)?.contiguous()?;
    let weights = probabilities.gather(&chosen, D::Minus1)?;
    let weights = match norm_topk_prob {
        true => weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?,
        false => weights,
    };
    let weights = weights.flatten_all()?.to_dtype(xs.dtype())?;
    // Of each expert the places in (tokens, top_k).
    let mut places = vec![vec![]; experts];
    for (place, expert) in chosen.flatten_all()?.to_vec1::<u32>()?.into_iter().enumerate() {
        places[expert as usize].push(place as u32);
    }
    let mut ys: Option<Tensor> = None;
    for (i, places) in places.into_iter().enumerate().filter(|(_, places)| !places.is_empty()) {
        let rows = Tensor::from_iter(places.iter().map(|at| at / top_k as u32), xs.device())?;
        let places = Tensor::new(places, xs.device())?;
        let y = expert(i, &xs.index_select(&rows, 0)?)?;
        let y = y.broadcast_mul(&weights.index_select(&places, 0)?.unsqueeze(1)?)?;
        let sum = match ys {
            Some(sum) => sum,
            None => Tensor::zeros((tokens, y.dim(1)?), y.dtype(), y.device())?,
        };
        ys = Some(sum.index_add(&rows, &y, 0)?);
    }
    match ys {
        Some(ys) => Ok(ys),
        None => xs.zeros_like(),
    }
}
