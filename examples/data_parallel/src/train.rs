//! The run of one rank.

use crate::args::{Args, Fault};
use crate::data::{self, Batch};
use crate::model::{Decoder, Sizes};
use crate::world::World;
use crate::{base, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder};
use loralib::train::{linear_cross_entropy, AdamW, Fingerprint, FlatGrads, Sampler};
use loralib::{Adapter, LoraConfig};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The step, counted from 0, of `--fault`.
const FAULTY: usize = 5;

/// Trains until `--steps`; rank 0 alone prints and writes.
pub fn train(args: &Args, world: &World) -> Result<()> {
    let alike = |here: Fingerprint| {
        let rank_0 = world.broadcast(here.to_json())?;
        world.agree(here.check(&rank_0, "rank 0").map_err(Into::into))
    };
    // Before all that depends on a flag: ranks with other ones would wait for each other.
    alike(Fingerprint::new(&BTreeMap::new())?.with("flags", args)?)?;
    let (rank, device) = (world.rank(), world.device(args.gpu)?);
    let first = rank.index() == 0;
    let text = world.agree(data::text(args.text.as_deref()))?;
    let sequences = data::sequences(&text, args.context)?;
    let mut sampler = Sampler::new(sequences.len(), args.batch, args.seed)?;
    let (adapter, model) = adapted(args, &device)?;
    let vars = adapter.named_vars()?;
    let params = ParamsAdamW { lr: args.lr, ..Default::default() };
    let mut opt = AdamW::named(vars.clone(), params)?;
    // What a run cannot be resumed without: the sequences of each step, the base, and the adapter's strength.
    let origin =
        Fingerprint::default().with("batch", &args.batch)?.with("context", &args.context)?;
    let origin =
        origin.with("seed", &args.seed)?.with("alpha", &args.alpha)?.with("text", &text)?;
    let state = args.out.join("state.safetensors");
    let mut here = Fingerprint::new(&vars)?.with("text", &text)?;
    if args.resume {
        world.agree(resume(&mut opt, &origin, &state))?;
        // The optimizer's moments, too.
        here = world.agree(here.with_file("checkpoint", &state).map_err(Into::into))?;
    }
    alike(here)?;
    if first {
        fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    }
    let flat = FlatGrads::new(vars.clone(), rank)?;
    let (mut times, mut loss, mut bytes) = (Times::default(), f64::NAN, 0);
    for step in opt.steps()..args.steps {
        let start = Instant::now();
        let last = rank.index() + 1 == rank.count();
        let fault = args.fault.filter(|_| last && step == FAULTY);
        adapter.set_dropout_position(rank.dropout_position(step)?)?;
        let samples: Vec<_> = sampler.batch(step).iter().map(|&i| sequences[i]).collect();
        let batch = Batch::new(rank.shard(&samples), &device)?;
        let own = gradients(&model, batch.as_ref(), fault, &device);
        device.synchronize()?;
        let computed = Instant::now();
        // Only so that the exchange is measured without the wait for the slowest rank.
        world.wait();
        let (together, before) = (Instant::now(), world.summed());
        let sum = |part: &Tensor| world.sum(part);
        let (own, mut grads) = match own {
            Ok(own) => own,
            Err(error) => {
                flat.fail(sum)?;
                return Err(error);
            }
        };
        let weight = batch.map_or(0, |batch| batch.predicted) as f64;
        loss = flat.all_reduce(&mut grads, &own, weight, sum)?;
        bytes = world.summed() - before;
        let exchanged = Instant::now();
        opt.step(&grads)?;
        if fault == Some(Fault::Drift) {
            vars.values().try_for_each(|var| var.set(&var.ones_like()?))?;
        }
        times.add(start.elapsed(), together - computed, exchanged - together);
        if opt.steps() % args.every.max(1) == 0 || opt.steps() == args.steps {
            alike(Fingerprint::new(&vars)?)?;
            if first {
                println!("step {}: loss {loss:.4}", opt.steps());
                opt.save(&state, &origin.to_json())?;
            }
        }
    }
    if first {
        adapter.save(args.out.join("adapter.safetensors"))?;
        let [step, wait, exchange] = times.medians();
        let report = json!({
            "ranks": rank.count(),
            "steps": opt.steps(),
            "loss": loss,
            "bytes": bytes,
            "step_ms": step,
            "wait_ms": wait,
            "exchange_ms": exchange,
        });
        println!("{report}");
        fs::write(args.out.join("report.json"), format!("{report:#}\n"))?;
    }
    Ok(())
}

/// Loads a checkpoint of a run with the same `origin`.
fn resume(opt: &mut AdamW, origin: &Fingerprint, state: &Path) -> Result<()> {
    let saved: String = opt.load(state)?;
    Ok(origin.check(&saved, &state.display().to_string())?)
}

/// The loss of a batch with its gradients; a constant without a batch.
fn gradients(
    model: &Decoder,
    batch: Option<&Batch>,
    fault: Option<Fault>,
    device: &Device,
) -> Result<(Tensor, GradStore)> {
    let loss = match batch {
        Some(batch) => {
            linear_cross_entropy(&model.hidden(&batch.ids)?, &model.head, &batch.labels)?
        }
        None => Tensor::zeros((), DType::F32, device)?,
    };
    let loss = match fault {
        Some(Fault::Nan) => (loss * f64::NAN)?,
        Some(Fault::Error) => return Err("as --fault asks".into()),
        _ => loss,
    };
    let grads = loss.backward()?;
    Ok((loss, grads))
}

/// The base with an adapter for its attention.
fn adapted(args: &Args, device: &Device) -> Result<(Adapter, Decoder)> {
    let sizes = Sizes { width: args.width, layers: args.layers, context: args.context };
    let cfg = LoraConfig {
        r: args.r,
        lora_alpha: args.alpha,
        lora_dropout: args.dropout,
        ..Default::default()
    };
    let adapter = Adapter::new(cfg).targets(["q", "k", "v", "o"]).seed(args.seed);
    let base = VarBuilder::from_tensors(base::tensors(sizes, args.seed)?, DType::F32, device);
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
