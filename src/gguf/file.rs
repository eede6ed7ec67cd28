//! An open file: its header in memory, its tensors on disk.

use super::header::{Header, TensorInfo};
use super::metadata::{required, Metadata};
use super::reader::malformed;
use crate::{Error, Result};
use candle_core::quantized::{gguf_file::Value, QStorage, QTensor};
use candle_core::Device;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A GGUF file, of which only the header is in memory. A clone is the same file.
///
/// Hugging Face's names and configuration are known for the architectures `llama` (also Mistral, SmolLM2
/// and others), `qwen2`, `qwen3`, `gemma`, `gemma2`, `gemma3` and `phi3`. For other models there are
/// [`tensor`](Self::tensor) and [`var_builder`](super::var_builder).
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// # #[derive(serde::Deserialize)] struct Config {}
/// use candle_core::{DType, Device};
/// use loralib::gguf;
/// let file = gguf::File::open("model-q4_0.gguf")?;
/// let config: Config = file.config()?; // that of a model of candle-transformers
/// let vb = file.var_builder(DType::F32, &Device::Cpu)?; // for the model on `lora::nn`
/// let tokenizer = file.tokenizer_json()?; // for `tokenizers::Tokenizer::from_bytes`
/// # let _ = (config, vb, tokenizer); Ok(()) }
/// ```
#[derive(Clone)]
pub struct File(Arc<Inner>);

struct Inner {
    path: PathBuf,
    architecture: String,
    header: Header,
    file: Mutex<fs::File>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("path", &self.path())
            .field("architecture", &self.architecture())
            .field("tensors", &self.0.header.tensors.len())
            .finish()
    }
}

impl File {
    /// Opens a file of version 2 or 3 and reads its header. It stays open: replacing it by another file has
    /// no effect.
    ///
    /// # Errors
    /// If the file cannot be read, is not a GGUF file, is one of several files of a model, or has no
    /// architecture; if a tensor appears twice, has a dtype that candle does not know, rows that are not
    /// whole blocks, or is not where llama.cpp expects it; and if the file ends before its tensors do. The
    /// error names the file, and the tensor or the metadata.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::open_at(path).map_err(|error| error.at(path))
    }

    fn open_at(path: &Path) -> Result<Self> {
        let file = fs::File::open(path)?;
        let header = Header::read(BufReader::new(&file), file.metadata()?.len())?;
        let key = "general.architecture";
        let architecture = required(key, Metadata(&header.metadata).string(key)?)?.to_owned();
        let (path, file) = (path.to_owned(), Mutex::new(file));
        Ok(Self(Arc::new(Inner { path, architecture, header, file })))
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The metadata `general.architecture`, such as `llama`.
    pub fn architecture(&self) -> &str {
        &self.0.architecture
    }

    /// The metadata by key.
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.0.header.metadata
    }

    /// The names of the tensors as in the file, sorted, such as `blk.0.attn_q.weight`.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors().map(|(name, _)| name)
    }

    /// Reads a tensor by its name in the file, as it is stored: q and k of `llama` have their rows in the
    /// order of llama.cpp, and Gemma's norms are 1 + w.
    ///
    /// # Errors
    /// If there is no such tensor, it is a scalar, or the file cannot be read. The error names both.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<QTensor> {
        self.read(name, device).map_err(|error| error.at(self.path()))
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.0.header.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    pub(super) fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.0.header.tensors.get(name)
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.find(name).ok_or_else(|| Error::tensor(name, "the file does not have it"))
    }

    /// [`File::tensor`], with errors that do not name the file.
    pub(super) fn read(&self, name: &str, device: &Device) -> Result<QTensor> {
        let info = self.info(name)?;
        blocks(info, self.bytes(info)?, device).map_err(|e| Error::tensor(name, e))
    }

    /// The bytes of a tensor.
    pub(super) fn bytes(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        self.range(&info.bytes)
    }

    /// Bytes of the file.
    pub(super) fn range(&self, range: &Range<u64>) -> Result<Vec<u8>> {
        let size = range.end.saturating_sub(range.start);
        let mut bytes = vec![0; usize::try_from(size).map_err(malformed)?];
        let mut file = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(range.start))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn header(&self) -> &Header {
        &self.0.header
    }
}

/// A tensor of these bytes.
pub(super) fn blocks(
    info: &TensorInfo,
    bytes: Vec<u8>,
    device: &Device,
) -> candle_core::Result<QTensor> {
    let storage = QStorage::from_data(Cow::Owned(bytes), device, info.dtype)?;
    QTensor::new(storage, info.dims.as_slice())
}
