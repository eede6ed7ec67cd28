//! The memory of a long text: linear in its tokens.

#[path = "../../benches/kept/count.rs"]
mod count;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use count::{now, peak};
use loralib::nn::{self, flash_attn::flash_attn, ops, rotary_emb::rope_thd};
use loralib::{Adapter, LoraConfig};

#[global_allocator]
static COUNTING: count::Counting = count::Counting;

const HEADS: usize = 2;
const D: usize = 32;
const WIDTH: usize = HEADS * D;

struct Layer {
    linears: Vec<nn::Linear>,
    gain: Tensor,
}

impl Layer {
    fn new(adapter: &Adapter) -> loralib::Result<Self> {
        let names = ["q", "k", "v", "o", "gate", "up", "down"];
        let weight = || Tensor::rand(-1f32, 1., (WIDTH, WIDTH), &Device::Cpu)? * 0.1;
        let weights = names.iter().map(|name| Ok((format!("{name}.weight"), weight()?)));
        let weights = weights.collect::<Result<_>>()?;
        let vb = nn::VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let vb = adapter.var_builder(vb);
        let linears = names.iter().map(|name| nn::linear_no_bias(WIDTH, WIDTH, vb.pp(name)));
        let gain = Tensor::ones(WIDTH, DType::F32, &Device::Cpu)?;
        Ok(Self { linears: linears.collect::<Result<_>>()?, gain })
    }

    fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let tokens = x.dim(1)?;
        let [q, k, v, o, gate, up, down] = &self.linears[..] else { unreachable!() };
        let h = ops::rms_norm(x, &self.gain, 1e-5)?;
        let heads = |layer: &nn::Linear| layer.forward(&h)?.reshape((1, tokens, HEADS, D));
        let (q, k) = (rope_thd(&heads(q)?, cos, sin)?, rope_thd(&heads(k)?, cos, sin)?);
        let y = flash_attn(&q, &k, &heads(v)?, 0.2, true)?.flatten_from(2)?;
        let x = (x + o.forward(&y)?)?;
        let h = ops::rms_norm(&x, &self.gain, 1e-5)?;
        let y = (ops::silu(&gate.forward(&h)?)? * up.forward(&h)?)?;
        x + down.forward(&y)?
    }
}

/// The bytes that a step needs beyond the layer, and what it keeps between forward and backward.
fn step(layer: &Layer, adapter: &Adapter, tokens: usize) -> Result<[i64; 2]> {
    let x = Var::rand(-1f32, 1., (1, tokens, WIDTH), &Device::Cpu)?;
    let angles = Tensor::rand(0f32, 6., (tokens, D / 2), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    peak();
    let before = now().bytes;
    let y = layer.forward(&x, &cos, &sin)?;
    let kept = now().bytes - before;
    let grads = y.sqr()?.sum_all()?.backward()?;
    assert!(loralib::missing_grads(adapter.var_map(), &grads).is_empty());
    Ok([peak() - before, kept])
}

/// The scores of 8,192 tokens are 512 MiB, and are needed several times.
#[test]
fn a_step_of_8192_tokens_keeps_no_scores() -> loralib::Result<()> {
    const MIB: i64 = 1 << 20;
    let adapter = Adapter::new(LoraConfig { r: 4, ..Default::default() }).targets("all-linear");
    let layer = Layer::new(&adapter)?;
    step(&layer, &adapter, 64)?;
    let [short_peak, short] = step(&layer, &adapter, 2048)?;
    let [long_peak, long] = step(&layer, &adapter, 8192)?;
    println!("{long_peak} bytes at most, {long} kept; with 2048 tokens {short_peak}, {short}");
    assert!(long_peak < 160 * MIB, "{long_peak}");
    assert!(long < 4 * short + MIB && long < 64 * MIB, "{long} and {short}");
    Ok(())
}
