//! A forward with its adapters: a choice for the time of a closure.

use super::{Adapters, WeightedAdapters};
use crate::Error;

impl Adapters {
    /// Runs `f`, in which the model computes with an adapter, `"sql"`, or with a weighted sum of some. It is the
    /// [`run`](crate::adapter::Choice::run) of a [`choice`](Self::choice), which tells what holds for threads.
    ///
    /// # Errors
    /// Those of `f` and of [`choice`](Self::choice).
    pub fn with<T: Send, E: From<Error> + Send>(
        &self,
        adapters: impl Into<WeightedAdapters>,
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        self.choice(adapters)?.run(f)
    }

    /// Runs `f`, in which the model computes with its base, as it does without a choice.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with_none<T: Send, E: From<Error> + Send>(
        &self,
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        self.choice_none().run(f)
    }

    /// Runs `f`, in which each row of a batch has its own adapter or, with `None`, the base.
    ///
    /// # Errors
    /// Those of `f` and of [`choice_rows`](Self::choice_rows).
    pub fn with_rows<T: Send, E: From<Error> + Send>(
        &self,
        rows: &[Option<&str>],
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        self.choice_rows(rows)?.run(f)
    }
}
