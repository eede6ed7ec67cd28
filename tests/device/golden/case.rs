//! The cases that `fixtures/golden.py` and, of DoRA, `fixtures/dora.py` wrote.

use crate::common::{device, difference};
use candle_core::{DType, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use lora::utils::Trainable;
use lora::{Bias, LoraConfig};
use loralib as lora;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

/// Relative to the folder where cargo runs tests, so that a program built elsewhere finds it.
const FOLDER: &str = "tests/fixtures/golden";
/// The largest difference relative to the tensor's largest value, a few roundings. In half precision the
/// inputs, loralib's values and the variables are rounded too.
const TOLERANCES: [(DType, f64); 4] =
    [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 5e-3), (DType::BF16, 4e-2)];

pub type Tensors = HashMap<String, Tensor>;

/// One layer with one set of options: its inputs, and the results of loralib or, with
/// DoRA, PEFT.
pub struct Case {
    pub options: Value,
    pub dtype: DType,
    tolerance: f64,
    pub tensors: Tensors,
}

pub fn golden(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(format!("{FOLDER}/{file}.json")).unwrap()).unwrap()
}

/// The tensors of the cases that `fixtures/dora.py` wrote.
pub fn dora_tensors() -> Result<Tensors> {
    candle_core::safetensors::load(format!("{FOLDER}/dora.safetensors"), &device())
}

pub fn strings(list: &Value) -> BTreeSet<String> {
    list.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}

/// The cases of a layer, in every dtype.
pub fn cases(layer: &str) -> Result<Vec<Case>> {
    let mut all =
        candle_core::safetensors::load(format!("{FOLDER}/layers.safetensors"), &device())?;
    all.extend(dora_tensors()?);
    let mut cases = vec![];
    let options = ["golden", "dora"].map(|file| golden(file)["cases"].as_array().unwrap().clone());
    for options in options.iter().flatten() {
        if options["layer"] != layer {
            continue;
        }
        let own = format!("{}/", options["name"].as_str().unwrap());
        for (dtype, tolerance) in TOLERANCES {
            let mut tensors = Tensors::new();
            for (name, tensor) in &all {
                if let Some(name) = name.strip_prefix(&own) {
                    let float = tensor.dtype().is_float();
                    let dtype = if float { dtype } else { tensor.dtype() };
                    tensors.insert(name.to_owned(), tensor.to_dtype(dtype)?);
                }
            }
            cases.push(Case { options: options.clone(), dtype, tolerance, tensors });
        }
    }
    assert!(!cases.is_empty(), "no case of {layer}");
    Ok(cases)
}

impl Case {
    pub fn size(&self, option: &str) -> usize {
        self.options[option].as_u64().unwrap() as usize
    }

    pub fn flag(&self, option: &str) -> bool {
        self.options[option].as_bool().unwrap()
    }

    pub fn enable_lora(&self) -> Vec<bool> {
        let mask = self.options["enable_lora"].as_array().unwrap();
        mask.iter().map(|enabled| enabled.as_bool().unwrap()).collect()
    }

    pub fn config(&self) -> LoraConfig {
        LoraConfig {
            r: self.size("r"),
            lora_alpha: self.options["lora_alpha"].as_f64().unwrap(),
            fan_in_fan_out: self.flag("fan_in_fan_out"),
            use_dora: self.options["use_dora"] == true,
            lora_dtype: Some(self.dtype),
            ..Default::default()
        }
    }

    pub fn is_half(&self) -> bool {
        matches!(self.dtype, DType::F16 | DType::BF16)
    }

    /// The variables that loralib trains: without an adapter also the weight.
    pub fn trained(&self) -> BTreeSet<String> {
        strings(&self.options["trained"])
    }

    /// The selection of the same variables.
    pub fn trainable(&self) -> Trainable {
        if self.trained().contains("weight") {
            Bias::All.and("weight")
        } else {
            Bias::All.into()
        }
    }

    pub fn parameters(&self) -> Tensors {
        let names = ["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"];
        let own = |name: &str| Some((name.to_owned(), self.tensors.get(name)?.clone()));
        names.into_iter().filter_map(own).collect()
    }

    pub fn builder<'a>(&self, vars: &VarMap) -> VarBuilder<'a> {
        VarBuilder::from_varmap(vars, self.dtype, &device())
    }

    pub fn compare(&self, way: &str, name: &str, ours: &Tensor) -> Result<()> {
        let theirs = &self.tensors[name];
        let at = format!("{} in {:?}, {way}, {name}", self.options["name"], self.dtype);
        assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), self.dtype), "{at}");
        let apart = difference(ours, theirs)?;
        println!("{apart:.1e} {at}");
        assert!(apart <= self.tolerance, "{at}: {apart:e} apart\n{ours}\n{theirs}");
        Ok(())
    }
}
