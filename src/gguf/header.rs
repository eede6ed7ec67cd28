//! A file's header: the metadata, and where each tensor is.

use super::ggml_dtype::{dtype, row_bytes};
use super::metadata::Metadata;
use super::reader::{malformed, Reader};
use crate::ops::checked_product;
use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::GgmlDType;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::ops::Range;

/// The alignment of a file that does not tell.
const ALIGNMENT: usize = 32;

/// ggml's largest number of dimensions.
const RANK: u32 = 4;

pub(super) struct Header {
    pub metadata: HashMap<String, Value>,
    /// The keys in the file's order, with the bytes of the file that have key, type and value.
    pub entries: Vec<(String, Range<u64>)>,
    /// The start of a tensor is a multiple of it.
    pub alignment: u64,
    /// By name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

pub(super) struct TensorInfo {
    pub dtype: GgmlDType,
    /// As in candle: the last one is that of a row.
    pub dims: Vec<usize>,
    /// The bytes of the file.
    pub bytes: Range<u64>,
    pub row_bytes: usize,
}

impl Header {
    /// Reads the header of a file of `length` bytes, and checks the place of every tensor.
    pub fn read(file: impl Read, length: u64) -> Result<Self> {
        let mut reader = Reader::new(file, length);
        match reader.u32()?.to_le_bytes() {
            [b'G', b'G', b'U', b'F'] => {}
            _ => return Err(malformed("it does not start with GGUF")),
        }
        match reader.u32()? {
            2 | 3 => {}
            // 3 with the bytes in the other order
            0x0300_0000 => return Err(Error::unsupported("this file", "it is big-endian")),
            version => {
                let what = format!("version {version} of GGUF");
                return Err(Error::unsupported(what, "the known ones are 2 and 3"));
            }
        }
        let (tensor_count, entry_count) = (reader.u64()?, reader.u64()?);
        let (mut metadata, mut entries) = (HashMap::new(), vec![]);
        for _ in 0..entry_count {
            let start = reader.at;
            let key = reader.name()?;
            if metadata.insert(key.clone(), reader.value()?).is_some() {
                return Err(malformed(format!("it has the metadata {key:?} twice")));
            }
            entries.push((key, start..reader.at));
        }
        refuse_split(&metadata)?;
        let alignment = alignment(&metadata)?;
        let infos = (0..tensor_count).map(|_| info(&mut reader)).collect::<Result<Vec<_>>>()?;
        let tensors = placed(infos, reader.at, alignment, length)?;
        Ok(Self { metadata, entries, alignment, tensors })
    }
}

/// A file that is one of several lacks the tensors of the others.
fn refuse_split(metadata: &HashMap<String, Value>) -> Result<()> {
    match Metadata(metadata).integer("split.count")? {
        None | Some(0 | 1) => Ok(()),
        Some(count) => Err(Error::unsupported(
            format!("a model in {count} files (the metadata \"split.count\")"),
            "merge them into one file with `llama-gguf-split --merge`",
        )),
    }
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    let key = "general.alignment";
    let alignment = Metadata(metadata).integer(key)?.unwrap_or(ALIGNMENT);
    match u32::try_from(alignment) {
        Ok(alignment) if alignment.is_power_of_two() => Ok(alignment.into()),
        _ => Err(malformed(format!("the metadata {key:?} is {alignment}, not a power of two"))),
    }
}

/// A tensor as the header describes it: its name, dtype, dimensions and offset.
type Info = (String, GgmlDType, Vec<usize>, u64);

fn info(reader: &mut Reader<impl Read>) -> Result<Info> {
    let name = reader.name()?;
    let rank = reader.u32()?;
    if rank > RANK {
        return Err(Error::tensor(name, format!("it has {rank} dimensions, more than {RANK}")));
    }
    let dims = (0..rank).map(|_| reader.u64()).collect::<Result<Vec<_>>>()?;
    let number = reader.u32()?;
    let offset = reader.u64()?;
    let dtype = dtype(number).map_err(|reason| Error::tensor(&name, reason))?;
    let dims: Option<Vec<usize>> = dims.iter().rev().map(|d| usize::try_from(*d).ok()).collect();
    match dims {
        Some(dims) if !dims.contains(&0) => Ok((name, dtype, dims, offset)),
        dims => Err(Error::tensor(name, format!("its shape is {dims:?}"))),
    }
}

/// The tensors with their bytes. As in llama.cpp, each follows the one before it, but for the alignment.
fn placed(
    infos: Vec<Info>,
    header: u64,
    alignment: u64,
    length: u64,
) -> Result<BTreeMap<String, TensorInfo>> {
    let mut tensors = BTreeMap::new();
    let too_large = || malformed("its tensors are larger than any file");
    let start = header.checked_next_multiple_of(alignment).ok_or_else(too_large)?;
    let mut end = start;
    for (name, dtype, dims, offset) in infos {
        let (width, rows) = dims.split_last().unwrap_or((&1, &[]));
        let Some(row_bytes) = row_bytes(dtype, *width) else {
            let reason = format!(
                "blocks of {} values ({dtype:?}) do not divide a row of its shape {dims:?}",
                dtype.block_size()
            );
            return Err(Error::tensor(name, reason));
        };
        let rows = checked_product(rows).map_err(|e| Error::tensor(&name, e))?;
        let size = row_bytes.checked_mul(rows).and_then(|size| u64::try_from(size).ok());
        let size = size.ok_or_else(|| Error::tensor(&name, format!("its shape is {dims:?}")))?;
        let from = end.checked_next_multiple_of(alignment).ok_or_else(too_large)?;
        if offset.checked_add(start) != Some(from) {
            let reason = format!("its data is at {offset}, expected at {}", from - start);
            return Err(Error::tensor(name, reason));
        }
        end = from.checked_add(size).ok_or_else(too_large)?;
        if end > length {
            let reason = format!("its data ends at byte {end}, the file at {length}");
            return Err(Error::tensor(name, reason));
        }
        let info = TensorInfo { dtype, dims, bytes: from..end, row_bytes };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(Error::tensor(name, "the file has it twice"));
        }
    }
    Ok(tensors)
}
