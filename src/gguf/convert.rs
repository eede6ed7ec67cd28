//! Tensors of a file as Hugging Face has them, and back.

use super::file::{blocks, File};
use super::names::Names;
use super::rows;
use crate::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};

/// The blocks of a tensor, with the rows in Hugging Face's order.
pub(super) fn quantized(
    file: &File,
    names: &Names,
    name: &str,
    device: &Device,
) -> Result<QTensor> {
    let info = file.info(name)?;
    let bytes = file.bytes(info)?;
    let bytes = match names.interleaved(name) {
        None => bytes,
        Some(heads) => {
            let rows = info.dims.first().copied().unwrap_or(0);
            let moved = rows::in_file(rows, heads)
                .and_then(|order| rows::reordered(&bytes, info.row_bytes, &order));
            moved.ok_or_else(|| Error::tensor(name, format!("it has no {heads} heads")))?
        }
    };
    blocks(info, bytes, device).map_err(|e| Error::tensor(name, e))
}

/// The values of a tensor in F32 on the CPU, where every dtype can be decoded.
pub(super) fn dense(file: &File, names: &Names, name: &str) -> Result<Tensor> {
    let tensor = quantized(file, names, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
    match names.shift(name) {
        0. => Ok(tensor),
        shift => Ok((tensor + shift)?),
    }
}

/// The values as the file has them: the inverse of [`dense`].
pub(super) fn stored(names: &Names, name: &str, tensor: Tensor) -> Result<Tensor> {
    let tensor = match names.shift(name) {
        0. => tensor,
        shift => (tensor - shift)?,
    };
    let Some(heads) = names.interleaved(name) else { return Ok(tensor) };
    let order = rows::in_hugging_face(tensor.dim(0)?, heads)
        .ok_or_else(|| Error::tensor(name, format!("it has no {heads} heads")))?;
    Ok(rows::selected(&tensor, order)?)
}
