//! A sentence encoder learns which texts belong together, and one base serves many adapters in a batch.
//!
//! `cargo run --release -p embed` takes seconds with a tiny random BERT; `-- MODEL TRAIN VALID` takes all-MiniLM-L6-v2's
//! folder from the Hugging Face hub, or another BERT's, and lines of {"anchor": "..", "positive": ".."}.

mod base;
mod bert;
#[expect(dead_code, reason = "`finetune` reads more of the lines")]
#[path = "../../common/corpus.rs"]
mod corpus;
mod encoder;
#[path = "../../common/rng.rs"]
mod rng;
mod serve;

use base::Base;
use bert::Bert;
use candle_core::Tensor;
use candle_nn::{Optimizer, ParamsAdamW};
use encoder::Encoder;
use loralib::adapter::{Adapter, AdapterConfig};
use loralib::train::{contrastive_loss, matryoshka_loss, normalize, AdamW, Schedule};
use loralib::{Adapters, LoraConfig};
use std::{collections::HashSet, env, path::Path, sync::Arc};
use tokenizers::{PaddingParams, TruncationParams};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
type Pair = [String; 2];

/// Pairs in a batch, and texts whose activations are in memory at a time.
const BATCH: usize = 128;
const PART: usize = 32;
const OUT: &str = "target/embed";

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    env::set_var("RUST_LIB_BACKTRACE", "0"); // nothing to whoever mistyped a path
    let args: Vec<_> = env::args().skip(1).collect();
    let (base, train, valid, steps, lr) = match &args[..] {
        [] => {
            let (train, valid) = base::cafes()?;
            (base::tiny(&train)?, train, valid, 40, 5e-3)
        }
        [model, train, valid] => {
            let [train, valid] = [train, valid].map(|path| base::pairs(path));
            (base::read(Path::new(model))?, train?, valid?, 60, 5e-4)
        }
        _ => return Err("expected MODEL TRAIN VALID, or nothing".into()),
    };
    let Base { name, config, mut tokenizer, weights } = base;
    tokenizer.with_padding(Some(PaddingParams::default()));
    tokenizer.with_truncation(Some(TruncationParams { max_length: 128, ..Default::default() }))?;
    // The model is built once. Each forward chooses its adapter, or one for each text.
    let adapters = Adapters::new();
    let bert = Bert::new(&config, adapters.var_builder(weights))?;
    let encoder = Arc::new(Encoder { tokenizer, bert });
    let adapter = Adapter::new(AdapterConfig {
        base_model_name_or_path: Some(name),
        task_type: Some("FEATURE_EXTRACTION".to_owned()),
        ..LoraConfig { r: 16, lora_alpha: 32., ..Default::default() }.into()
    });
    let adapter = adapter.targets("all-linear").seed(0);
    adapters.add("trained", &adapter)?;

    println!("before: {}", adapters.with_none(|| recall(&encoder, &valid))?);
    let mut opt =
        AdamW::new(adapter.vars()?, ParamsAdamW { weight_decay: 0., ..Default::default() })?;
    let (mut rng, schedule) = (rng::Rng::new(0), Schedule::Linear { warmup: steps / 10, steps });
    for step in 0..steps {
        let mut pairs = train.clone();
        rng.shuffle(&mut pairs);
        let [anchors, positives] = different(&pairs, BATCH);
        let loss = adapters.with("trained", || loss(&encoder, &adapter, &anchors, &positives))?;
        let grads = loss.backward()?;
        if step == 0 {
            adapter.require_grads(&grads)?; // no operation of the model cuts the graph
        }
        opt.set_learning_rate(lr * schedule.factor(step + 1));
        opt.step(&grads)?;
        if step % 10 == 9 {
            println!("step {}: loss {:.3}", step + 1, loss.to_scalar::<f32>()?);
        }
    }
    adapter.eval()?;
    println!("after: {}", adapters.with("trained", || recall(&encoder, &valid))?);
    adapter.save_pretrained(OUT)?;
    println!(
        "saved to {OUT}: PeftModel.from_pretrained or SentenceTransformer.load_adapter reads it"
    );
    serve::serve(&encoder, &adapters, &valid)
}

/// The contrastive loss of all values of the embeddings, of their first half and of their first quarter. The backward runs
/// the model again on one part of the texts at a time: cached gradients.
fn loss(
    encoder: &Arc<Encoder>,
    adapter: &Adapter,
    anchors: &[&str],
    positives: &[&str],
) -> Result<Tensor> {
    let parts = anchors.chunks(PART).chain(positives.chunks(PART)).map(|texts| {
        let ((ids, mask), encoder) = (encoder.tokens(texts)?, encoder.clone());
        Ok(adapter.checkpoint("", &ids, move |ids| encoder.embed(ids, &mask))?)
    });
    let embedded = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
    let (count, d) = (anchors.len(), embedded.dim(1)?);
    let (anchors, positives) = (embedded.narrow(0, 0, count)?, embedded.narrow(0, count, count)?);
    Ok(matryoshka_loss(&anchors, &positives, &[d, d / 2, d / 4], |a, b| {
        contrastive_loss(a, b, 0.05)
    })?)
}

/// How many anchors have their own positive as the nearest, and among the nearest ten.
fn recall(encoder: &Encoder, pairs: &[Pair]) -> Result<String> {
    let [anchors, positives] = different(pairs, pairs.len()).map(|texts| {
        let parts = texts.chunks(PART).map(|texts| Ok(encoder.of(texts)?.detach()));
        normalize(&Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    });
    let cosines = anchors?.matmul(&positives?.t()?)?.to_vec2::<f32>()?;
    let rank = |(i, row): (usize, &Vec<f32>)| row.iter().filter(|cosine| **cosine > row[i]).count();
    let ranks: Vec<_> = cosines.iter().enumerate().map(rank).collect();
    let within = |n| ranks.iter().filter(|rank| **rank < n).count() as f64 / ranks.len() as f64;
    Ok(format!("recall@1 {:.3}, recall@10 {:.3} of {}", within(1), within(10), ranks.len()))
}

/// At most `most` pairs without a text twice: it would be its own negative.
fn different(pairs: &[Pair], most: usize) -> [Vec<&str>; 2] {
    let (mut seen, mut kept) = (HashSet::new(), [vec![], vec![]]);
    for [anchor, positive] in pairs {
        if kept[0].len() < most && !seen.contains(anchor) && !seen.contains(positive) {
            seen.extend([anchor, positive]);
            kept[0].push(anchor.as_str());
            kept[1].push(positive.as_str());
        }
    }
    kept
}
