//! A choice in the tasks of rayon's pools. A worker that waits for a part of a product runs other tasks of its pool
//! meanwhile, which must not compute with its choice.

use super::cfg;
use crate::adapter::randomize;
use crate::common::{difference, fused, randn};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Optimizer, ParamsAdamW};
use loralib::adapter::Choice;
use loralib::nn::{linear_no_bias, Linear};
use loralib::train::AdamW;
use loralib::{Adapter, Adapters, LoraConfig, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Mutex};
use std::thread;
use std::time::Duration;

const WIDTH: usize = 192;
const THREADS: [usize; 3] = [2, 4, 8];
const TASKS: usize = 1500;
/// While a worker waits for another pool it starts further tasks, each on top of the last.
const TASKS_THAT_WAIT: usize = 60;

/// Products of this crate and of candle, both large enough for several threads.
#[derive(Clone)]
struct Model(Linear, Linear);

impl Module for Model {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.0.forward(x)?;
        let p = (x.matmul(&x.t()?)? / WIDTH as f64)?.tanh()?;
        self.1.forward(&p.matmul(&x)?)
    }
}

fn base() -> Result<candle_nn::VarBuilder<'static>> {
    let weight =
        || Ok::<_, loralib::Error>((randn(&[WIDTH, WIDTH], DType::F32, &Device::Cpu)? / 10.)?);
    let tensors = HashMap::from([("0.weight".into(), weight()?), ("1.weight".into(), weight()?)]);
    Ok(candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

fn model(vb: candle_nn::VarBuilder) -> Result<Model> {
    Ok(Model(linear_no_bias(WIDTH, WIDTH, vb.pp(0))?, linear_no_bias(WIDTH, WIDTH, vb.pp(1))?))
}

fn input() -> Result<Tensor> {
    Ok(randn(&[128, WIDTH], DType::F32, &Device::Cpu)?)
}

/// A set with the adapters "a" and "b", its model, and an input.
fn served() -> Result<(Adapters, Model, Tensor)> {
    let adapters = Adapters::new();
    let model = model(adapters.var_builder(base()?))?;
    for name in ["a", "b"] {
        let adapter = Adapter::new(cfg(4, 8.)).targets(["0", "1"]);
        adapters.add(name, &adapter)?;
        randomize(&adapter)?;
    }
    Ok((adapters, model, input()?))
}

/// Runs `f` in pools of several sizes, with a limit of time for all.
fn in_pools(f: impl Fn() -> Result<()> + Send + Sync + 'static) {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        for threads in THREADS {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(&f).unwrap();
        }
        done.send(()).unwrap();
    });
    let limit = Duration::from_secs(60);
    assert_eq!(is_done.recv_timeout(limit), Ok(()), "a task failed, or waits for ever");
}

/// Runs tasks, which tell whether they are right. All of them wait in the pool from the start.
fn all_right(tasks: usize, task: impl Fn(usize) -> Result<bool> + Send + Sync) -> Result<()> {
    let (wrong, error) = (AtomicUsize::new(0), Mutex::new(None));
    rayon::scope(|scope| {
        for i in 0..tasks {
            let (task, wrong, error) = (&task, &wrong, &error);
            scope.spawn(move |_| match task(i) {
                Ok(right) => drop(wrong.fetch_add(usize::from(!right), Ordering::Relaxed)),
                Err(e) => drop(error.lock().unwrap().replace(e)),
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0, "of {tasks} with {} threads", rayon::current_num_threads());
    error.into_inner().unwrap().map_or(Ok(()), Err)
}

fn near(x: &Tensor, expected: &Tensor) -> Result<bool> {
    Ok(difference(x, expected)? < 1e-4)
}

#[test]
fn tasks_compute_with_their_own_choice() -> Result<()> {
    let (adapters, model, x) = served()?;
    let forward = move || model.forward(&x);
    let expected = [
        forward()?,
        adapters.with("a", &forward)?,
        adapters.with("b", &forward)?,
        adapters.with([("a", 0.5), ("b", 1.)], &forward)?,
    ];
    assert!(!near(&expected[0], &expected[1])? && !near(&expected[1], &expected[2])?);
    in_pools(move || {
        all_right(TASKS, |i| {
            let y = match i % 6 {
                0 => adapters.with("a", &forward),
                1 => adapters.with("b", &forward),
                2 => adapters.with([("a", 0.5), ("b", 1.)], &forward),
                3 => adapters.with("a", || adapters.with_none(&forward)),
                _ => Ok(forward()?),
            };
            near(&y?, &expected[if i % 6 > 2 { 0 } else { i % 6 + 1 }])
        })
    });
    Ok(())
}

#[test]
fn a_policy_computes_with_its_adapter_beside_its_reference() -> Result<()> {
    let adapter = Adapter::new(cfg(4, 8.)).targets(["0", "1"]);
    let model = model(adapter.var_builder(base()?))?;
    randomize(&adapter)?;
    let x = input()?;
    let (policy, reference) = (model.forward(&x)?, adapter.disabled(|| model.forward(&x))?);
    assert!(!near(&policy, &reference)?);
    in_pools(move || {
        all_right(TASKS, |_| {
            let forward = || model.forward(&x);
            let (y, z) = rayon::join(forward, || adapter.disabled(forward));
            Ok(near(&y?, &policy)? && near(&z?, &reference)?)
        })
    });
    Ok(())
}

/// In a pool the tasks that a closure starts have its choice; from another thread they have that which they are given.
#[test]
fn parts_of_a_closure_compute_alike() -> Result<()> {
    let (adapters, model, x) = served()?;
    let forward = move || model.forward(&x);
    let (plain, chosen) = (forward()?, adapters.with("a", &forward)?);
    let count = move |parts: Vec<Tensor>, expected: &Tensor| -> Result<usize> {
        parts.iter().map(|y| Ok(usize::from(near(y, expected)?))).sum()
    };
    let parts = {
        let forward = forward.clone();
        move || (0..64).into_par_iter().map(|_| forward()).collect::<candle_core::Result<Vec<_>>>()
    };
    let carried = {
        let forward = forward.clone();
        move || {
            let choice = Choice::current();
            let forward = || choice.run(|| -> Result<_> { Ok(forward()?) });
            (0..64).into_par_iter().map(|_| forward()).collect::<Result<Vec<_>>>()
        }
    };
    assert_eq!(count(adapters.with("a", &parts)?, &plain)?, 64);
    assert_eq!(count(adapters.with("a", &carried)?, &chosen)?, 64);
    in_pools(move || {
        (0..8).into_par_iter().try_for_each(|_| -> Result<()> {
            let (inside, outside) = rayon::join(|| adapters.with("a", &parts), &parts);
            assert_eq!(count(inside?, &chosen)?, 64);
            assert_eq!(count(outside?, &plain)?, 64);
            assert_eq!(count(adapters.with("a", &carried)?, &chosen)?, 64);
            Ok(())
        })
    });
    Ok(())
}

#[test]
fn a_choice_holds_in_pools_within_pools() -> Result<()> {
    let (adapters, model, x) = served()?;
    let forward = move || model.forward(&x);
    let (plain, chosen) = (forward()?, adapters.with("a", &forward)?);
    let inner = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    in_pools(move || {
        all_right(TASKS_THAT_WAIT, |i| {
            let y = match i % 3 {
                0 => inner.install(|| adapters.with("a", &forward))?,
                1 => adapters.with("a", || {
                    let choice = Choice::current();
                    inner.install(|| choice.run(&forward))
                })?,
                _ => inner.install(&forward)?,
            };
            near(&y, if i % 3 == 2 { &plain } else { &chosen })
        })
    });
    Ok(())
}

#[test]
fn a_checkpointed_backward_runs_again_with_its_choice() -> Result<()> {
    let (adapters, model, x) =
        (Adapters::new(), Adapter::new(cfg(4, 8.)).targets(["0", "1"]), input()?);
    let (adapter, model) =
        (model, std::sync::Arc::new(self::model(adapters.var_builder(base()?))?));
    adapters.add("a", &adapter)?;
    randomize(&adapter)?;
    let plain = model.forward(&x)?;
    let vars = adapter.vars()?;
    let grads = {
        let (adapters, adapter, model, x) = (adapters, adapter, model.clone(), x.clone());
        move || -> Result<GradStore> {
            let segment = {
                let model = model.clone();
                move |x: &Tensor| model.forward(x)
            };
            let y = adapters.with("a", || adapter.checkpoint("", &x, segment))?;
            Ok(y.sqr()?.sum_all()?.backward()?)
        }
    };
    let of = move |grads: &GradStore| vars.iter().map(|v| grads.get(v).unwrap().clone()).collect();
    let expected: Vec<Tensor> = of(&grads()?);
    in_pools(move || {
        all_right(TASKS, |i| match i % 8 {
            0 => {
                let grads: Vec<Tensor> = of(&grads()?);
                let mut pairs = grads.iter().zip(&expected);
                pairs.try_fold(true, |all, (g, e)| {
                    let scale = e.abs()?.max_all()?.to_scalar::<f32>()?;
                    Ok(all && difference(g, e)? < f64::from(scale) * 1e-4)
                })
            }
            _ => near(&model.forward(&x)?, &plain),
        })
    });
    Ok(())
}

/// An optimizer writes variables while other tasks compute with them: no lock is held where a task may be run.
#[test]
fn a_step_runs_beside_forwards() -> Result<()> {
    // candle's kernels hold the lock of a variable while they wait for the pool: only devices use them on variables.
    if !fused() {
        return Ok(());
    }
    let (width, rows) = (512, 64);
    let weight = (randn(&[width, width], DType::F32, &Device::Cpu)? / 30.)?;
    let tensors = HashMap::from([("fc.weight".to_owned(), weight)]);
    let base = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let adapter = Adapter::new(cfg(64, 8.)).targets(["fc"]);
    let layer = linear_no_bias(width, width, adapter.var_builder(base).pp("fc"))?;
    let x = randn(&[rows, width], DType::F32, &Device::Cpu)?;
    let grads = layer.forward(&x)?.sqr()?.mean_all()?.backward()?;
    in_pools(move || {
        (0..2000).into_par_iter().try_for_each(|i| -> Result<()> {
            if i % 2 == 0 {
                layer.forward(&x)?.mean_all()?.backward()?;
                return Ok(());
            }
            let params = ParamsAdamW { lr: 1e-5, ..Default::default() };
            Ok(AdamW::named(adapter.named_vars()?, params)?.step(&grads)?)
        })
    });
    Ok(())
}

/// In evaluation layers compute with copies of the values at `eval()`.
#[test]
fn a_step_runs_beside_forwards_in_evaluation_that_are_not_merged() -> Result<()> {
    let width = 512;
    let weight = (randn(&[width, width], DType::F32, &Device::Cpu)? / 30.)?;
    let tensors = HashMap::from([("fc.weight".to_owned(), weight)]);
    let base = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let adapter = Adapter::new(LoraConfig { merge_weights: false, ..cfg(64, 8.) }).targets(["fc"]);
    let layer = linear_no_bias(width, width, adapter.var_builder(base).pp("fc"))?;
    let x = randn(&[128, width], DType::F32, &Device::Cpu)?;
    let grads = layer.forward(&x)?.sqr()?.mean_all()?.backward()?;
    adapter.eval()?;
    let expected = layer.forward(&x)?;
    in_pools(move || {
        (0..600).into_par_iter().try_for_each(|i| -> Result<()> {
            if i % 2 == 0 {
                assert!(near(&layer.forward(&x)?, &expected)?, "the values at `eval()`");
                return Ok(());
            }
            let params = ParamsAdamW { lr: 1e-3, ..Default::default() };
            Ok(AdamW::named(adapter.named_vars()?, params)?.step(&grads)?)
        })
    });
    Ok(())
}

/// A backward of candle's needs a stack as deep as the graph.
#[test]
fn a_choice_in_a_pool_has_a_deep_stack() -> Result<()> {
    let (adapters, model, x) = served()?;
    let deep = || -> Result<usize> {
        let mut y = model.forward(&x)?.mean_all()?;
        for _ in 0..10_000 {
            y = (y * 1.0001)?;
        }
        Ok(y.backward()?.get_ids().count())
    };
    assert!(rayon::scope(|_| adapters.with("a", deep))? > 0);
    Ok(())
}

#[test]
fn layers_are_built_in_parallel_over_a_half_precision_base() -> Result<()> {
    let (folder, layers, width) = (tempfile::tempdir()?, 40, 256);
    let path = folder.path().join("model.safetensors");
    let weight = randn(&[width, width], DType::F32, &Device::Cpu)?.to_dtype(DType::BF16)?;
    let tensors = (0..layers).map(|i| (format!("{i}.weight"), weight.clone()));
    candle_core::safetensors::save(&tensors.collect::<HashMap<_, _>>(), &path)?;
    in_pools(move || {
        let _kept = &folder;
        let base = loralib::base::half_var_builder(&path, DType::F32, &Device::Cpu)?;
        let adapter = Adapter::new(cfg(2, 3.)).targets("all-linear");
        let (vb, x) =
            (adapter.var_builder(base), Tensor::ones((8, width), DType::F32, &Device::Cpu)?);
        (0..4 * layers).into_par_iter().try_for_each(|i| -> Result<()> {
            let layer = linear_no_bias(width, width, vb.pp(i % layers))?;
            layer.forward(&x)?;
            Ok(())
        })?;
        adapter.check()
    });
    Ok(())
}

#[test]
fn a_closure_that_stays_on_its_thread_is_refused_in_a_pool() -> Result<()> {
    let (adapters, model, x) = served()?;
    let choice = adapters.choice("a")?;
    let local = std::cell::RefCell::new(0);
    let y = choice.run_local(|| -> Result<_> {
        *local.borrow_mut() += 1;
        Ok(model.forward(&x)?)
    })?;
    assert!(near(&y, &choice.run(|| model.forward(&x))?)?);
    let error = rayon::scope(|_| choice.run_local(|| model.forward(&x)).unwrap_err());
    assert!(error.to_string().contains("a worker of a rayon pool"), "{error}");
    Ok(())
}

#[test]
fn a_set_can_require_a_choice() -> Result<()> {
    let (adapters, model, x) = served()?;
    adapters.require_choice(true);
    let error = model.forward(&x).unwrap_err().to_string();
    assert!(error.contains("no adapter is chosen on this thread"), "{error}");
    adapters.with_none(|| model.forward(&x))?;
    adapters.with("a", || model.forward(&x))?;
    // The parts of a closure on a thread of no pool have none.
    let parts = || (0..2).into_par_iter().try_for_each(|_| model.forward(&x).map(drop));
    assert!(adapters.with("a", parts).is_err());
    adapters.require_choice(false);
    model.forward(&x)?;
    Ok(())
}

#[test]
fn a_panic_reaches_the_caller_and_leaves_no_choice() -> Result<()> {
    let (adapters, model, x) = served()?;
    let plain = model.forward(&x)?;
    let panics = || adapters.with("a", || -> Result<()> { panic!("stop") });
    let caught = rayon::scope(|_| std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)));
    assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "stop");
    let y = rayon::scope(|_| adapters.with("b", || adapters.with_none(|| model.forward(&x))))?;
    assert!(near(&y, &plain)?);
    Ok(())
}
