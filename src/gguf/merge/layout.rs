//! What a merged file consists of.

use crate::gguf::architecture::{HEAD, MODEL};
use crate::gguf::file::File;
use crate::gguf::ggml_dtype::row_bytes;
use crate::gguf::header::TensorInfo;
use crate::gguf::names::Names;
use crate::gguf::writer::u32;
use crate::merge::Plan;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;

const FILE_TYPE: &str = "general.file_type";
const QUANTIZATION_VERSION: &str = "general.quantization_version";

/// llama.cpp's numbers of files that are mostly of one dtype.
const FILE_TYPES: [(GgmlDType, u32); 13] = [
    (GgmlDType::F32, 0),
    (GgmlDType::F16, 1),
    (GgmlDType::Q4_0, 2),
    (GgmlDType::Q4_1, 3),
    (GgmlDType::Q8_0, 7),
    (GgmlDType::Q5_0, 8),
    (GgmlDType::Q5_1, 9),
    (GgmlDType::Q2K, 10),
    (GgmlDType::Q3K, 11),
    (GgmlDType::Q4K, 14),
    (GgmlDType::Q5K, 16),
    (GgmlDType::Q6K, 18),
    (GgmlDType::BF16, 32),
];

/// A tensor of the merged file.
pub(super) struct Item<'a> {
    pub name: &'a str,
    /// The base's tensor that it comes from.
    pub source: &'a str,
    pub info: &'a TensorInfo,
    /// Hugging Face's name, if the adapter changes it.
    pub changed: Option<String>,
    pub dtype: GgmlDType,
    pub bytes: u64,
}

/// The tensors in the base's order; changed matrices have the given dtype.
pub(super) fn items<'a>(
    base: &'a File,
    names: &Names,
    plan: &Plan,
    dtype: GgmlDType,
) -> Result<Vec<Item<'a>>> {
    if !FILE_TYPES.iter().any(|(known, _)| *known == dtype) {
        let reason = "llama.cpp has no files of it";
        return Err(Error::unsupported(format!("merging into {dtype:?}"), reason));
    }
    let mut tensors: Vec<_> = base.tensors().collect();
    tensors.sort_by_key(|(_, info)| info.bytes.start);
    let item = |(name, info): &(&'a str, &'a TensorInfo)| {
        let (name, info) = (*name, *info);
        let changed = names.hugging_face(name).filter(|own| plan.changes(own));
        let (dtype, bytes) = stored(name, info, changed.is_some(), dtype)?;
        Ok(Item { name, source: name, info, changed, dtype, bytes })
    };
    let mut items = tensors.iter().map(item).collect::<Result<Vec<_>>>()?;
    items.extend(own_head(base, names, plan, dtype)?);
    Ok(items)
}

/// A head that the base ties to its embeddings, and that the adapter unties.
fn own_head<'a>(
    base: &'a File,
    names: &Names,
    plan: &Plan,
    dtype: GgmlDType,
) -> Result<Option<Item<'a>>> {
    let Some((head, _)) = plan.untied().next() else { return Ok(None) };
    if names.hugging_face(HEAD.0).as_deref() != Some(head) {
        let reason = "the adapter changes it or the embeddings, to which the base ties it, and a file of this \
                      architecture cannot have it apart";
        return Err(Error::tensor(head, reason));
    }
    let (source, _) = MODEL[0];
    let info = base.info(source)?;
    let changed = plan.changes(head).then(|| head.to_owned());
    let (dtype, bytes) = stored(source, info, changed.is_some(), dtype)?;
    Ok(Some(Item { name: HEAD.0, source, info, changed, dtype, bytes }))
}

/// The dtype and the size of a tensor in the merged file.
fn stored(
    name: &str,
    info: &TensorInfo,
    is_changed: bool,
    dtype: GgmlDType,
) -> Result<(GgmlDType, u64)> {
    let dtype = if is_changed && info.dims.len() == 2 { dtype } else { info.dtype };
    let bytes = match dtype == info.dtype {
        true => Some(info.bytes.end - info.bytes.start),
        false => bytes(dtype, &info.dims),
    };
    let bytes = bytes.ok_or_else(|| {
        let reason = format!(
            "blocks of {} values ({dtype:?}) do not divide a row of its shape {:?}",
            dtype.block_size(),
            info.dims
        );
        Error::tensor(name, reason)
    })?;
    Ok((dtype, bytes))
}

fn bytes(dtype: GgmlDType, dims: &[usize]) -> Option<u64> {
    let (width, rows) = dims.split_last()?;
    let rows = rows.iter().try_fold(1usize, |product, rows| product.checked_mul(*rows))?;
    row_bytes(dtype, *width)?.checked_mul(rows)?.try_into().ok()
}

/// The base's metadata, with the number of the dtype that most of the merged file has.
pub(super) fn metadata(base: &File, items: &[Item]) -> Result<Vec<Vec<u8>>> {
    let mostly = |dtype: &dyn Fn(&Item) -> GgmlDType| {
        let values = |wanted: GgmlDType| -> usize {
            let of = items.iter().filter(|item| item.info.dims.len() > 1 && dtype(item) == wanted);
            of.map(|item| item.info.dims.iter().product::<usize>()).sum()
        };
        FILE_TYPES.iter().max_by_key(|(dtype, _)| values(*dtype)).map(|(_, number)| *number)
    };
    let (before, after) = (mostly(&|item| item.info.dtype), mostly(&|item| item.dtype));
    let header = base.header();
    let mut metadata = vec![];
    for (key, range) in &header.entries {
        metadata.push(match after.filter(|after| key == FILE_TYPE && before != Some(*after)) {
            Some(after) => u32(key, after),
            None => base.range(range)?,
        });
    }
    let quantized = |dtype: GgmlDType| dtype.block_size() > 1;
    let first = items.iter().any(|item| quantized(item.dtype))
        && !items.iter().any(|item| quantized(item.info.dtype));
    if first && !header.metadata.contains_key(QUANTIZATION_VERSION) {
        // The only one since 2023.
        metadata.push(u32(QUANTIZATION_VERSION, 2));
    }
    Ok(metadata)
}
