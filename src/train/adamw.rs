//! AdamW over named variables, which can be saved and resumed.

use crate::ops::{adamw, new_moments, AdamWStep};
use crate::utils::require_grads;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{bail, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};

/// [`candle_nn::AdamW`] with names, in place on the CPU, and with a state that
/// [`save`](Self::save) writes: a run that is stopped and resumed gives the same bits as one that was not,
/// if [`with_frozen`](AdamW::with_frozen) has what else the model changes or computes with.
///
/// The step is torch's, with one count of steps for all variables, as candle has it. Moments are in F32 beside F32, F16
/// and BF16 (F64 beside F64), and so is the step, whose result is rounded once: in candle's, F16 variables become NaN,
/// since its epsilon is 0 in F16. A gradient of NaN makes its variable NaN, as in torch:
/// [`clip_grad_norm`](super::clip_grad_norm) reports it before the step.
///
/// A variable without a gradient is left as it is, but in the first step it is an error, unless
/// [`allow_unused`](Self::allow_unused) says that a loss need not reach it: candle tells nobody of an operation without a
/// backward, and what is before it would not be trained. It is [`Adapter::require_grads`](crate::Adapter::require_grads),
/// which other optimizers need a call of.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::{Optimizer, ParamsAdamW};
/// use loralib::train::AdamW;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("state.safetensors");
/// let x = Var::new(&[3f32, -1.], &Device::Cpu)?;
/// let named = || [("x".to_owned(), x.clone())]; // for an adapter: `adapter.named_vars()?`
/// let mut opt = AdamW::named(named(), ParamsAdamW { lr: 0.1, ..Default::default() })?;
/// opt.backward_step(&x.sqr()?.sum_all()?)?;
/// opt.save(&path, &1u32)?; // with anything that says where the run is
///
/// let mut resumed = AdamW::named(named(), opt.params().clone())?;
/// let epoch: u32 = resumed.load(&path)?;
/// assert_eq!((resumed.steps(), epoch), (1, 1));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct AdamW {
    pub(super) entries: BTreeMap<String, Entry>,
    /// Saved and loaded, and not changed.
    pub(super) frozen: BTreeMap<String, Var>,
    pub(super) steps: u32,
    params: ParamsAdamW,
    /// Whether a step has found that all variables have gradients.
    pub(super) checked: bool,
}

/// A variable with its moments.
#[derive(Debug)]
pub(super) struct Entry {
    pub var: Var,
    pub exp_avg: Var,
    pub exp_avg_sq: Var,
    /// A factor of the learning rate.
    rate: f64,
    /// In place of the common one.
    weight_decay: Option<f64>,
    /// Whether it may lack a gradient.
    may_be_unused: bool,
}

impl AdamW {
    /// An optimizer of these variables, such as [`Adapter::named_vars`](crate::Adapter::named_vars) gives.
    ///
    /// # Errors
    /// If two have the same name or are the same variable, which would be stepped twice; and if one is not a float.
    pub fn named(
        vars: impl IntoIterator<Item = (String, Var)>,
        params: ParamsAdamW,
    ) -> Result<Self> {
        let (mut entries, mut names) = (BTreeMap::new(), HashMap::new());
        for (name, var) in vars {
            match names.insert(var.id(), name.clone()) {
                Some(other) if other != name => {
                    return Err(Error::tensor(
                        name,
                        format!("it is the variable {other:?} too: give it once"),
                    ));
                }
                _ => {}
            }
            if !var.dtype().is_float() {
                return Err(Error::tensor(name, format!("it is {:?}, not a float", var.dtype())));
            }
            let (exp_avg, exp_avg_sq) = new_moments(&var)?;
            let entry = Entry {
                var,
                exp_avg,
                exp_avg_sq,
                rate: 1.,
                weight_decay: None,
                may_be_unused: false,
            };
            if entries.insert(name.clone(), entry).is_some() {
                return Err(Error::tensor(name, "there are two variables of this name"));
            }
        }
        Ok(Self { entries, frozen: BTreeMap::new(), steps: 0, params, checked: false })
    }

    /// Multiplies the learning rate of each variable by a factor that depends on its name: for LoRA+
    /// ([Hayou et al. 2024](https://arxiv.org/abs/2402.12354)) 16 for `lora_B`.
    ///
    /// ```
    /// # fn main() -> loralib::Result<()> {
    /// # let opt = loralib::train::AdamW::named([], Default::default())?;
    /// let opt = opt.with_rates(|name| if name.ends_with("lora_B") { 16. } else { 1. });
    /// # let _ = opt; Ok(()) }
    /// ```
    pub fn with_rates(mut self, factor: impl Fn(&str) -> f64) -> Self {
        self.entries.iter_mut().for_each(|(name, entry)| entry.rate = factor(name));
        self
    }

    /// Gives each variable a weight decay of its own, by its name, in place of
    /// [`ParamsAdamW::weight_decay`]: 0 for biases, for example.
    pub fn with_weight_decays(mut self, decay: impl Fn(&str) -> f64) -> Self {
        self.entries.iter_mut().for_each(|(name, entry)| entry.weight_decay = Some(decay(name)));
        self
    }

    /// Allows that the first step has no gradient for the variables of these names: those of experts that no token was
    /// routed to, for example.
    pub fn allow_unused(mut self, unused: impl Fn(&str) -> bool) -> Self {
        self.entries.iter_mut().for_each(|(name, entry)| entry.may_be_unused = unused(name));
        self
    }

    /// Adds variables that are not trained to the state that [`save`](Self::save) writes, such as
    /// [`Adapter::frozen_vars`](crate::Adapter::frozen_vars) gives.
    ///
    /// # Errors
    /// If one has the name of another variable, or is trained.
    pub fn with_frozen(mut self, vars: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        for (name, var) in vars {
            if let Some((trained, _)) =
                self.entries.iter().find(|(_, own)| own.var.id() == var.id())
            {
                return Err(Error::tensor(name, format!("it is trained as {trained:?}")));
            }
            if self.entries.contains_key(&name) || self.frozen.insert(name.clone(), var).is_some() {
                return Err(Error::tensor(name, "there are two variables of this name"));
            }
        }
        Ok(self)
    }

    /// The steps so far, those before [`load`](Self::load) included.
    pub fn steps(&self) -> usize {
        self.steps as usize
    }

    /// The options.
    pub fn params(&self) -> &ParamsAdamW {
        &self.params
    }

    /// Sets the options.
    pub fn set_params(&mut self, params: ParamsAdamW) {
        self.params = params;
    }
}

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    /// With the names "0", "1" and so on.
    fn new(vars: Vec<Var>, params: ParamsAdamW) -> candle_core::Result<Self> {
        let vars = vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var));
        Ok(Self::named(vars.filter(|(_, var)| var.dtype().is_float()), params)?)
    }

    /// # Errors
    /// In the first step, if a variable has no gradient that needs [one](Self::allow_unused); later, if there are
    /// variables and none of them has one; and those of candle. Then nothing has changed.
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        if !self.checked {
            let needed = self.entries.iter().filter(|(_, entry)| !entry.may_be_unused);
            require_grads(needed.map(|(name, entry)| (name, &entry.var)), grads)?;
            self.checked = true;
        }
        let reached = self.entries.values().any(|entry| grads.get(&entry.var).is_some());
        if let Some(name) = self.entries.keys().next().filter(|_| !reached) {
            bail!(
                "AdamW: no variable has a gradient, {name:?} neither: the loss does not depend on them, an \
                 operation cuts the graph (`missing_grads` lists them), or the model is in evaluation"
            )
        }
        self.steps = self.steps.saturating_add(1);
        let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = self.params;
        let step = |entry: &Entry| {
            let Some(grad) = grads.get(&entry.var) else { return Ok(()) };
            let (rate, decay) = (lr * entry.rate, entry.weight_decay.unwrap_or(weight_decay));
            let step = AdamWStep { rate, decay, beta1, beta2, eps, t: self.steps };
            adamw(&entry.var, (&entry.exp_avg, &entry.exp_avg_sq), grad, step)
        };
        match self.entries.values().all(|entry| entry.var.device().is_cpu()) {
            true => self.entries.par_iter().try_for_each(|(_, entry)| step(entry)),
            false => self.entries.values().try_for_each(step),
        }
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    const PARAMS: ParamsAdamW =
        ParamsAdamW { lr: 0.05, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

    fn wave(frequency: f64, shape: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
        let ramp = Tensor::arange(1f32, shape.iter().product::<usize>() as f32 + 1., &Device::Cpu)?;
        (ramp * frequency)?.sin()?.reshape(shape)?.to_dtype(dtype)
    }

    fn apart(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
    }

    /// Ten steps towards a target by `O`.
    fn steps<O: Optimizer<Config = ParamsAdamW>>(
        start: &Tensor,
        target: &Tensor,
    ) -> candle_core::Result<Var> {
        let var = Var::from_tensor(start)?;
        let mut opt = O::new(vec![var.clone()], PARAMS)?;
        for _ in 0..10 {
            opt.backward_step(&(var.as_tensor() - target)?.sqr()?.sum_all()?)?;
        }
        Ok(var)
    }

    #[test]
    fn a_step_is_candle_s_in_every_size_and_dtype() -> candle_core::Result<()> {
        // candle's in BF16 rounds its moments, so that it is no reference.
        let cases = [
            (DType::F64, DType::F64, 1e-13),
            (DType::F32, DType::F32, 5e-6),
            (DType::BF16, DType::F32, 0.1),
        ];
        for (dtype, reference, tolerance) in cases {
            for shape in [&[1][..], &[7, 5], &[300, 200]] {
                let (start, target) = (wave(0.7, shape, dtype)?, wave(1.3, shape, dtype)?);
                let ours = steps::<AdamW>(&start, &target)?;
                let wide = |t: &Tensor| t.to_dtype(reference);
                let theirs = steps::<candle_nn::AdamW>(&wide(&start)?, &wide(&target)?)?;
                let apart = apart(&ours, &theirs)?;
                assert!(apart < tolerance, "{dtype:?} {shape:?}: {apart}");
            }
        }
        Ok(())
    }

    #[test]
    fn half_precision_variables_stay_finite() -> candle_core::Result<()> {
        let (start, target) = (wave(0.7, &[50], DType::F16)?, wave(1.3, &[50], DType::F16)?);
        let ours = steps::<AdamW>(&start, &target)?;
        let f32 = |t: &Tensor| t.to_dtype(DType::F32);
        let expected = steps::<candle_nn::AdamW>(&f32(&start)?, &f32(&target)?)?;
        assert!(apart(&ours, &expected)? < 0.01);
        Ok(())
    }

    #[test]
    fn rates_and_decays_go_by_name() -> candle_core::Result<()> {
        let new = || Var::new(&[1f32], &Device::Cpu);
        let (a, b, c) = (new()?, new()?, new()?);
        let named = [("a", &a), ("b", &b), ("c", &c)].map(|(name, var)| (name.into(), var.clone()));
        let mut opt = AdamW::named(named, PARAMS)?
            .with_rates(|name| if name == "b" { 2. } else { 1. })
            .with_weight_decays(|name| if name == "c" { 0. } else { 0.1 });
        opt.backward_step(&((a.as_tensor() + b.as_tensor())? + c.as_tensor())?.sum_all()?)?;
        let value = |var: &Var| var.to_vec1::<f32>().map(|v| f64::from(v[0]));
        for (var, rate, decay) in [(&a, 0.05, 0.1), (&b, 0.1, 0.1), (&c, 0.05, 0.)] {
            assert!((value(var)? - (1. - rate * decay - rate)).abs() < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn a_step_without_any_gradient_is_an_error() -> candle_core::Result<()> {
        let new = || Var::new(&[1f32], &Device::Cpu);
        let (a, b) = (new()?, new()?);
        let named = [("a", &a), ("b", &b)].map(|(name, var)| (name.into(), var.clone()));
        let mut opt = AdamW::named(named.clone(), PARAMS)?;
        let error = opt.backward_step(&new()?.sum_all()?).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && opt.steps() == 0, "{error}");
        let error = opt.backward_step(&a.sum_all()?).unwrap_err().to_string();
        assert!(error.contains("no gradient reaches [\"b\"]") && opt.steps() == 0, "{error}");
        assert_eq!(a.to_vec1::<f32>()?, [1.]);
        // Later ones may be out of reach.
        opt.backward_step(&(a.as_tensor() + b.as_tensor())?.sum_all()?)?;
        let before = b.to_vec1::<f32>()?;
        opt.backward_step(&a.sum_all()?)?;
        assert_eq!((opt.steps(), b.to_vec1::<f32>()?), (2, before));
        let error = opt.backward_step(&new()?.sum_all()?).unwrap_err().to_string();
        assert!(error.contains("no variable has a gradient"), "{error}");
        let mut opt = AdamW::named(named, PARAMS)?.allow_unused(|name| name == "b");
        opt.backward_step(&a.sum_all()?)?;
        AdamW::named([], PARAMS)?.backward_step(&new()?.sum_all()?)
    }

    #[test]
    fn equal_names_and_variables_and_integers_are_refused() -> candle_core::Result<()> {
        let var = Var::new(&[1f32], &Device::Cpu)?;
        let twice = [
            ("x".to_owned(), var.clone()),
            ("x".to_owned(), Var::zeros(1, DType::F32, &Device::Cpu)?),
        ];
        assert!(AdamW::named(twice, PARAMS).unwrap_err().to_string().contains("\"x\""));
        let tied = [("x".to_owned(), var.clone()), ("y".to_owned(), var)];
        let error = AdamW::named(tied, PARAMS).unwrap_err().to_string();
        assert!(error.contains("\"y\": it is the variable \"x\" too"), "{error}");
        let vars = [("x".to_owned(), Var::zeros(1, DType::F32, &Device::Cpu)?)];
        let opt = AdamW::named(vars.clone(), PARAMS)?;
        let frozen = vars.map(|(name, var)| (format!("{name}0"), var));
        let error = opt.with_frozen(frozen).unwrap_err().to_string();
        assert!(error.contains("\"x0\": it is trained as \"x\""), "{error}");
        let ids = [("ids".to_owned(), Var::new(&[1u32], &Device::Cpu)?)];
        assert!(AdamW::named(ids, PARAMS).unwrap_err().to_string().contains("U32"));
        Ok(())
    }
}
