//! Runs whose ranks are threads, against one process with the whole batch.

mod exchange;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder};
use loralib::train::{AdamW, Fingerprint, FlatGrads, Process, Sampler};
use loralib::{nn, Adapter, LoraConfig, Result};
use std::sync::{Barrier, Mutex};
use std::thread;

const SAMPLES: usize = 30;
/// Not a multiple of 2, 3 or 4, and the last batch of an epoch is smaller than 4 ranks.
const BATCH: usize = 9;
const STEPS: usize = 50;

/// These rows of a fixed matrix of `width` columns.
fn wave(width: usize, frequency: f32, rows: impl Iterator<Item = usize>) -> Result<Tensor> {
    let rows =
        rows.map(|i| (0..width).map(|j| ((i * width + j) as f32 * frequency).sin()).collect());
    Ok(Tensor::new(rows.collect::<Vec<Vec<f32>>>(), &Device::Cpu)?)
}

/// Two adapted layers over a frozen base that is the same for all.
struct Model {
    adapter: Adapter,
    up: nn::Linear,
    down: nn::Linear,
}

impl Model {
    fn new(dropout: f32) -> Result<Self> {
        let cfg = LoraConfig { r: 3, lora_alpha: 6., lora_dropout: dropout, ..Default::default() };
        let adapter = Adapter::new(cfg).targets(["up", "down"]).seed(11);
        let base = [("up", 8, 16), ("down", 16, 4)].map(|(name, inputs, outputs)| {
            let weight = (wave(inputs, 0.9, 0..outputs)? * 0.5)?;
            let bias = wave(outputs, 0.4, 0..1)?.squeeze(0)?;
            Ok([(format!("{name}.weight"), weight), (format!("{name}.bias"), bias)])
        });
        let base = base.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let vb = adapter.var_builder(VarBuilder::from_tensors(base, DType::F32, &Device::Cpu));
        let up = nn::linear(8, 16, vb.pp("up"))?;
        let down = nn::linear(16, 4, vb.pp("down"))?;
        Ok(Self { adapter, up, down })
    }

    /// The mean over samples and outputs; a constant without samples.
    fn loss(&self, samples: &[usize]) -> Result<Tensor> {
        if samples.is_empty() {
            return Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?);
        }
        let (x, y) =
            (wave(8, 0.7, samples.iter().copied())?, wave(4, 1.3, samples.iter().copied())?);
        Ok((self.down.forward(&self.up.forward(&x)?.tanh()?)? - y)?.sqr()?.mean_all()?)
    }

    fn optimizer(&self) -> Result<AdamW> {
        AdamW::named(self.adapter.named_vars()?, ParamsAdamW { lr: 1e-2, ..Default::default() })
    }

    fn values(&self) -> Result<Vec<f32>> {
        let vars = self.adapter.vars()?;
        let values = vars.iter().map(|var| Ok(var.flatten_all()?.to_vec1::<f32>()?));
        Ok(values.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// Sums in the order of the ranks, as an engine between processes would.
struct Threads {
    barrier: Barrier,
    parts: Mutex<Vec<Option<Tensor>>>,
}

impl Threads {
    fn sum(&self, rank: Process, part: &Tensor) -> candle_core::Result<Tensor> {
        self.parts.lock().unwrap()[rank.index()] = Some(part.copy()?);
        self.barrier.wait();
        let parts: Vec<_> = self.parts.lock().unwrap().iter().flatten().cloned().collect();
        self.barrier.wait();
        parts[1..].iter().try_fold(parts[0].clone(), |sum, part| sum + part)
    }
}

/// What `run` returns on each of `of` ranks, which are threads.
fn ranks<T: Send>(of: usize, run: impl Fn(Process, &Threads) -> T + Sync) -> Vec<T> {
    let threads = Threads { barrier: Barrier::new(of), parts: Mutex::new(vec![None; of]) };
    let (run, threads) = (&run, &threads);
    thread::scope(|scope| {
        let spawn = |index| scope.spawn(move || run(Process::new(index, of).unwrap(), threads));
        let all: Vec<_> = (0..of).map(spawn).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Steps `steps` of a rank; gives the last loss.
fn train(
    model: &Model,
    opt: &mut AdamW,
    rank: Process,
    threads: &Threads,
    steps: std::ops::Range<usize>,
) -> Result<f64> {
    let flat = FlatGrads::new(model.adapter.named_vars()?, rank)?;
    let (mut sampler, mut last) = (Sampler::new(SAMPLES, BATCH, 1)?, f64::NAN);
    for step in steps {
        model.adapter.set_dropout_position(rank.dropout_position(step)?)?;
        let samples = rank.shard(sampler.batch(step));
        let loss = model.loss(samples)?;
        let mut grads = loss.backward()?;
        let sum = |part: &Tensor| threads.sum(rank, part);
        last = flat.all_reduce(&mut grads, &loss, samples.len() as f64, sum)?;
        opt.step(&grads)?;
    }
    Ok(last)
}

/// The norm of the difference by that of `b`.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

#[test]
fn any_number_of_ranks_trains_what_one_process_does() -> Result<()> {
    let whole = Model::new(0.)?;
    let (mut opt, mut sampler) = (whole.optimizer()?, Sampler::new(SAMPLES, BATCH, 1)?);
    let mut expected = f64::NAN;
    for step in 0..STEPS {
        let loss = whole.loss(sampler.batch(step))?;
        opt.backward_step(&loss)?;
        expected = f64::from(loss.to_scalar::<f32>()?);
    }
    for of in 1..=4 {
        let runs = ranks(of, |rank, threads| -> Result<_> {
            let model = Model::new(0.)?;
            let loss = train(&model, &mut model.optimizer()?, rank, threads, 0..STEPS)?;
            Ok((loss, model.values()?))
        });
        let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
        assert!(runs.iter().all(|run| *run == runs[0]), "{of} ranks are not equal to the bit");
        let (loss, values) = &runs[0];
        let (loss, values) = ((loss / expected - 1.).abs(), apart(values, &whole.values()?));
        println!("{of} ranks: loss {loss:.1e}, adapter {values:.1e} from one process");
        assert!(loss < 1e-6 && values < 1e-6, "{of} ranks: loss {loss:e}, adapter {values:e}");
    }
    Ok(())
}

#[test]
fn a_run_resumes_on_another_number_of_ranks() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("state.safetensors");
    let run = |of: usize, from: usize, to: usize, dropout: f32| -> Result<Vec<f32>> {
        let runs = ranks(of, |rank, threads| -> Result<_> {
            let model = Model::new(dropout)?;
            let mut opt = model.optimizer()?;
            if from > 0 {
                opt.load::<()>(&path)?;
            }
            let steps = opt.steps()..to;
            assert_eq!(steps.start, from);
            train(&model, &mut opt, rank, threads, steps)?;
            threads.barrier.wait();
            if rank.index() == 0 {
                opt.save(&path, &())?;
            }
            model.values()
        });
        Ok(runs.into_iter().collect::<Result<Vec<_>>>()?.swap_remove(0))
    };
    let whole = run(2, 0, 20, 0.)?;
    run(2, 0, 7, 0.)?;
    run(3, 7, 13, 0.)?;
    let values = apart(&run(1, 13, 20, 0.)?, &whole);
    assert!(values < 1e-6, "{values:e}");
    // With dropout, on the same number of ranks, to the bit.
    let whole = run(3, 0, 20, 0.3)?;
    run(3, 0, 7, 0.3)?;
    assert_eq!(run(3, 7, 20, 0.3)?, whole);
    Ok(())
}

#[test]
fn ranks_draw_masks_of_their_own() -> Result<()> {
    let loss = |index: usize, step: usize| -> Result<f32> {
        let model = Model::new(0.5)?;
        // At initialisation lora_B is zero, and dropout has no effect.
        for (name, var) in model.adapter.named_vars()? {
            if name.ends_with("lora_B") {
                var.set(&var.ones_like()?)?;
            }
        }
        model.adapter.set_dropout_position(Process::new(index, 3)?.dropout_position(step)?)?;
        Ok(model.loss(&[0, 1, 2])?.to_scalar()?)
    };
    assert_eq!(loss(1, 4)?, loss(1, 4)?);
    assert!(loss(1, 4)? != loss(2, 4)? && loss(1, 4)? != loss(1, 5)?);
    Ok(())
}

#[test]
fn equal_seeds_give_equal_fingerprints() -> Result<()> {
    let of = || Fingerprint::new(&Model::new(0.)?.adapter.named_vars()?);
    of()?.check(&of()?.to_json(), "rank 0")
}
