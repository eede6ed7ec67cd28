//! The gradients of all variables in one tensor, which the ranks sum in one exchange.

use super::Process;
use crate::ops::is_finite;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;
use std::fmt::Display;

/// What a rank reports of itself after an exchange whose sum is not finite.
const FINITE: f32 = 0.;
const NOT_FINITE: f32 = 1.;
const FAILED: f32 = 2.;

/// Averages gradients over ranks: `Σ wᵢ·gᵢ / Σ wᵢ`, with the weight of rank i's part of the batch.
///
/// The gradients lie in one F32 tensor, which is created once, in the order of the variables' names. They are followed
/// by the loss, a value for each variable that counts the ranks with its gradient, and the weight. An engine sums it
/// over the ranks: MPI, NCCL, or threads.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use loralib::train::{FlatGrads, Process};
/// # fn main() -> loralib::Result<()> {
/// let x = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let vars = [("x".to_owned(), x.clone())].into(); // adapter.named_vars()?
/// let flat = FlatGrads::new(vars, Process::new(0, 2)?)?;
/// let loss = x.sqr()?.mean_all()?; // over the two samples of this rank
/// let mut grads = loss.backward()?;
/// // Two ranks with the same samples.
/// let loss = flat.all_reduce(&mut grads, &loss, 2., |part| part + part)?;
/// assert_eq!(loss, 2.5);
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [1., 2.]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct FlatGrads {
    vars: BTreeMap<String, Var>,
    rank: Process,
    flat: Tensor,
}

impl FlatGrads {
    /// Of these variables, such as [`Adapter::named_vars`](crate::Adapter::named_vars) gives.
    ///
    /// # Errors
    /// If there are none, one is not a float, or they are on several devices.
    pub fn new(vars: BTreeMap<String, Var>, rank: Process) -> Result<Self> {
        let Some(first) = vars.values().next() else {
            return Err(Error::Invalid("no variables, so no gradients to exchange".to_owned()));
        };
        for (name, var) in &vars {
            if !var.dtype().is_float() {
                return Err(Error::tensor(name, format!("it is {:?}, not a float", var.dtype())));
            }
            if !var.device().same_device(first.device()) {
                return Err(Error::tensor(name, "it is on another device than the first variable"));
            }
        }
        // Loss, counts and weight.
        let len = vars.values().map(|var| var.elem_count()).sum::<usize>() + vars.len() + 2;
        let flat = Tensor::zeros(len, DType::F32, first.device())?;
        Ok(Self { vars, rank, flat })
    }

    /// The bytes that one exchange sums: 4 for each trained value and each variable, and 8.
    pub fn bytes(&self) -> usize {
        self.flat.elem_count() * self.flat.dtype().size_in_bytes()
    }

    /// Replaces the gradients in `grads` by their weighted mean over all ranks, each in its variable's dtype, and
    /// returns the weighted mean of `loss`. A variable's gradient counts as zero on a rank that has none, such as one
    /// whose samples reach other experts; where no rank has one, there is none afterwards.
    ///
    /// `weight` is what `loss`, a scalar, is the mean of: the number of labels or samples of this rank. With 0, for a
    /// rank without samples, `loss` and `grads` do not count.
    ///
    /// `sum` gets a 1-D tensor in F32 on the variables' device, which it must not change, and returns the sum over
    /// all ranks. It is called once, and once more where that sum is not finite. If it gives all ranks the same bits,
    /// then so does this function.
    ///
    /// Several batches a step: multiply each batch's loss by its share of this rank's weight, and
    /// [add](super::super::add_grads) the gradients; `loss` is then the sum of these losses, and `weight` that of all
    /// batches. [Clip](super::super::clip_grad_norm) afterwards.
    ///
    /// # Errors
    /// On all ranks, with `grads` unchanged: if a sum is not finite, with the names of variables and the ranks that
    /// gave such values; if a rank [failed](Self::fail); if all weights are 0. A rank fails, and returns its own error,
    /// whose `weight` is negative or not finite, or whose `loss` is not a scalar.
    pub fn all_reduce(
        &self,
        grads: &mut GradStore,
        loss: &Tensor,
        weight: f64,
        sum: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<f64> {
        if let Err(error) = self.gather(grads, loss, weight) {
            self.fail(sum)?;
            return Err(error);
        }
        let total = exchange(&self.flat, &sum)?;
        if !is_finite(&total)? {
            return Err(self.diagnosis(&total, sum)?);
        }
        let at = self.loss_at();
        let extra = total.narrow(0, at, total.elem_count() - at)?.to_vec1::<f32>()?;
        let (loss, weight) = (f64::from(extra[0]), f64::from(extra[extra.len() - 1]));
        if weight == 0. {
            return Err(Error::Invalid(
                "the weight of all ranks is 0: there is no gradient".to_owned(),
            ));
        }
        let mean = (total / weight)?;
        for ((_, var, at), count) in self.places().zip(&extra[1..]) {
            if *count == 0. {
                grads.remove(var);
                continue;
            }
            let grad = mean.narrow(0, at, var.elem_count())?.reshape(var.shape())?;
            grads.insert(var, grad.to_dtype(var.dtype())?);
        }
        Ok(loss / weight)
    }

    /// Takes part in an exchange in place of [`all_reduce`](Self::all_reduce) on a rank whose forward or backward
    /// failed, so that the others do not wait for it: they return an error that names this rank.
    ///
    /// # Errors
    /// If `sum` fails.
    pub fn fail(&self, sum: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<()> {
        let nan = Tensor::new(&[f32::NAN], self.flat.device())?;
        self.flat.slice_set(&nan, 0, self.flat.elem_count() - 1)?;
        exchange(&self.flat, &sum)?;
        self.reports(FAILED, sum).map(|_| ())
    }

    /// Each variable with its name and where its gradient begins.
    fn places(&self) -> impl Iterator<Item = (&str, &Var, usize)> {
        self.vars.iter().scan(0, |end, (name, var)| {
            let at = *end;
            *end += var.elem_count();
            Some((name.as_str(), var, at))
        })
    }

    /// Behind all gradients.
    fn loss_at(&self) -> usize {
        self.flat.elem_count() - self.vars.len() - 2
    }

    /// Writes this rank's weighted gradients and loss, which gradients it has, and its weight.
    fn gather(&self, grads: &GradStore, loss: &Tensor, weight: f64) -> Result<()> {
        if !weight.is_finite() || weight < 0. {
            return Err(Error::Invalid(format!("a rank's weight is {weight}: expected 0 or more")));
        }
        if loss.elem_count() != 1 {
            let reason = format!("a rank's loss is {:?}: expected a scalar", loss.dims());
            return Err(Error::Invalid(reason));
        }
        self.flat.zero_set()?;
        if weight == 0. {
            return Ok(());
        }
        let write = |value: &Tensor, at: usize| {
            let value = value.to_dtype(DType::F32)?.flatten_all()?.detach();
            self.flat.slice_set(&(value * weight)?, 0, at)
        };
        let mut extra = vec![];
        for (_, var, at) in self.places() {
            let grad = grads.get(var);
            extra.push(if grad.is_some() { 1. } else { 0. });
            grad.map_or(Ok(()), |grad| write(grad, at))?;
        }
        write(loss, self.loss_at())?;
        extra.push(weight as f32);
        let extra = Tensor::new(extra, self.flat.device())?;
        Ok(self.flat.slice_set(&extra, 0, self.loss_at() + 1)?)
    }

    /// Each rank's report.
    fn reports(
        &self,
        own: f32,
        sum: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Vec<f32>> {
        let mut reports = vec![0.; self.rank.count()];
        reports[self.rank.index()] = own;
        let reports = Tensor::new(reports, self.flat.device())?;
        Ok(exchange(&reports, sum)?.to_vec1()?)
    }

    /// Why `total` is not finite, the same on all ranks.
    fn diagnosis(
        &self,
        total: &Tensor,
        sum: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Error> {
        let own = if is_finite(&self.flat)? { FINITE } else { NOT_FINITE };
        let reports = self.reports(own, sum)?;
        let ranks = |report: f32| {
            let ranks = reports.iter().enumerate().filter(|(_, of)| **of == report);
            first(ranks.map(|(rank, _)| format!("rank {rank}")))
        };
        if let Some(ranks) = ranks(FAILED) {
            return Ok(Error::Invalid(format!("{ranks} failed before the gradients' exchange")));
        }
        let mut names = vec![];
        for (name, var, at) in self.places() {
            if !is_finite(&total.narrow(0, at, var.elem_count())?)? {
                names.push(format!("{name:?}"));
            }
        }
        let which = first(names).map_or("loss".to_owned(), |names| format!("gradients of {names}"));
        let who = match ranks(NOT_FINITE) {
            Some(ranks) => format!("{ranks} gave such values"),
            None => "the ranks' values are, and their sum overflows".to_owned(),
        };
        Ok(Error::Invalid(format!("the sum over ranks of the {which} is not finite: {who}")))
    }
}

/// The sum over ranks, of the shape and dtype of `part`.
fn exchange(part: &Tensor, sum: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
    let total = sum(part)?;
    if (total.dims(), total.dtype()) != (part.dims(), part.dtype()) {
        let [there, here] = [&total, part].map(|t| format!("{:?} of {:?}", t.dims(), t.dtype()));
        return Err(Error::Invalid(format!("the sum over ranks is {there}, expected {here}")));
    }
    Ok(total)
}

/// The first of a list, and how many more there are; `None` if it is empty.
fn first<T: Display>(list: impl IntoIterator<Item = T>) -> Option<String> {
    let mut list = list.into_iter();
    let first = list.next()?;
    Some(match list.count() {
        0 => first.to_string(),
        more => format!("{first} and {more} more"),
    })
}
