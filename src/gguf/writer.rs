//! Writes a file: its header, and the tensors one after another.

use super::ggml_dtype::number;
use super::reader::malformed;
use crate::Result;
use candle_core::quantized::GgmlDType;
use std::io::Write;

/// A tensor to be written: its name, dtype, dimensions as in candle, and size in bytes.
pub(super) struct Entry<'a> {
    pub name: &'a str,
    pub dtype: GgmlDType,
    pub dims: &'a [usize],
    pub bytes: u64,
}

/// A key with a string, as in a file.
pub(super) fn string(key: &str, value: &str) -> Vec<u8> {
    [with_length(key), 8u32.to_le_bytes().to_vec(), with_length(value)].concat()
}

/// A key with an `f32`, as in a file.
pub(super) fn f32(key: &str, value: f32) -> Vec<u8> {
    [with_length(key), 6u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat()
}

/// A key with a `u32`, as in a file.
pub(super) fn u32(key: &str, value: u32) -> Vec<u8> {
    [with_length(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat()
}

fn with_length(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A file that is being written. The bytes of each tensor follow by [`tensor`](Self::tensor).
pub(super) struct Writer<W> {
    out: W,
    alignment: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header of version 3, with metadata as in a file, and tensors in their order.
    pub fn new(
        mut out: W,
        metadata: &[Vec<u8>],
        tensors: &[Entry<'_>],
        alignment: u64,
    ) -> Result<Self> {
        let mut header = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        metadata.iter().for_each(|entry| header.extend(entry));
        let mut offset = 0u64;
        for Entry { name, dtype, dims, bytes } in tensors {
            header.extend(with_length(name));
            header.extend((dims.len() as u32).to_le_bytes());
            dims.iter().rev().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
            header.extend(number(*dtype).to_le_bytes());
            header.extend(offset.to_le_bytes());
            let end = offset.checked_add(*bytes).and_then(|end| padded(end, alignment));
            offset = end.ok_or_else(|| malformed("its tensors are larger than any file"))?;
        }
        out.write_all(&header)?;
        let mut writer = Self { out, alignment };
        writer.pad(header.len() as u64)?;
        Ok(writer)
    }

    /// Writes the bytes of the next tensor.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let padding = padded(size, self.alignment).map_or(0, |padded| padded - size);
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut self.out)?;
        Ok(())
    }
}

fn padded(size: u64, alignment: u64) -> Option<u64> {
    size.checked_next_multiple_of(alignment)
}
