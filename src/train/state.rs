//! The state of a run in one file: variables, moments, steps, and what the caller adds.

use super::adamw::AdamW;
use crate::files::{atomic_file, read, serialize, StateDict};
use crate::utils::{is_initial, is_statistic};
use crate::{Error, Result};
use candle_core::Device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// The key of the state in a file's metadata.
const STATE: &str = "loralib.training";

#[derive(Serialize, Deserialize)]
struct State<P> {
    steps: u32,
    progress: P,
}

impl<P: DeserializeOwned> State<P> {
    /// Of a file's metadata.
    fn read(metadata: &HashMap<String, String>) -> Result<Self> {
        let malformed = |reason: String| Error::Format { format: "training state", reason };
        let Some(json) = metadata.get(STATE) else {
            return Err(malformed(format!("its metadata has no {STATE:?}")));
        };
        let state: State<Value> =
            serde_json::from_str(json).map_err(|e| malformed(e.to_string()))?;
        let progress = P::deserialize(&state.progress).map_err(|e| {
            let progress = &state.progress;
            Error::Invalid(format!(
                "the state's progress {progress} is not what `load` expects: {e}"
            ))
        })?;
        Ok(Self { steps: state.steps, progress })
    }
}

/// torch's names of the moments.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

impl AdamW {
    /// Writes the variables with their moments, those of [`with_frozen`](Self::with_frozen), the number of steps, and
    /// `progress`, which is any value that says where the run is: the epoch, the position in the data, the states of
    /// random generators.
    ///
    /// One safetensors file has all of it, so that it cannot disagree with itself: it appears complete and
    /// flushed to disk, or the one before stays. Moments are named `optimizer.exp_avg.NAME` and
    /// `optimizer.exp_avg_sq.NAME`. Options, such as the learning rate, are not saved.
    ///
    /// # Errors
    /// If a value is not finite, `progress` is not representable as JSON, or the file system refuses.
    pub fn save(&self, path: impl AsRef<Path>, progress: &impl Serialize) -> Result<()> {
        let path = path.as_ref();
        let save = || {
            let frozen = self.frozen.iter();
            let mut tensors: StateDict =
                frozen.map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
            for (name, entry) in &self.entries {
                tensors.insert(name.clone(), entry.var.as_detached_tensor());
                for (moment, var) in MOMENTS.iter().zip([&entry.exp_avg, &entry.exp_avg_sq]) {
                    tensors.insert(moment_name(moment, name), var.as_detached_tensor());
                }
            }
            let state = State { steps: self.steps, progress };
            let json = serde_json::to_string(&state).map_err(|e| Error::Invalid(e.to_string()))?;
            let bytes = serialize(&tensors, Some((STATE, json)))?;
            Ok(atomic_file::replace(path, &bytes)?)
        };
        save().map_err(|e: Error| e.at(path))
    }

    /// Sets the variables, their moments and the number of steps to those of a file that
    /// [`save`](Self::save) wrote, and returns its `progress`: all of it or, on an error, nothing.
    ///
    /// # Errors
    /// If the file cannot be read or has no such state; if it has other names, or one in another shape or
    /// dtype; and if its `progress` is of another type.
    pub fn load<P: DeserializeOwned>(&mut self, path: impl AsRef<Path>) -> Result<P> {
        let path = path.as_ref();
        self.load_from(path).map_err(|e| e.at(path))
    }

    /// The `progress` of a file that [`save`](Self::save) wrote, such as the options of its run, before anything is built
    /// to load it.
    ///
    /// # Errors
    /// If the file cannot be read or has no such state, or its `progress` is of another type.
    pub fn read_progress<P: DeserializeOwned>(path: impl AsRef<Path>) -> Result<P> {
        let path = path.as_ref();
        let state = || Ok(State::read(&read(path, &Device::Cpu)?.1)?.progress);
        state().map_err(|e: Error| e.at(path))
    }

    fn load_from<P: DeserializeOwned>(&mut self, path: &Path) -> Result<P> {
        let (mut tensors, metadata) = read(path, &Device::Cpu)?;
        let State { steps, progress } = State::read(&metadata)?;
        let own = self.entries.iter().flat_map(|(name, entry)| {
            let [exp_avg, exp_avg_sq] = MOMENTS.map(|moment| moment_name(moment, name));
            [(name.clone(), &entry.var), (exp_avg, &entry.exp_avg), (exp_avg_sq, &entry.exp_avg_sq)]
        });
        let frozen = self.frozen.iter().map(|(name, var)| (name.clone(), var));
        let mut new = vec![];
        for (name, var) in own.chain(frozen) {
            let Some(tensor) = tensors.remove(&name) else {
                return Err(differs(name, "the file does not have it"));
            };
            if (tensor.shape(), tensor.dtype()) != (var.shape(), var.dtype()) {
                let reason = format!(
                    "it is {:?} of {:?}, expected {:?} of {:?}",
                    tensor.dims(),
                    tensor.dtype(),
                    var.dims(),
                    var.dtype()
                );
                return Err(Error::tensor(name, reason));
            }
            new.push((var, tensor.to_device(var.device())?));
        }
        let left: BTreeSet<_> = tensors.into_keys().collect();
        if let Some(name) = left.into_iter().next() {
            return Err(differs(name, "the optimizer does not have it"));
        }
        new.into_iter().try_for_each(|(var, tensor)| var.set(&tensor))?;
        self.steps = steps;
        // The run's first step has found them.
        self.checked = steps > 0;
        Ok(progress)
    }
}

/// The error for a name that one of file and optimizer lacks.
fn differs(name: String, what: &str) -> Error {
    let of_frozen = if is_initial(&name) {
        ": both need the adapter's init_lora_weights, and `with_frozen(adapter.frozen_vars())`"
    } else if is_statistic(&name) {
        ": both need `with_frozen(adapter.frozen_vars())`"
    } else {
        ""
    };
    let reason = format!("{what}{of_frozen}");
    Error::tensor(name, reason)
}

fn moment_name(moment: &str, name: &str) -> String {
    format!("optimizer.{moment}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Tensor, Var};
    use candle_nn::{Optimizer, ParamsAdamW};
    use std::fs;

    /// A run whose gradients depend on the step alone.
    struct Run {
        vars: Vec<(String, Var)>,
        opt: AdamW,
    }

    impl Run {
        fn new() -> Result<Self> {
            let mut vars = vec![];
            for (name, dtype) in [("q.lora_A", DType::F32), ("q.lora_B", DType::BF16)] {
                let start = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?;
                vars.push((name.to_owned(), Var::from_tensor(&start.to_dtype(dtype)?)?));
            }
            let params = ParamsAdamW { lr: 0.1, ..Default::default() };
            Ok(Self { opt: AdamW::named(vars.clone(), params)?, vars })
        }

        fn steps(&mut self, steps: std::ops::Range<u32>) -> Result<()> {
            for step in steps {
                let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
                for (_, var) in &self.vars {
                    let var = var.to_dtype(DType::F32)?;
                    loss = (loss + (var - f64::from(step))?.sqr()?.sum_all()?)?;
                }
                self.opt.backward_step(&loss)?;
            }
            Ok(())
        }

        fn bits(&self) -> Result<Vec<Vec<f32>>> {
            let of = |var: &Var| var.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
            self.vars.iter().map(|(_, var)| Ok(of(var)?)).collect()
        }
    }

    #[test]
    fn a_resumed_run_may_lack_a_gradient_as_the_run_may() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("state.safetensors");
        let new = || -> Result<(AdamW, [Var; 2])> {
            let vars = [Var::new(&[1f32], &Device::Cpu)?, Var::new(&[1f32], &Device::Cpu)?];
            let named = ["a", "b"].map(str::to_owned).into_iter().zip(vars.clone());
            Ok((AdamW::named(named, Default::default())?, vars))
        };
        let (mut opt, [a, b]) = new()?;
        opt.save(&path, &0u32)?;
        opt.backward_step(&(a.as_tensor() + b.as_tensor())?.sum_all()?)?;
        let after = dir.path().join("after.safetensors");
        opt.save(&after, &1u32)?;
        let (mut opt, [a, _]) = new()?;
        opt.load::<u32>(&path)?;
        assert!(opt.backward_step(&a.sum_all()?).is_err(), "before the first step");
        let (mut opt, [a, _]) = new()?;
        opt.load::<u32>(&after)?;
        opt.backward_step(&a.sum_all()?)?;
        Ok(())
    }

    #[test]
    fn a_resumed_run_is_the_same_to_the_bit() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("state.safetensors");
        let mut whole = Run::new()?;
        whole.steps(0..20)?;
        for stop in 0..20 {
            let mut first = Run::new()?;
            first.steps(0..stop)?;
            first.opt.save(&path, &stop)?;
            let mut second = Run::new()?;
            let from: u32 = second.opt.load(&path)?;
            assert_eq!((from, second.opt.steps()), (stop, stop as usize));
            second.steps(from..20)?;
            assert_eq!(second.bits()?, whole.bits()?, "stopped at {stop}");
        }
        Ok(())
    }

    /// What a test of equal bits has to notice.
    #[test]
    fn a_wrong_state_gives_another_run() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("state.safetensors");
        let mut whole = Run::new()?;
        whole.steps(0..20)?;
        let damages: [fn(&mut AdamW) -> Result<()>; 3] = [
            |opt| Ok(opt.entries["q.lora_A"].exp_avg.zero_set()?),
            |opt| Ok(opt.entries["q.lora_A"].exp_avg_sq.zero_set()?),
            |opt| {
                opt.steps += 1;
                Ok(())
            },
        ];
        for damage in damages {
            let mut first = Run::new()?;
            first.steps(0..10)?;
            first.opt.save(&path, &())?;
            let mut second = Run::new()?;
            second.opt.load::<()>(&path)?;
            damage(&mut second.opt)?;
            second.steps(10..20)?;
            assert_ne!(second.bits()?, whole.bits()?);
        }
        Ok(())
    }

    #[test]
    fn another_run_s_state_is_refused_and_changes_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("state.safetensors");
        let mut run = Run::new()?;
        run.steps(0..3)?;
        run.opt.save(&path, &7u32)?;
        let good = fs::read(&path)?;
        run.steps(3..5)?;
        let before = run.bits()?;
        let refused = |opt: &mut AdamW, expected: &str| {
            let error = opt.load::<u32>(&path).unwrap_err().to_string();
            assert!(error.contains("state.safetensors") && error.contains(expected), "{error}");
        };

        let named = |names: &[&str]| {
            let vars = names
                .iter()
                .zip(&run.vars)
                .map(|(name, (_, var))| Ok((name.to_string(), Var::from_tensor(&var.copy()?)?)));
            AdamW::named(vars.collect::<Result<Vec<_>>>()?, Default::default())
        };
        refused(&mut named(&["k.lora_A", "q.lora_B"])?, "\"k.lora_A\"");
        refused(&mut named(&["q.lora_A"])?, "the optimizer does not have it");
        let other = Var::zeros((3, 2), DType::F32, &Device::Cpu)?;
        let mut reshaped = AdamW::named([("q.lora_A".to_owned(), other)], Default::default())?;
        refused(&mut reshaped, "[2, 3] of F32, expected [3, 2] of F32");
        let error = run.opt.load::<String>(&path).unwrap_err().to_string();
        assert!(error.contains("state.safetensors") && error.contains("progress 7 is"), "{error}");

        for length in (0..good.len()).step_by(7) {
            fs::write(&path, &good[..length])?;
            assert!(run.opt.load::<u32>(&path).is_err(), "{length} bytes");
        }
        let factor = |dims: (usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let adapter = StateDict::from([
            ("x.lora_A".to_owned(), factor((1, 2))?),
            ("x.lora_B".to_owned(), factor((3, 1))?),
        ]);
        let cfg = crate::LoraConfig { r: 1, ..Default::default() };
        crate::save_state_dict(&adapter, cfg, &path)?;
        assert!(run.opt.load::<u32>(&path).unwrap_err().to_string().contains("loralib.training"));
        assert_eq!((run.bits()?, run.opt.steps()), (before, 5));
        Ok(())
    }
}
