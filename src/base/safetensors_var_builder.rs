//! A `VarBuilder` that reads the tensors of safetensors files one at a time.

use super::source::{from_source, Source, Wanted};
use crate::files::check_finite;
use crate::files::fp8::{scaled, scales_of};
use crate::files::safetensors_file::SafetensorsFile;
use crate::files::shards::Shards;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::tensor::{Dtype, TensorInfo};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A `VarBuilder` over a safetensors file, all shards of an index (`model.safetensors.index.json`), or a
/// folder with either.
///
/// Each tensor is read when a layer asks for it and converted to `dtype`: the peak of memory is the model and
/// one tensor. Unlike with [`VarBuilder::from_mmaped_safetensors`], no `unsafe` is needed, and a file that is
/// truncated meanwhile is an error instead of a crash. A weight in FP8 is multiplied by its scales (`weight_scale`,
/// `weight_scale_inv`, `scale_weight`; of the tensor, each row or each block). [`read_state_dict`](crate::read_state_dict) reads other
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
    Ok(from_source(Safetensors::open(path.as_ref())?, dtype, device))
}

/// The tensors of files.
pub(super) struct Safetensors {
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

impl Shard {
    fn file(&self) -> MutexGuard<'_, SafetensorsFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Safetensors {
    pub fn open(path: &Path) -> Result<Self> {
        let (mut shards, mut shard_of) = (vec![], HashMap::new());
        let files = Shards::find(path)?;
        for path in files.paths() {
            let file = SafetensorsFile::open(&path).map_err(|e| e.at(&path))?;
            for name in file.header.offset_keys() {
                if shard_of.insert(name.clone(), shards.len()).is_some() {
                    return Err(Error::tensor(name, "another shard has it too").at(&path));
                }
            }
            shards.push(Shard { path, file: Mutex::new(file) });
        }
        files.check(|name| shard_of.contains_key(name))?;
        Ok(Self { path: path.to_owned(), shards, shard_of })
    }

    fn shard(&self, name: &str) -> Result<&Shard> {
        let shard = self.shard_of.get(name).and_then(|&shard| self.shards.get(shard));
        shard.ok_or_else(|| Error::tensor(name, "it is missing").at(&self.path))
    }

    /// A tensor's dtype and shape, which is the expected one.
    pub fn info(&self, name: &str, wanted: &Wanted) -> Result<TensorInfo> {
        let shard = self.shard(name)?;
        let info = shard.file().info(name).cloned();
        let checked = info.and_then(|info| wanted.check(name, &info.shape).map(|()| info));
        checked.map_err(|e| e.at(&shard.path))
    }

    /// A tensor in its own dtype, on the CPU.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let shard = self.shard(name)?;
        let tensor = shard.file().read(name);
        // A parallel loop: the lock of the file is free again.
        let checked = tensor.and_then(|tensor| check_finite(name, &tensor).map(|()| tensor));
        checked.map_err(|e| e.at(&shard.path))
    }
}

impl Source for Safetensors {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let info = self.info(name, wanted)?;
        let tensor = self.read(name)?;
        let scale = scales_of(name).find(|scale| self.has(scale));
        match scale.filter(|_| info.dtype == Dtype::F8_E4M3) {
            None => wanted.convert(name, &tensor),
            Some(scale) => wanted.convert(name, &scaled(name, &tensor, &self.read(&scale)?)?),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }
}
