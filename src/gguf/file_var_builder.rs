//! A `VarBuilder` that reads a file's tensors by Hugging Face's names.

use super::convert::{dense, quantized};
use super::file::File;
use super::names::Names;
use super::var_builder::{stays_quantized, wrong_shape};
use crate::layers::{dequantized, placeholder};
use crate::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, DeviceLocation, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) fn file_var_builder(
    file: &File,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let disk = Disk::new(file)?;
    Ok(VarBuilder::from_backend(Box::new(disk), dtype, device.clone()))
}

/// [`file_var_builder`] with dense tensors alone.
pub(super) fn dense_var_builder(
    file: &File,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let backend = Dense(file_var_builder(file, dtype, device)?);
    Ok(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))
}

/// Dequantises the placeholders of a `VarBuilder`.
struct Dense(VarBuilder<'static>);

impl SimpleBackend for Dense {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        hint: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle_core::Result<Tensor> {
        let vb = self.0.clone().set_device(dev.clone());
        dequantized(vb.get_with_hints_dtype(shape, name, hint, dtype)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        dequantized(self.0.clone().set_device(dev.clone()).get_unchecked_dtype(name, dtype)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

/// The tensors of a file, by Hugging Face's names.
pub(super) struct Disk {
    file: File,
    architecture: Names,
    /// The file's names by Hugging Face's.
    names: BTreeMap<String, String>,
    /// What has been read. The lock is held while reading: one tensor at a time.
    blocks: Mutex<HashMap<(String, DeviceLocation), Arc<QTensor>>>,
    dense: Mutex<HashMap<(String, DeviceLocation, DType), Tensor>>,
}

impl Disk {
    pub fn new(file: &File) -> Result<Self> {
        let architecture = Names::of(file)?;
        let names = architecture.all(file)?;
        let (blocks, dense) = Default::default();
        Ok(Self { file: file.clone(), architecture, names, blocks, dense })
    }

    /// The blocks of a matrix, always the same ones.
    pub fn blocks(&self, gguf: &str, device: &Device) -> Result<Arc<QTensor>> {
        let mut read = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (gguf.to_owned(), device.location());
        if let Some(blocks) = read.get(&key) {
            return Ok(blocks.clone());
        }
        let blocks = Arc::new(quantized(&self.file, &self.architecture, gguf, device)?);
        read.insert(key, blocks.clone());
        Ok(blocks)
    }

    fn dense(&self, gguf: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut read = self.dense.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (gguf.to_owned(), device.location(), dtype);
        if let Some(tensor) = read.get(&key) {
            return Ok(tensor.clone());
        }
        let tensor = dense(&self.file, &self.architecture, gguf)?;
        let tensor = tensor.to_dtype(dtype)?.to_device(device)?;
        read.insert(key, tensor.clone());
        Ok(tensor)
    }

    fn give(
        &self,
        name: &str,
        wanted: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let Some(gguf) = self.names.get(name) else {
            return Err(Error::tensor(name, "the file does not have it"));
        };
        let info = self.file.info(gguf)?;
        if let Some(wanted) = wanted.filter(|wanted| wanted.dims() != info.dims) {
            return Err(wrong_shape(name, &info.dims, wanted));
        }
        if stays_quantized(info.dtype, &info.dims, device) {
            Ok(placeholder(&self.blocks(gguf, device)?, dtype)?)
        } else {
            self.dense(gguf, dtype, device)
        }
    }
}

impl SimpleBackend for Disk {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle_core::Result<Tensor> {
        self.give(name, Some(&shape), dtype, dev).map_err(|e| e.at(self.file.path()).into())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.give(name, None, dtype, dev).map_err(|e| e.at(self.file.path()).into())
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }
}
