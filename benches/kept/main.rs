//! What a decoder layer keeps for its backward, the peak of a step and the number of operations: for the operations of
//! `lora::nn` as a device computes them, and for candle's composed ones.
//!
//!     cargo bench --bench kept                 # Llama shapes 0.5B and 1.5B with 512 and 2048 tokens
//!     cargo bench --bench kept -- 7B 2048      # one shape and one length
//!
//! The CPU computes through the code for devices, in F16, and an allocator counts its arrays. An operation is an array
//! that is written. (BF16 is the same, but candle's product of it on the CPU writes three arrays more.) `benches/compare/kept.py` prints the same for PEFT on torch.

mod count;
#[path = "../llama/layer.rs"]
mod layer;
#[path = "../llama/shapes.rs"]
mod shapes;

use candle_core::{DType, Device, Result, Tensor, Var};
use count::{now, peak, Count};
use layer::{By, Layer, Observer, RANK};
use loralib::nn::flash_attn::flash_attn;
use loralib::train::linear_cross_entropy;
use loralib::LoraConfig;
use shapes::{Shape, SHAPES};
use std::cell::RefCell;

#[global_allocator]
static COUNTING: count::Counting = count::Counting;

const DTYPE: DType = DType::F16;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    // Before the first operation reads it, and before there is another thread.
    std::env::set_var("LORALIB_COMPOSED", "1");
    let args: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let of = |shape: &&Shape| args.iter().any(|arg| arg == shape.name);
    let mut shapes: Vec<_> = SHAPES.iter().filter(of).collect();
    if shapes.is_empty() {
        shapes = SHAPES[..2].iter().collect();
    }
    let mut lengths: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    if lengths.is_empty() {
        lengths = vec![512, 2048];
    }
    let mut rows = vec![];
    for shape in shapes {
        for tokens in &lengths {
            let lora = Step::new(By::Lora, *shape, *tokens)?;
            let candle = match *tokens <= 2048 {
                true => Some(Step::new(By::Candle, *shape, *tokens)?),
                false => None,
            };
            print_stages(shape, *tokens, &lora, candle.as_ref());
            rows.push((shape, *tokens, lora, candle));
        }
    }
    println!("\n| a layer | tokens | kept, MiB | composed | peak of a step beyond what is kept, MiB | composed | operations, forward and backward | composed | ratio |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (shape, tokens, lora, candle) in &rows {
        let of = |f: &dyn Fn(&Step) -> String| candle.as_ref().map_or("-".into(), f);
        println!(
            "| {} | {tokens} | {:.1} | {} | {:.1} | {} | {} + {} | {} | {} |",
            shape.name,
            lora.kept / MIB,
            of(&|step| format!("{:.1}", step.kept / MIB)),
            lora.beyond / MIB,
            of(&|step| format!("{:.1}", step.beyond / MIB)),
            lora.forward,
            lora.backward,
            of(&|step| format!("{} + {}", step.forward, step.backward)),
            of(&|step| format!("{:.2}", lora.operations() / step.operations())),
        );
    }
    println!("\nA model, in GiB, with all layers and the loss of its head (16 bits a value; in 4-bit blocks 4.5):\n");
    println!("| | tokens | weights | in blocks | adapter, gradients, AdamW | kept | with checkpointing | beyond | head | in all | in blocks, with checkpointing |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (shape, tokens, lora, _) in &rows {
        print_model(shape, *tokens, lora)?;
    }
    println!("\n| attention, one head of keys with 4 of queries of 128 | tokens | peak beyond inputs and outputs, MiB |\n|---|---|---|");
    for tokens in &lengths {
        println!("| forward and backward | {tokens} | {:.1} |", attention(*tokens)? / MIB);
    }
    Ok(())
}

/// What each operation has kept and written, in the order of their first use.
type Stages = Vec<(&'static str, Count)>;

#[derive(Default)]
struct Counted(RefCell<Stages>);

impl Observer for Counted {
    fn stage<T>(&self, name: &'static str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = now();
        let y = f()?;
        let after = now();
        let mut stages = self.0.borrow_mut();
        let at = stages.iter().position(|(of, _)| *of == name).unwrap_or_else(|| {
            stages.push((name, Count::default()));
            stages.len() - 1
        });
        stages[at].1.bytes += after.bytes - before.bytes;
        stages[at].1.arrays += after.arrays - before.arrays;
        Ok(y)
    }
}

/// A layer's share of a step, from two layers.
struct Step {
    stages: Stages,
    kept: f64,
    /// The peak beyond what two layers keep.
    beyond: f64,
    forward: u64,
    backward: u64,
}

impl Step {
    fn new(by: By, shape: Shape, tokens: usize) -> Result<Self> {
        let device = &Device::Cpu;
        let layer = || Layer::new(by, shape, tokens, DTYPE, device);
        let layers = [layer()?, layer()?];
        let x = Tensor::rand(-1f32, 1., (1, tokens, shape.hidden), device)?.to_dtype(DTYPE)?;
        let x = Var::from_tensor(&x)?;
        let step = |tokens: usize| -> Result<(Count, Count, Count, i64, Stages)> {
            let counted = Counted::default();
            let x = x.narrow(1, 0, tokens)?;
            peak();
            let before = now();
            let y = layers.iter().try_fold(x, |x, layer| layer.forward(&x, &counted))?;
            let middle = now();
            let grads = y.sum_all()?.backward()?;
            let after = now();
            drop(grads);
            Ok((before, middle, after, peak(), counted.0.into_inner()))
        };
        // The GEMM's own buffers are kept by the threads.
        step(8)?;
        let (before, middle, after, peak, stages) = step(tokens)?;
        let kept = middle.bytes - before.bytes;
        Ok(Self {
            stages,
            kept: kept as f64 / 2.,
            beyond: (peak - middle.bytes) as f64,
            forward: (middle.arrays - before.arrays) / 2,
            backward: (after.arrays - middle.arrays) / 2,
        })
    }

    fn operations(&self) -> f64 {
        (self.forward + self.backward) as f64
    }
}

fn print_stages(shape: &Shape, tokens: usize, lora: &Step, candle: Option<&Step>) {
    println!("\n{}, {tokens} tokens, r {RANK}, half precision; a layer:\n", shape.name);
    println!("| operation | kept, MiB | composed | operations in the forward | composed |");
    println!("|---|---|---|---|---|");
    for (name, count) in &lora.stages {
        let other = candle.and_then(|step| step.stages.iter().find(|(of, _)| of == name));
        let other = other.map(|(_, count)| count);
        println!(
            "| {name} | {:.2} | {} | {} | {} |",
            count.bytes as f64 / 2. / MIB,
            other.map_or("-".into(), |count| format!("{:.2}", count.bytes as f64 / 2. / MIB)),
            count.arrays / 2,
            other.map_or("-".into(), |count| (count.arrays / 2).to_string()),
        );
    }
}

fn print_model(shape: &Shape, tokens: usize, layer: &Step) -> Result<()> {
    const GIB: f64 = (1 << 30) as f64;
    let layers = shape.layers as f64;
    let weights: usize = shape.linears().iter().map(|(_, out, inputs)| out * inputs).sum();
    // A table and a head.
    let values = layers * weights as f64 + (2 * shape.vocabulary * shape.hidden) as f64;
    let (half, blocks) = (2. * values, 4.5 / 8. * values);
    let ranks: usize = shape.linears().iter().map(|(_, out, inputs)| RANK * (out + inputs)).sum();
    // In F32: the factors, their gradients and two moments.
    let adapter = 4. * 4. * layers * ranks as f64;
    let (kept, input) = (layers * layer.kept, (2 * tokens * shape.hidden) as f64);
    let checkpointed = layers * input + layer.kept;
    let head = head(shape, tokens.min(2048))?;
    let largest = shape.linears().iter().map(|(_, out, inputs)| 2 * out * inputs).max();
    // A step's peak is in the last layer's backward or in the head.
    let beyond = layer.beyond.max(head);
    let whole = half + adapter + kept + beyond;
    let small = blocks + adapter + checkpointed + beyond + largest.unwrap_or(0) as f64;
    let columns = [half, blocks, adapter, kept, checkpointed, layer.beyond, head, whole, small];
    let columns = columns.map(|bytes| format!("{:.2}", bytes / GIB)).join(" | ");
    println!("| {} | {tokens} | {columns} |", shape.name);
    Ok(())
}

/// The peak of a head's loss, forward and backward.
fn head(shape: &Shape, tokens: usize) -> Result<f64> {
    let device = &Device::Cpu;
    let head = Tensor::zeros((shape.vocabulary, shape.hidden), DTYPE, device)?;
    let vb = candle_nn::VarBuilder::from_tensors(
        [("weight".to_owned(), head)].into_iter().collect(),
        DTYPE,
        device,
    );
    let head = loralib::linear_no_bias(shape.hidden, shape.vocabulary, LoraConfig::default(), vb)?;
    let x = Var::zeros((1, tokens, shape.hidden), DTYPE, device)?;
    let labels = Tensor::zeros((1, tokens), DType::U32, device)?;
    peak();
    let before = now();
    drop(linear_cross_entropy(&x, &head, &labels)?.backward()?);
    Ok((peak() - before.bytes) as f64)
}

/// The peak of attention alone beyond its arguments, its output and their gradients.
fn attention(tokens: usize) -> Result<f64> {
    let new = |heads: usize| {
        let x = Tensor::rand(-1f32, 1., (1, tokens, heads, 128), &Device::Cpu)?;
        Var::from_tensor(&x.to_dtype(DTYPE)?)
    };
    let (q, k, v) = (new(4)?, new(1)?, new(1)?);
    peak();
    let before = now();
    let y = flash_attn(&q, &k, &v, 0.1, true)?;
    let grads = y.sum_all()?.backward()?;
    let held = now();
    drop(grads);
    Ok((peak() - held.bytes.max(before.bytes)) as f64)
}
