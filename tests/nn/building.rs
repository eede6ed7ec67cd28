//! Models that are built over a base: in parallel, of many layers, and after the base is gone.

use crate::adapter::CFG;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use loralib::base::half_var_builder;
use loralib::nn::{linear_no_bias, Linear};
use loralib::{Adapter, Adapters, LoraConfig, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const CPU: Device = Device::Cpu;

/// A file of matrices in F16, `layers.0.weight` and so on.
fn half(path: &Path, matrices: usize, dims: (usize, usize)) -> Result<()> {
    let matrix = |i| Ok((format!("layers.{i}.weight"), Tensor::ones(dims, DType::F16, &CPU)?));
    let all = (0..matrices).map(matrix).collect::<Result<HashMap<_, _>>>()?;
    Ok(candle_core::safetensors::save(&all, path)?)
}

/// A matrix is checked by a parallel loop, whose thread may build another layer meanwhile.
#[test]
fn layers_are_built_in_parallel() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    half(&path, 12, (1024, 512))?;
    for threads in [2, 4, 8] {
        let (done, is_done) = mpsc::channel();
        let path = path.clone();
        thread::spawn(move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let build = || -> Result<()> {
                for _ in 0..6 {
                    let adapter = Adapter::new(CFG).targets(["2", "3"]);
                    let vb = adapter.var_builder(half_var_builder(&path, DType::F32, &CPU)?);
                    let layer = |i| linear_no_bias(512, 1024, vb.pp(format!("layers.{}", i % 12)));
                    (0..24).into_par_iter().map(layer).collect::<candle_core::Result<Vec<_>>>()?;
                    adapter.check()?;
                    assert_eq!(adapter.adapted(), ["layers.2", "layers.3"]);
                }
                Ok(())
            };
            done.send(pool.install(build)).unwrap();
        });
        let built = is_done.recv_timeout(Duration::from_secs(60));
        built.unwrap_or_else(|_| panic!("{threads} threads are not done after a minute"))?;
    }
    Ok(())
}

fn many(targets: usize, vb: &VarBuilder) -> Result<Vec<Linear>> {
    Ok((0..targets).map(|i| linear_no_bias(4, 4, vb.pp(i))).collect::<candle_core::Result<_>>()?)
}

/// It was 34 s: each layer went over all that was built before.
#[test]
fn the_time_to_build_is_linear_in_the_targets() -> Result<()> {
    let zeros = || VarBuilder::zeros(DType::F32, &CPU);
    let start = Instant::now();
    let adapter = Adapter::new(CFG).targets("all-linear");
    let _model = many(4000, &adapter.var_builder(zeros()))?;
    adapter.check()?;
    let (adapters, other) = (Adapters::new(), Adapter::new(CFG).targets("all-linear"));
    let _served = many(4000, &adapters.var_builder(zeros()))?;
    adapters.add("other", &other)?;
    let time = start.elapsed();
    assert!(time < Duration::from_secs(10), "{time:?}");
    Ok(())
}

#[test]
#[ignore = "a measurement"]
fn time_to_build() -> Result<()> {
    let zeros = || VarBuilder::zeros(DType::F32, &CPU);
    for targets in [896, 4000, 18_000] {
        let start = Instant::now();
        let adapter = Adapter::new(CFG).targets("all-linear");
        let _model = many(targets, &adapter.var_builder(zeros()))?;
        let built = start.elapsed();
        adapter.check()?;
        let checked = start.elapsed() - built;
        let loaded = Adapter::from_weights(&adapter.weights()?)?;
        let start = Instant::now();
        let _served = many(targets, &loaded.var_builder(zeros()))?;
        let built_loaded = start.elapsed();
        let (adapters, new) = (Adapters::new(), Adapter::new(CFG).targets("all-linear"));
        let _served = many(targets, &adapters.var_builder(zeros()))?;
        let start = Instant::now();
        adapters.add("new", &new)?;
        let added = start.elapsed();
        println!(
            "{targets}: built {built:?}, checked {checked:?}, built over a loaded one {built_loaded:?}, added {added:?}"
        );
    }
    Ok(())
}

/// The matrix of a `VarBuilder` that is gone is an error, and not NaN, whatever its shape.
#[test]
fn a_quantised_weight_that_is_gone_is_an_error() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    for dims in [(3, 4), (1, 4), (3, 1), (1, 1)] {
        half(&path, 1, dims)?;
        let vb = half_var_builder(&path, DType::F32, &CPU)?;
        let weight = vb.get(dims, "layers.0.weight")?;
        let layer = Linear::new(weight.clone(), None);
        drop(vb);
        let x = Tensor::ones((2, dims.1), DType::F32, &CPU)?;
        let y = layer.forward(&x)?.to_vec2::<f32>()?;
        assert_eq!(y, vec![vec![dims.1 as f32; dims.0]; 2]);
        // A tied head, while the layer has the weight, and when nobody has it.
        let tied = Linear::new(layer.weight().clone(), None);
        assert_eq!(tied.forward(&x)?.to_vec2::<f32>()?, y);
        drop((layer, tied));
        let error = Linear::new(weight, None).forward(&x).unwrap_err().to_string();
        assert!(error.contains("is gone"), "{error}");
    }
    Ok(())
}

#[test]
fn a_weight_of_one_repeated_value_is_no_placeholder() -> Result<()> {
    let weight = Tensor::new(0.5f32, &CPU)?.broadcast_as((3, 4))?;
    let layer = loralib::Linear::new(
        candle_nn::Linear::new(weight, None),
        LoraConfig::default(),
        VarBuilder::zeros(DType::F32, &CPU),
    )?;
    let y = layer.forward(&Tensor::ones((1, 4), DType::F32, &CPU)?)?;
    assert_eq!(y.to_vec2::<f32>()?, [[2.; 3]]);
    Ok(())
}
