//! Tensors that were read before: two readers of a matrix share its values.

use crate::Result;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Values by key, each read once.
pub(crate) struct Cache<K, V>(Mutex<HashMap<K, V>>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    /// The value of `key`, which `read` gives if it is new. The lock is free meanwhile: a parallel loop in `read`
    /// may run another task on this thread, which reads too. Of two that read at the same time the first counts.
    pub fn get(&self, key: K, read: impl FnOnce() -> Result<V>) -> Result<V> {
        let values = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = values().get(&key) {
            return Ok(value.clone());
        }
        let value = read()?;
        Ok(values().entry(key).or_insert(value).clone())
    }
}
