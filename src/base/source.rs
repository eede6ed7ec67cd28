//! A source of base tensors, and the `VarBuilder` that a model reads them from.

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;

/// Tensors by name: of a file, in memory, or those of another source with something done to them.
pub(crate) trait Source: Send + Sync {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor>;
    fn has(&self, name: &str) -> bool;
}

/// What a model expects of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// `None` if the model takes any.
    pub shape: Option<&'a Shape>,
    /// The values of a new variable.
    pub init: Init,
    pub dtype: DType,
    pub device: &'a Device,
}

impl Wanted<'_> {
    /// An error unless a tensor of these dimensions has the expected shape.
    pub fn check(&self, name: &str, dims: &[usize]) -> Result<()> {
        match self.shape.filter(|shape| shape.dims() != dims) {
            None => Ok(()),
            Some(shape) => {
                let reason = format!("its shape is {dims:?}, the model expects {:?}", shape.dims());
                Err(Error::tensor(name, reason))
            }
        }
    }

    /// `tensor`, if it has the expected shape, in the dtype and on the device.
    pub fn convert(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        self.check(name, tensor.dims())?;
        Ok(tensor.to_device(self.device)?.to_dtype(self.dtype)?)
    }
}

/// A `VarBuilder` over a source.
pub(crate) fn from_source<'a>(
    source: impl Source + 'a,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'a> {
    VarBuilder::from_backend(Box::new(Backend(source)), dtype, device.clone())
}

struct Backend<S>(S);

impl<S: Source> SimpleBackend for Backend<S> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.tensor(name, &Wanted { shape: Some(&shape), init, dtype, device })?)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let init = Init::default();
        Ok(self.0.tensor(name, &Wanted { shape: None, init, dtype, device })?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.has(name)
    }
}

/// Any `VarBuilder`, at its prefix.
impl Source for VarBuilder<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let vb = self.clone().set_device(wanted.device.clone());
        Ok(match wanted.shape {
            Some(shape) => vb.get_with_hints_dtype(shape, name, wanted.init, wanted.dtype)?,
            None => vb.get_unchecked_dtype(name, wanted.dtype)?,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.contains_tensor(name)
    }
}
