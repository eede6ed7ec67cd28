//! Values that are bound to tensors by their ids.

use candle_core::{Tensor, TensorId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

/// The values by the ids of their tensors; candle never reuses an id. An entry lives as long as its [`Bound`].
pub(super) struct Registry<T: ?Sized + 'static>(Entries<T>);

type Entries<T> = LazyLock<Mutex<HashMap<TensorId, Weak<Bound<T>>>>>;

/// The value that is bound to a tensor, which it does not keep in memory.
pub(crate) struct Bound<T: ?Sized + 'static> {
    id: TensorId,
    value: Arc<T>,
    registry: &'static Registry<T>,
}

impl<T: ?Sized> Registry<T> {
    pub const fn new() -> Self {
        Self(LazyLock::new(Default::default))
    }

    /// Binds a value to a tensor, in place of one that it has.
    pub fn bind(&'static self, tensor: &Tensor, value: Arc<T>) -> Arc<Bound<T>> {
        let bound = Arc::new(Bound { id: tensor.id(), value, registry: self });
        self.entries().insert(bound.id, Arc::downgrade(&bound));
        bound
    }

    pub fn get(&self, tensor: &Tensor) -> Option<Arc<Bound<T>>> {
        let entry = self.entries().get(&tensor.id()).cloned();
        entry?.upgrade()
    }

    #[cfg(test)]
    pub fn has(&self, tensor: &Tensor) -> bool {
        self.entries().contains_key(&tensor.id())
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<TensorId, Weak<Bound<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Bound<T> {
    pub fn value(&self) -> &Arc<T> {
        &self.value
    }
}

impl<T: ?Sized> Drop for Bound<T> {
    fn drop(&mut self) {
        // A variable may be bound again meanwhile.
        let mut entries = self.registry.entries();
        let is_own = |entry: &Weak<Self>| std::ptr::eq(entry.as_ptr(), self);
        if entries.get(&self.id).is_some_and(is_own) {
            entries.remove(&self.id);
        }
    }
}

impl<T: ?Sized> fmt::Debug for Bound<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bound").field(&self.id).finish()
    }
}
