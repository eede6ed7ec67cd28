//! The gradients of all variables in one tensor, which the ranks sum in one exchange.

use crate::ops::is_finite;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;

/// The values beside the gradients: the loss and the weight.
const EXTRA: usize = 2;

/// Averages gradients over ranks: `Σ wᵢ·gᵢ / Σ wᵢ`, with the weight of rank i's part of the batch.
///
/// The gradients lie in one F32 tensor, in the order of the variables' names and followed by loss and weight, which is
/// created once. An engine sums it over the ranks: MPI, NCCL, or threads.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use loralib::train::FlatGrads;
/// # fn main() -> loralib::Result<()> {
/// let x = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let flat = FlatGrads::new([("x".to_owned(), x.clone())].into())?; // adapter.named_vars()?
/// let loss = x.sqr()?.mean_all()?; // over the two samples of this rank
/// let mut grads = loss.backward()?;
/// // Two ranks with the same samples.
/// let loss = flat.all_reduce(&mut grads, &loss, 2., |sum| sum + sum)?;
/// assert_eq!(loss, 2.5);
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [1., 2.]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct FlatGrads {
    vars: BTreeMap<String, Var>,
    flat: Tensor,
}

impl FlatGrads {
    /// Of these variables, such as [`Adapter::named_vars`](crate::Adapter::named_vars) gives.
    ///
    /// # Errors
    /// If there are none, one is not a float, or they are on several devices.
    pub fn new(vars: BTreeMap<String, Var>) -> Result<Self> {
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
        let len = vars.values().map(|var| var.elem_count()).sum::<usize>() + EXTRA;
        let flat = Tensor::zeros(len, DType::F32, first.device())?;
        Ok(Self { vars, flat })
    }

    /// The bytes that one exchange sums: 4 for each trained value, and 8.
    pub fn bytes(&self) -> usize {
        self.flat.elem_count() * self.flat.dtype().size_in_bytes()
    }

    /// Replaces the gradients in `grads` by their weighted mean over all ranks, each in its variable's dtype, and
    /// returns the weighted mean of `loss`.
    ///
    /// `weight` is what `loss`, a scalar, is the mean of: the number of labels or samples of this rank. With 0, for a
    /// rank without samples, `loss` and `grads` do not count. `sum` gets this rank's tensor, 1-D in F32 on the
    /// variables' device, and returns the sum over all ranks. If it gives all ranks the same bits, then so does
    /// this function.
    ///
    /// Call it after the gradients of several batches are [added](super::super::add_grads), and before they are
    /// [clipped](super::super::clip_grad_norm).
    ///
    /// # Errors
    /// If a sum is not finite, on all ranks, with the names of variables; `grads` is unchanged then. Before the
    /// exchange, on this rank alone: if `weight` is negative or not finite, or a variable has no gradient. The
    /// other ranks wait then until this one ends the run, as `MPI_Abort` does.
    pub fn all_reduce(
        &self,
        grads: &mut GradStore,
        loss: &Tensor,
        weight: f64,
        sum: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<f64> {
        self.gather(grads, loss, weight)?;
        let total = sum(&self.flat)?;
        if (total.dims(), total.dtype()) != (self.flat.dims(), self.flat.dtype()) {
            let [there, here] =
                [&total, &self.flat].map(|t| format!("{:?} of {:?}", t.dims(), t.dtype()));
            return Err(Error::Invalid(format!("the sum over ranks is {there}, expected {here}")));
        }
        self.check(&total)?;
        let extra = total.narrow(0, total.elem_count() - EXTRA, EXTRA)?.to_vec1::<f32>()?;
        let (loss, weight) = (f64::from(extra[0]), f64::from(extra[1]));
        if weight == 0. {
            return Err(Error::Invalid(
                "the weight of all ranks is 0: there is no gradient".to_owned(),
            ));
        }
        let mean = (total / weight)?;
        for (_, var, at) in self.places() {
            let grad = mean.narrow(0, at, var.elem_count())?.reshape(var.shape())?;
            grads.insert(var, grad.to_dtype(var.dtype())?);
        }
        Ok(loss / weight)
    }

    /// Each variable with its name and where its gradient begins.
    fn places(&self) -> impl Iterator<Item = (&str, &Var, usize)> {
        self.vars.iter().scan(0, |end, (name, var)| {
            let at = *end;
            *end += var.elem_count();
            Some((name.as_str(), var, at))
        })
    }

    /// Writes this rank's weighted gradients, loss and weight.
    fn gather(&self, grads: &GradStore, loss: &Tensor, weight: f64) -> Result<()> {
        if !weight.is_finite() || weight < 0. {
            return Err(Error::Invalid(format!("a rank's weight is {weight}: expected 0 or more")));
        }
        if weight == 0. {
            return Ok(self.flat.zero_set()?);
        }
        let write = |value: &Tensor, at: usize| {
            let value = value.to_dtype(DType::F32)?.flatten_all()?.detach();
            self.flat.slice_set(&(value * weight)?, 0, at)
        };
        for (name, var, at) in self.places() {
            let Some(grad) = grads.get(var) else {
                return Err(Error::tensor(name, "it has no gradient on this rank"));
            };
            write(grad, at)?;
        }
        let end = self.flat.elem_count() - EXTRA;
        write(loss, end)?;
        Ok(self.flat.slice_set(&Tensor::new(&[weight as f32], self.flat.device())?, 0, end + 1)?)
    }

    fn check(&self, total: &Tensor) -> Result<()> {
        if is_finite(total)? {
            return Ok(());
        }
        let mut names = vec![];
        for (name, var, at) in self.places() {
            if !is_finite(&total.narrow(0, at, var.elem_count())?)? {
                names.push(name);
            }
        }
        let which = match names[..] {
            [] => "loss".to_owned(),
            [name] => format!("gradient of {name:?}"),
            [name, ..] => format!("gradients of {name:?} and {} more", names.len() - 1),
        };
        let here = if is_finite(&self.flat)? { "finite" } else { "not finite" };
        Err(Error::Invalid(format!(
            "the sum over ranks of the {which} is not finite; what this rank gave is {here}"
        )))
    }
}
