//! Reads a header's values one after another, none beyond the end of the file.

use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use std::io::Read;

/// The nesting of arrays in a value; no known file has arrays in arrays.
const DEPTH: usize = 4;

/// The most items of one or two bytes in an array: in memory each takes 32 bytes. Tokenizers have up to 2¹⁸.
const MOST_SMALL_ITEMS: u64 = 1 << 20;

pub(super) struct Reader<R> {
    inner: R,
    /// The bytes read so far.
    pub at: u64,
    /// The bytes of the whole file.
    length: u64,
}

pub(super) fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "GGUF", reason: reason.to_string() }
}

impl<R: Read> Reader<R> {
    pub fn new(inner: R, length: u64) -> Self {
        Self { inner, at: 0, length }
    }

    /// An error if the file ends within the next `size` bytes, before anything is allocated for them.
    fn advance(&mut self, size: u64) -> Result<()> {
        match self.at.checked_add(size).filter(|end| *end <= self.length) {
            Some(end) => self.at = end,
            None => {
                let left = self.length.saturating_sub(self.at);
                let reason = format!("its header needs {size} bytes more, the file has {left}");
                return Err(malformed(reason));
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.advance(N as u64)?;
        self.inner.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The bytes of a string. Old files have strings that are not UTF-8.
    fn string_bytes(&mut self) -> Result<Vec<u8>> {
        let size = self.u64()?;
        self.advance(size)?;
        let size = usize::try_from(size).map_err(malformed)?;
        let mut bytes = vec![0; size];
        self.inner.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The name of a key or a tensor.
    pub fn name(&mut self) -> Result<String> {
        String::from_utf8(self.string_bytes()?).map_err(|error| {
            malformed(format!(
                "the name {:?} is not UTF-8",
                String::from_utf8_lossy(error.as_bytes())
            ))
        })
    }

    /// A value after the number of its type.
    pub fn value(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        self.value_of(kind, 0)
    }

    fn value_of(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match u8::from_le_bytes(self.array()?) {
                flag @ (0 | 1) => Value::Bool(flag == 1),
                byte => return Err(malformed(format!("a boolean is {byte}"))),
            },
            8 => Value::String(String::from_utf8_lossy(&self.string_bytes()?).into_owned()),
            9 if depth < DEPTH => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let is_many = (MOST_SMALL_ITEMS + 1..=self.length).contains(&count);
                if matches!(kind, 0..=3 | 7) && is_many {
                    let reason = "no known metadata has so many, which take much more memory than in the file";
                    let what =
                        format!("an array of {count} bytes or 16-bit integers in the metadata");
                    return Err(Error::unsupported(what, reason));
                }
                let mut items = vec![];
                // An item has a byte at least: a count beyond the file is an error before the end of it.
                for _ in 0..count {
                    items.push(self.value_of(kind, depth + 1)?);
                }
                Value::Array(items)
            }
            9 => return Err(malformed(format!("arrays are nested more than {DEPTH} times"))),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            kind => return Err(malformed(format!("a value has the unknown type {kind}"))),
        })
    }
}
