//! The run of one rank.

use crate::args::Args;
use crate::data::{self, Batch};
use crate::model::{Decoder, Sizes};
use crate::world::World;
use crate::{base, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder};
use loralib::train::{linear_cross_entropy, AdamW, Fingerprint, FlatGrads, Sampler};
use loralib::{Adapter, LoraConfig};
use serde_json::json;
use std::fs;
use std::time::{Duration, Instant};

/// Trains until `--steps`; rank 0 alone prints and writes.
pub fn train(args: &Args, world: &World) -> Result<()> {
    let rank = world.rank();
    let first = rank.index() == 0;
    let text = data::text(args.text.as_deref())?;
    let sequences = data::sequences(&text, args.context)?;
    let mut sampler = Sampler::new(sequences.len(), args.batch, args.seed)?;
    let (adapter, model) = adapted(args)?;
    let vars = adapter.named_vars()?;
    let params = ParamsAdamW { lr: args.lr, ..Default::default() };
    let mut opt = AdamW::named(vars.clone(), params)?;
    let state = args.out.join("state.safetensors");
    if args.resume {
        opt.load::<()>(&state)?;
    }
    let alike = |opt: &AdamW| -> Result<()> {
        let here = Fingerprint::new(&vars)?.with("the flags", args)?.with("the text", &text)?;
        let here = here.with("the number of steps", &opt.steps())?;
        Ok(here.check(&world.broadcast(here.to_json())?)?)
    };
    alike(&opt)?;
    if first {
        fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    }
    let flat = FlatGrads::new(vars.clone())?;
    let (mut times, mut loss) = (Times::default(), f64::NAN);
    for step in opt.steps()..args.steps {
        let start = Instant::now();
        adapter.set_dropout_position(rank.dropout_position(step)?)?;
        let samples: Vec<_> = sampler.batch(step).iter().map(|&i| sequences[i]).collect();
        let batch = Batch::new(rank.shard(&samples))?;
        let own = match &batch {
            Some(batch) => {
                linear_cross_entropy(&model.hidden(&batch.ids)?, &model.head, &batch.labels)?
            }
            None => Tensor::zeros((), DType::F32, &Device::Cpu)?,
        };
        let mut grads = own.backward()?;
        let computed = Instant::now();
        // Only so that the exchange is measured without the wait for the slowest rank.
        world.wait();
        let together = Instant::now();
        let weight = batch.map_or(0, |batch| batch.predicted) as f64;
        loss = flat.all_reduce(&mut grads, &own, weight, |part| world.sum(part))?;
        let exchanged = Instant::now();
        opt.step(&grads)?;
        times.add(start.elapsed(), together - computed, exchanged - together);
        if opt.steps() % args.every.max(1) == 0 || opt.steps() == args.steps {
            alike(&opt)?;
            if first {
                println!("step {}: loss {loss:.4}", opt.steps());
                opt.save(&state, &())?;
            }
        }
    }
    if first {
        adapter.save(args.out.join("adapter.safetensors"))?;
        let [step, wait, exchange] = times.medians();
        let report = json!({
            "ranks": rank.of(),
            "steps": opt.steps(),
            "loss": loss,
            "bytes": flat.bytes(),
            "step_ms": step,
            "wait_ms": wait,
            "exchange_ms": exchange,
        });
        println!("{report}");
        fs::write(args.out.join("report.json"), format!("{report:#}\n"))?;
    }
    Ok(())
}

/// The base with an adapter for its attention.
fn adapted(args: &Args) -> Result<(Adapter, Decoder)> {
    let sizes = Sizes { width: args.width, layers: args.layers, context: args.context };
    let cfg = LoraConfig {
        r: args.rank,
        lora_alpha: args.alpha,
        lora_dropout: args.dropout,
        ..Default::default()
    };
    let adapter = Adapter::new(cfg).targets(["q", "k", "v", "o"]).seed(args.seed);
    let base = VarBuilder::from_tensors(base::tensors(sizes, args.seed)?, DType::F32, &Device::Cpu);
    let model = Decoder::new(sizes, adapter.var_builder(base))?;
    adapter.check()?;
    Ok((adapter, model))
}

/// Of all steps.
#[derive(Default)]
struct Times {
    step: Vec<Duration>,
    wait: Vec<Duration>,
    exchange: Vec<Duration>,
}

impl Times {
    fn add(&mut self, step: Duration, wait: Duration, exchange: Duration) {
        self.step.push(step);
        self.wait.push(wait);
        self.exchange.push(exchange);
    }

    /// In milliseconds.
    fn medians(self) -> [f64; 3] {
        [self.step, self.wait, self.exchange].map(|mut times| {
            times.sort();
            times.get(times.len() / 2).map_or(0., |time| 1e3 * time.as_secs_f64())
        })
    }
}
