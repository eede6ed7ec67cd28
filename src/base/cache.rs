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
    /// may run another task on this thread, which reads too. Of two that read at the same time the first that is done counts.
    pub fn get(&self, key: K, read: impl FnOnce() -> Result<V>) -> Result<V> {
        let values = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = values().get(&key) {
            return Ok(value.clone());
        }
        let value = read()?;
        Ok(values().entry(key).or_insert(value).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    /// As when a parallel loop of the first runs the second on its thread.
    #[test]
    fn a_read_may_wait_for_another_of_the_same_key() {
        let (done, is_done) = mpsc::channel();
        thread::spawn(move || {
            let cache = Cache::default();
            let value = cache.get("key", || cache.get("key", || Ok(1)).map(|inner| inner + 1));
            done.send(value.unwrap()).unwrap();
        });
        assert_eq!(
            is_done.recv_timeout(Duration::from_secs(20)),
            Ok(1),
            "the first that is done counts"
        );
    }
}
