//! What a model computes with, as a value.

use crate::layers::binding::active::Activations;
use crate::Error;

/// The adapters that a model computes with, chosen from [`Adapters`](crate::Adapters) or by
/// [`Adapter::choice_disabled`](crate::Adapter::choice_disabled), to be used in any thread.
///
/// A choice is active while the closure of [`run`](Self::run) runs, for the layers that are called in it on its thread.
/// It keeps the adapters, whatever is removed from the set meanwhile.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Module, Tensor};
/// use loralib::{nn as candle_nn, Adapter, Adapters, LoraConfig};
/// # let device = Device::Cpu;
/// # let base = candle_nn::VarBuilder::zeros(DType::F32, &device);
/// # let adapters = Adapters::new();
/// # let model = candle_nn::linear(4, 3, adapters.var_builder(base).pp("fc"))?;
/// # adapters.add("sql", &Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["fc"]))?;
/// # let x = Tensor::ones((2, 4), DType::F32, &device)?;
/// let sql = adapters.choice("sql")?;
/// let forward = || sql.run(|| model.forward(&x));
/// let y = std::thread::scope(|scope| scope.spawn(forward).join()).unwrap()?;
/// # let _ = y; Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Choice(pub(crate) Activations);

impl Choice {
    /// What is chosen on this thread, from all sets and by [`Adapter::disabled`](crate::Adapter::disabled), to carry
    /// into the threads that a closure starts.
    pub fn current() -> Self {
        Self(Activations::current())
    }

    /// Runs `f`, in which the model computes with these adapters. A choice within `f` replaces it.
    ///
    /// `f` runs on this thread and, if that is a worker of a rayon pool, in a pool of its own: a worker that waits for a
    /// part of its work runs other tasks meanwhile, which must not see this choice. There `f` has as many threads as
    /// the caller's pool, or one if other choices are running, and its own rayon tasks compute with the choice too. `f`
    /// must not wait for tasks of the caller's pool, and waits for its own: what it leaves to its pool by `rayon::spawn` may
    /// find the choice gone. The threads that `f` starts elsewhere have no choice, nor do rayon
    /// tasks that it starts from a thread of no pool: give them one by [`current`](Self::current).
    ///
    /// # Errors
    /// Those of `f`; and if threads cannot be started.
    pub fn run<T: Send, E: From<Error> + Send>(
        &self,
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        self.0.within_current().run(f)
    }

    /// [`run`](Self::run) for a closure that cannot be sent to another thread, because the model has a `Box<dyn Module>`
    /// or a `RefCell`.
    ///
    /// # Errors
    /// Those of `f`; and on a worker of a rayon pool.
    pub fn run_local<T, E: From<Error>>(
        &self,
        f: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.0.within_current().run_local(f)
    }
}
