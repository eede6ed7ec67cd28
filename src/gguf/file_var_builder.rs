//! The source that reads a file's tensors by Hugging Face's names.

use super::convert::{dense, quantized};
use super::file::File;
use super::names::Names;
use crate::base::cache::Cache;
use crate::base::quantized::stays_quantized;
use crate::base::source::{Source, Wanted};
use crate::layers::binding::placeholder::{placeholder, Placeholder};
use crate::{Error, Result};
use candle_core::{DType, DeviceLocation, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The tensors of a file, by Hugging Face's names.
pub(super) struct FileTensors {
    file: File,
    architecture: Names,
    /// The file's names by Hugging Face's.
    names: BTreeMap<String, String>,
    matrices: Cache<Key, Placeholder>,
    /// All other tensors.
    dense: Cache<Key, Tensor>,
}

type Key = (String, DeviceLocation, DType);

impl FileTensors {
    pub fn new(file: &File) -> Result<Self> {
        let architecture = Names::of(file)?;
        let names = architecture.all(file)?;
        let (matrices, dense) = Default::default();
        Ok(Self { file: file.clone(), architecture, names, matrices, dense })
    }

    fn read(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let gguf = self.names.get(name);
        let gguf = gguf.ok_or_else(|| Error::tensor(name, "the file does not have it"))?;
        let info = self.file.info(gguf)?;
        wanted.check(name, &info.dims)?;
        let Wanted { dtype, device, .. } = *wanted;
        let key = (gguf.clone(), device.location(), dtype);
        if !stays_quantized(info.dtype, &info.dims, wanted) {
            return self.dense.get(key, || {
                let tensor = dense(&self.file, &self.architecture, gguf)?;
                Ok(tensor.to_dtype(dtype)?.to_device(device)?)
            });
        }
        let matrix = self.matrices.get(key, || {
            let blocks = quantized(&self.file, &self.architecture, gguf, device)?;
            Ok(placeholder(Arc::new(blocks), dtype)?)
        })?;
        Ok(matrix.tensor.clone())
    }
}

impl Source for FileTensors {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        self.read(name, wanted).map_err(|e| e.at(self.file.path()))
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }
}
