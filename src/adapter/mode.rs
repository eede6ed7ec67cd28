//! Training and evaluation of all layers that an adapter has built.

use super::Adapter;
use crate::layers::Mode;
use crate::Result;

impl Adapter {
    /// Sets [`Mode::Train`], the initial mode, in all layers that were built by
    /// [`var_builder`](Self::var_builder), wherever the model holds them.
    ///
    /// # Errors
    /// Never; it returns a `Result` as [`eval`](Self::eval) does.
    pub fn train(&self) -> Result<()> {
        self.set_mode(Mode::Train)
    }

    /// Sets [`Mode::Eval`] in all adapted layers: without dropout and without a graph, and merged unless
    /// `merge_weights` is off. Call it again after loading other values. Biases and modules that are trained
    /// outside of adapted layers still record a graph: to serve such a model, use [`merged`](Self::merged).
    ///
    /// # Errors
    /// If a merged weight is not finite; then no layer has changed.
    pub fn eval(&self) -> Result<()> {
        self.set_mode(Mode::Eval)
    }

    fn set_mode(&self, mode: Mode) -> Result<()> {
        let layers = self.record.layers();
        // All or nothing, and without the lock: merging waits for other threads.
        let states: Vec<_> = layers
            .iter()
            .map(|(path, _, layer)| layer.prepare(mode).map_err(|e| e.context(path.clone())))
            .collect::<candle_core::Result<_>>()?;
        self.state().mode = Some(mode);
        layers.iter().zip(states).for_each(|((.., layer), state)| layer.set(state));
        Ok(())
    }
}
