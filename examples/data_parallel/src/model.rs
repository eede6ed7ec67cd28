//! A small decoder over bytes, written on candle_nn's names: `use loralib::nn as candle_nn` makes of its layers those
//! that an `Adapter` adapts by name.

use candle_core::{Module, Result, Tensor};
use candle_nn::flash_attn::flash_attn;
use candle_nn::{embedding, linear_no_bias, rms_norm, Embedding, Linear, RmsNorm, VarBuilder};
use loralib::nn as candle_nn;

/// One for each byte.
const VOCABULARY: usize = 256;
const HEAD_DIM: usize = 32;
const EPS: f64 = 1e-5;

/// The sizes of a model.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub width: usize,
    pub layers: usize,
    /// The longest sequence.
    pub context: usize,
}

pub struct Decoder {
    bytes: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    /// From hidden states to logits.
    pub head: Linear,
}

impl Decoder {
    pub fn new(sizes: Sizes, vb: VarBuilder) -> Result<Self> {
        let Sizes { width, layers, context } = sizes;
        if width == 0 || !width.is_multiple_of(HEAD_DIM) {
            candle_core::bail!("a width of {width} is not a multiple of {HEAD_DIM}")
        }
        let block = |i| Block::new(width, vb.pp("blocks").pp(i));
        Ok(Self {
            bytes: embedding(VOCABULARY, width, vb.pp("bytes"))?,
            positions: embedding(context, width, vb.pp("positions"))?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            norm: rms_norm(width, EPS, vb.pp("norm"))?,
            head: linear_no_bias(width, VOCABULARY, vb.pp("head"))?,
        })
    }

    /// Bytes (batch, length) to hidden states (batch, length, width).
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let length = ids.dim(1)?;
        let positions = Tensor::arange(0, length as u32, ids.device())?;
        let positions = self.positions.forward(&positions)?;
        let x = self.bytes.forward(ids)?.broadcast_add(&positions)?;
        self.norm.forward(&self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?)
    }
}

struct Block {
    norm_1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_2: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let square = |name| linear_no_bias(width, width, vb.pp(name));
        Ok(Self {
            norm_1: rms_norm(width, EPS, vb.pp("norm_1"))?,
            q: square("q")?,
            k: square("k")?,
            v: square("v")?,
            o: square("o")?,
            norm_2: rms_norm(width, EPS, vb.pp("norm_2"))?,
            up: linear_no_bias(width, 4 * width, vb.pp("up"))?,
            down: linear_no_bias(4 * width, width, vb.pp("down"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, length, width) = x.dims3()?;
        let y = self.norm_1.forward(x)?;
        let heads = |projection: &Linear| {
            projection.forward(&y)?.reshape((batch, length, width / HEAD_DIM, HEAD_DIM))
        };
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        let y = flash_attn(&q, &k, &v, (HEAD_DIM as f32).powf(-0.5), true)?;
        let x = (x + self.o.forward(&y.flatten_from(2)?)?)?;
        let y = candle_nn::ops::silu(&self.up.forward(&self.norm_2.forward(&x)?)?)?;
        &x + self.down.forward(&y)?
    }
}
