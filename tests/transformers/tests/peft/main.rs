//! candle-transformers' models on `lora::nn` against PEFT on torch: the output and the gradient of every
//! adapter; and candle-transformers' own, unmodified models over `Adapter::merged`.
//!
//! `fixtures/peft_models.py` writes the models, adapters and expected values.

mod diffusion;
mod encoders;
mod llama_like;
mod speech_vision;

use candle::{safetensors, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use loralib::Adapter;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::path::Path;

const CPU: Device = Device::Cpu;
/// For the output, the gradients and the merged model's output. torch's own F32 gradients are up to 2e-6 away
/// from its F64 ones here, and `lora::nn`'s up to 3e-6.
const TOLERANCE: [f64; 3] = [2e-6, 5e-6, 2e-6];

type Tensors = HashMap<String, Tensor>;
/// The last argument says whether the model takes its branch of flash attention.
type Forward = fn(VarBuilder, &Config, &Tensors, bool) -> Result<Tensor>;

/// config.json, from which each model reads what it needs.
struct Config(String);

impl Config {
    fn get<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.0).map_err(candle::Error::wrap)
    }
}

struct Case {
    name: &'static str,
    /// Whether it has a branch of flash attention.
    flash: bool,
    /// On `lora::nn`, and candle-transformers' own.
    models: [Forward; 2],
}

/// The same code for the copied models and for candle-transformers'.
#[macro_export]
macro_rules! case {
    ($name:expr, |$vb:pat_param, $config:pat_param, $x:pat_param| $body:expr) => {
        case!($name, false, |$vb, $config, $x, _| $body)
    };
    ($name:expr, $flash:expr, $forward:expr) => {{
        let on_lora: Forward = {
            use transformers::models;
            $forward
        };
        let unmodified: Forward = {
            use candle_transformers::models;
            $forward
        };
        Case { name: $name, flash: $flash, models: [on_lora, unmodified] }
    }};
}

/// Token ids, which torch saves as I64.
fn ids(x: &Tensors, name: &str) -> Result<Tensor> {
    x[name].to_dtype(DType::U32)
}

/// The largest of values without sign; NaN is larger than any other.
fn max(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().max_by(f64::total_cmp).unwrap()
}

/// The largest difference, relative to the largest value of `expected`.
fn difference(actual: &Tensor, expected: &Tensor) -> Result<f64> {
    let abs = |x: &Tensor| x.abs()?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let difference = (actual.reshape(expected.shape())? - expected)?;
    Ok(max(abs(&difference)?) / max(abs(expected)?))
}

/// The same with the branch of flash attention where there is one.
fn compare_branches(case: &Case) -> loralib::Result<(usize, [f64; 3])> {
    let (adapters, found) = compare(case, false)?;
    if !case.flash {
        return Ok((adapters, found));
    }
    let (_, flash) = compare(case, true)?;
    Ok((adapters, std::array::from_fn(|i| max([found[i], flash[i]]))))
}

/// The number of adapters, and the largest differences of output, gradients and the merged model's output.
fn compare(case: &Case, flash: bool) -> loralib::Result<(usize, [f64; 3])> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(case.name);
    let config = Config(std::fs::read_to_string(folder.join("config.json")).unwrap());
    let x = safetensors::load(folder.join("expected.safetensors"), &CPU)?;
    let weights = safetensors::load(folder.join("model.safetensors"), &CPU)?;
    let base = || VarBuilder::from_tensors(weights.clone(), DType::F32, &CPU);
    let [on_lora, unmodified] = case.models;

    let adapter = Adapter::load(&folder, &CPU)?;
    let output = on_lora(adapter.var_builder(base()), &config, &x, flash)?;
    adapter.check()?;
    let batch = output.dim(0)? as f64;
    let grads = (output.reshape(x["G"].shape())? * &x["G"])?.sum_all()?.affine(1. / batch, 0.)?;
    let grads = grads.backward()?;
    assert_eq!(loralib::missing_grads(adapter.var_map(), &grads), Vec::<String>::new());

    let mut found = vec![];
    let vars = adapter.var_map().data().lock().unwrap();
    for (name, expected) in &x {
        if let Some(name) = name.strip_prefix("grad.") {
            found.push(difference(grads.get(&vars[name]).unwrap(), expected)?);
        }
    }
    drop(vars);
    assert_eq!(found.len(), 2 * adapter.adapted().len());

    let merged = unmodified(adapter.merged(base())?, &config, &x, false)?;
    let output = difference(&output, &x["output"])?;
    Ok((adapter.adapted().len(), [output, max(found), difference(&merged, &x["output"])?]))
}

/// Prints a table and fails at its end if a case failed.
fn check(cases: &[Case]) {
    println!("{:12} {:>8} {:>8} {:>9} {:>8}", "model", "adapters", "output", "gradients", "merged");
    let mut failed = vec![];
    for case in cases {
        match compare_branches(case) {
            Ok((adapters, found)) => {
                let [output, grads, merged] = found;
                println!("{:12} {adapters:8} {output:8.1e} {grads:9.1e} {merged:8.1e}", case.name);
                if !found.iter().zip(TOLERANCE).all(|(found, most)| *found <= most) {
                    failed.push(format!("{}: {found:?} exceeds {TOLERANCE:?}", case.name));
                }
            }
            Err(error) => {
                let error = error.to_string();
                let error = error.lines().next().unwrap_or_default();
                println!("{:12} {error}", case.name);
                failed.push(format!("{}: {error}", case.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
