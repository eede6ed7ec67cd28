//! [`candle_nn::kv_cache`] for training: while a gradient is wanted nothing is stored.
//!
//! candle's caches cut the graph of keys and values, and leave those of a training step to the next one. Here `append`
//! returns the cached and the new values with their graph and does not store the new ones if one of them leads to a
//! variable. Layers before the first adapted key or value still store theirs: clear the cache before each step. A
//! single position that leads to a variable is an error: it is a token that is generated in training mode, for which
//! the cache lacks all others. All other methods are those of the cache behind it; `Cache`, `RotatingCache` and
//! `ScatteredKvCache` are candle's.

use candle_core::{bail, Result, Tensor};
use std::ops::{Deref, DerefMut};

pub use candle_nn::kv_cache::*;

fn tracked(k: &Tensor, v: &Tensor) -> bool {
    k.track_op() || v.track_op()
}

fn concat(cached: Option<Tensor>, new: &Tensor, dim: usize) -> Result<Tensor> {
    match cached {
        Some(cached) => Tensor::cat(&[&cached, new], dim),
        None => Ok(new.clone()),
    }
}

macro_rules! cache {
    ($name:ident, ($($arg:ident),*), $dim:expr) => {
        #[doc = concat!("[`candle_nn::kv_cache::", stringify!($name), "`] that stores nothing while a gradient \
            is wanted.")]
        #[derive(Debug, Clone)]
        pub struct $name(candle_nn::kv_cache::$name);

        impl $name {
            /// An empty cache that grows along the dimension `dim`.
            pub fn new($($arg: usize),*) -> Self {
                Self(candle_nn::kv_cache::$name::new($($arg),*))
            }

            /// The cached and the new keys and values.
            ///
            /// # Errors
            /// If the shapes do not fit, the cache is full, or a single position leads to a variable.
            pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
                if !tracked(k, v) {
                    return self.0.append(&k.contiguous()?, &v.contiguous()?);
                }
                let dim = $dim(&self.0);
                if k.dim(dim)? == 1 {
                    bail!("a cache of keys stores nothing in training: call `eval()` of the adapter before generating")
                }
                let (cached_k, cached_v) = self.cached()?;
                Ok((concat(cached_k, k, dim)?, concat(cached_v, v, dim)?))
            }
        }

        impl Deref for $name {
            type Target = candle_nn::kv_cache::$name;

            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }

        impl DerefMut for $name {
            fn deref_mut(&mut self) -> &mut Self::Target {
                &mut self.0
            }
        }
    };
}
cache!(KvCache, (dim, max_seq_len), |c: &candle_nn::kv_cache::KvCache| c.k_cache().dim());
cache!(RotatingKvCache, (dim, max_seq_len), |c: &candle_nn::kv_cache::RotatingKvCache| c
    .k_cache()
    .dim());
cache!(ConcatKvCache, (dim), |c: &candle_nn::kv_cache::ConcatKvCache| c.dim());

impl KvCache {
    fn cached(&self) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.0.k()?, self.0.v()?))
    }
}

impl RotatingKvCache {
    fn cached(&self) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.0.k()?, self.0.v()?))
    }
}

impl ConcatKvCache {
    fn cached(&self) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.0.k().cloned(), self.0.v().cloned()))
    }

    /// The keys and values, if there are any.
    pub fn into_inner(self) -> Option<(Tensor, Tensor)> {
        self.0.into_inner()
    }
}
