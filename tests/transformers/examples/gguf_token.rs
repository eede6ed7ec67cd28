//! One token of a Llama over a GGUF file: the copied model on `lora::nn` with an adapter (r 8 on all linear
//! layers) in evaluation, beside candle-transformers' own quantised model without one.
//!
//! `cargo run --release --example gguf_token -- FILE [TOKENS]` prints the medians of alternating tokens and of
//! their ratios; `... FILE load` prints the memory after loading and after a token. With a format such as Q4K in place
//! of FILE the model is a random one, of 12 layers of 1024.

use candle::quantized::gguf_file::{write, Content, Value};
use candle::quantized::{GgmlDType, QTensor};
use candle::{DType, Device, Result, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use loralib::{gguf, Adapter, LoraConfig};
use std::path::Path;
use std::time::Instant;
use transformers::models::llama::{Cache, Llama, LlamaConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tokens before those that are timed.
const PROMPT: usize = 16;

fn tokens(from: usize, count: usize, device: &Device) -> Result<Tensor> {
    let ids = (from..from + count).map(|i| 100 + 7 * i as u32);
    Tensor::from_iter(ids, device)?.unsqueeze(0)
}

/// Writes a random Llama.
fn random(path: &Path, dtype: GgmlDType) -> Result<()> {
    const HEADS: (u32, u32) = (16, 4);
    let (hidden, inner, vocab, layers) = (1024, 2816, 8192, 12);
    let keys = hidden / HEADS.0 as usize * HEADS.1 as usize;
    let mut tensors = vec![];
    let mut add = |name: String, dims: &[usize]| -> Result<()> {
        let (tensor, dtype) = match dims {
            [_] => (Tensor::ones(dims, DType::F32, &Device::Cpu)?, GgmlDType::F32),
            _ => (Tensor::randn(0f32, 0.02, dims, &Device::Cpu)?, dtype),
        };
        tensors.push((name, QTensor::quantize(&tensor, dtype)?));
        Ok(())
    };
    for name in ["token_embd", "output"] {
        add(format!("{name}.weight"), &[vocab, hidden])?;
    }
    add("output_norm.weight".to_owned(), &[hidden])?;
    for i in 0..layers {
        let shapes: [(&str, &[usize]); 9] = [
            ("attn_norm", &[hidden]),
            ("attn_q", &[hidden, hidden]),
            ("attn_k", &[keys, hidden]),
            ("attn_v", &[keys, hidden]),
            ("attn_output", &[hidden, hidden]),
            ("ffn_norm", &[hidden]),
            ("ffn_gate", &[inner, hidden]),
            ("ffn_up", &[inner, hidden]),
            ("ffn_down", &[hidden, inner]),
        ];
        for (name, dims) in shapes {
            add(format!("blk.{i}.{name}.weight"), dims)?;
        }
    }
    let metadata = [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.block_count", Value::U32(layers)),
        ("llama.context_length", Value::U32(2048)),
        ("llama.embedding_length", Value::U32(hidden as u32)),
        ("llama.feed_forward_length", Value::U32(inner as u32)),
        ("llama.attention.head_count", Value::U32(HEADS.0)),
        ("llama.attention.head_count_kv", Value::U32(HEADS.1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.dimension_count", Value::U32(hidden as u32 / HEADS.0)),
        ("llama.rope.freq_base", Value::F32(10_000.)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&mut std::fs::File::create(path)?, &metadata, &tensors)
}

/// Computes the logits of the tokens from a position on.
type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

fn ours(path: &Path, device: &Device) -> Result<Forward> {
    let file = gguf::File::open(path)?;
    let config = file.config::<LlamaConfig>()?.into_config(false);
    let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
    let adapter = Adapter::new(cfg).targets("all-linear");
    let model = Llama::load(adapter.var_builder(file.var_builder(DType::F32, device)?), &config)?;
    adapter.check()?;
    adapter.eval()?;
    let mut cache = Cache::new(true, DType::F32, &config, device)?;
    Ok(Box::new(move |ids, position| model.forward(ids, position, &mut cache)))
}

fn candles(path: &Path, device: &Device) -> Result<Forward> {
    let mut reader = std::fs::File::open(path)?;
    let content = Content::read(&mut reader)?;
    let mut model = ModelWeights::from_gguf(content, &mut reader, device)?;
    Ok(Box::new(move |ids, position| model.forward(ids, position)))
}

/// The resident memory of this process, in MiB.
fn resident() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let of = |key| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or(" ?");
    let kib = |key| of(key).trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(f64::NAN);
    Ok(format!("{:.0} MiB, at most {:.0}", kib("VmRSS:") / 1024., kib("VmHWM:") / 1024.))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or_else(|| candle::Error::msg("FILE is missing"))?;
    let formats =
        [GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K, GgmlDType::Q8_0];
    let path = match formats.into_iter().find(|format| format!("{format:?}") == path) {
        Some(format) => {
            let file = std::env::temp_dir().join(format!("random-{format:?}.gguf"));
            random(&file, format)?;
            file
        }
        None => path.into(),
    };
    let (path, device, count) = (path.as_path(), Device::Cpu, args.next());
    let mut a = ours(path, &device)?;
    if count.as_deref() == Some("load") {
        println!("after loading {}", resident()?);
        a(&tokens(0, 1, &device)?, 0)?;
        println!("after a token {}", resident()?);
        return Ok(());
    }
    let mut b = candles(path, &device)?;
    let prompt = tokens(0, PROMPT, &device)?;
    (a(&prompt, 0)?, b(&prompt, 0)?);
    let (mut lora, mut candle, mut ratios) = (vec![], vec![], vec![]);
    for position in PROMPT..PROMPT + count.and_then(|n| n.parse().ok()).unwrap_or(101) {
        let token = tokens(position, 1, &device)?;
        let time = |forward: &mut Forward| {
            let start = Instant::now();
            forward(&token, position)?.flatten_all()?.get(0)?.to_scalar::<f32>()?;
            Ok::<_, candle::Error>(start.elapsed().as_secs_f64() * 1e3)
        };
        let (x, y) = (time(&mut a)?, time(&mut b)?);
        lora.push(x);
        candle.push(y);
        ratios.push(x / y);
    }
    let (lora, candle, ratio) = (median(lora), median(candle), median(ratios));
    println!("a token: {lora:.1} ms, candle's own model {candle:.1} ms, ratio {ratio:.2}");
    Ok(())
}

fn main() -> Result<()> {
    // As one of rayon's threads: from any other, each parallel loop hands its work over and waits.
    rayon::scope(|_| run())
}
