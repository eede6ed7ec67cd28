//! A `VarBuilder` that reads the tensors of safetensors files one at a time.

use crate::files::check_finite;
use crate::files::safetensors_file::SafetensorsFile;
use crate::files::shards::Shards;
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A `VarBuilder` over a safetensors file, all shards of an index (`model.safetensors.index.json`), or a
/// folder with either.
///
/// Each tensor is read when a layer asks for it and converted to `dtype`: the peak of memory is the model and
/// one tensor. Unlike with [`VarBuilder::from_mmaped_safetensors`], no `unsafe` is needed, and a file that is
/// truncated meanwhile is an error instead of a crash. [`read_state_dict`](crate::read_state_dict) reads other
/// formats.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device};
///
/// let base = loralib::safetensors_var_builder("SmolLM2-135M", DType::F32, &Device::Cpu)?;
/// # let _ = base; Ok(()) }
/// ```
///
/// # Errors
/// If a file cannot be read or is malformed, or two shards have the same tensor. When a layer is built: if its
/// tensor is missing, has another shape, or is not finite. The error names the file and the tensor.
pub fn safetensors_var_builder(
    path: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let disk = Disk::open(path.as_ref())?;
    Ok(VarBuilder::from_backend(Box::new(disk), dtype, device.clone()))
}

/// The tensors of files.
pub(super) struct Disk {
    /// What was opened, for messages.
    path: PathBuf,
    shards: Vec<Shard>,
    /// The shard of each tensor.
    shard_of: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    file: Mutex<SafetensorsFile>,
}

impl Disk {
    pub fn open(path: &Path) -> Result<Self> {
        let (mut shards, mut shard_of) = (vec![], HashMap::new());
        for path in Shards::find(path)?.paths() {
            let file = SafetensorsFile::open(&path).map_err(|e| e.at(&path))?;
            for name in file.header.offset_keys() {
                if shard_of.insert(name.clone(), shards.len()).is_some() {
                    return Err(Error::tensor(name, "another shard has it too").at(&path));
                }
            }
            shards.push(Shard { path, file: Mutex::new(file) });
        }
        Ok(Self { path: path.to_owned(), shards, shard_of })
    }

    /// A tensor in its own dtype, on the CPU.
    pub fn read(&self, name: &str, wanted: Option<&Shape>) -> Result<Tensor> {
        let Some(shard) = self.shard_of.get(name).and_then(|&shard| self.shards.get(shard)) else {
            return Err(Error::tensor(name, "it is missing").at(&self.path));
        };
        let read = || {
            let tensor = shard.file.lock().unwrap_or_else(PoisonError::into_inner).read(name)?;
            if let Some(wanted) = wanted.filter(|wanted| *wanted != tensor.shape()) {
                let reason = format!("its shape is {:?}, expected {wanted:?}", tensor.shape());
                return Err(Error::tensor(name, reason));
            }
            check_finite(name, &tensor)?;
            Ok(tensor)
        };
        read().map_err(|e| e.at(&shard.path))
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
        self.read(name, Some(&shape))?.to_device(dev)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.read(name, None)?.to_device(dev)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }
}
