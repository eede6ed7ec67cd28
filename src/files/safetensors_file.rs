//! An open safetensors file, of which one tensor at a time is read.

use super::read::refuse_other_kinds;
use super::safetensors::{self, malformed};
use crate::ops::checked_elem_count;
use crate::{Error, Result};
use ::safetensors::tensor::{Metadata, TensorInfo, View};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Take, Write};
use std::path::Path;

#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    file: File,
    /// The header with its length, as in the file.
    start: Vec<u8>,
    pub header: Metadata,
    /// The length of the data after the header.
    pub length: u64,
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut start = vec![0; 8];
        file.read_exact(&mut start).map_err(|_| malformed("it has no header"))?;
        refuse_other_kinds(&start)?;
        let size = start.iter().rev().fold(0u64, |n, &b| (n << 8) | u64::from(b));
        let Some(data) = length.checked_sub(8).and_then(|rest| rest.checked_sub(size)) else {
            return Err(malformed(format!("its header has {size} bytes, the file {length}")));
        };
        (&mut file).take(size).read_to_end(&mut start)?;
        let header: Metadata = start
            .get(8..)
            .and_then(|json| serde_json::from_slice(json).ok())
            .ok_or_else(|| malformed("its header is not that of a safetensors file"))?;
        let opened = Self { file, start, header, length: data };
        let mut end = 0;
        for name in opened.header.offset_keys() {
            let (from, to) = opened.range(&name)?;
            if from != end || to < from {
                return Err(Error::tensor(
                    name,
                    format!("its data is at {from}..{to}, expected at {end}"),
                ));
            }
            end = to;
        }
        if end == data {
            Ok(opened)
        } else {
            Err(malformed(format!("it has {data} bytes of data, its tensors {end}")))
        }
    }

    /// The start of this file with copies of some tensors under new names, and with others, whose data follows.
    pub fn start_with(
        &self,
        copies: &[(&str, &str)],
        others: &BTreeMap<&str, Tensor>,
    ) -> Result<Vec<u8>> {
        if copies.is_empty() && others.is_empty() {
            return Ok(self.start.clone());
        }
        let names = self.header.offset_keys();
        let own = names.into_iter().map(|name| Ok((name.clone(), self.info(&name)?.clone())));
        let mut infos = own.collect::<Result<Vec<_>>>()?;
        let mut push = |name: &str, info: TensorInfo, size: usize| {
            let start = infos.last().map_or(0, |(_, info)| info.data_offsets.1);
            let data_offsets = (start, start + size);
            infos.push((name.to_owned(), TensorInfo { data_offsets, ..info }));
        };
        for (new, of) in copies {
            let info = self.info(of)?.clone();
            let (from, to) = info.data_offsets;
            push(new, info, to - from);
        }
        for (name, tensor) in others {
            let (dtype, shape) = (View::dtype(tensor), tensor.dims().to_vec());
            let info = TensorInfo { dtype, shape, data_offsets: (0, 0) };
            push(name, info, View::data_len(tensor));
        }
        let header = Metadata::new(self.header.metadata().clone(), infos).map_err(malformed)?;
        safetensors::start(&header)
    }

    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let TensorInfo { dtype, shape, .. } = self.info(name)?.clone();
        let dtype = DType::try_from(dtype).map_err(|e| Error::tensor(name, e))?;
        let count = checked_elem_count(&shape);
        let data = self.data(name)?;
        let size = data.limit();
        match count.filter(|n| n.checked_mul(dtype.size_in_bytes()) == usize::try_from(size).ok()) {
            Some(count) => tensor(data, dtype, &shape, count).map_err(|e| Error::tensor(name, e)),
            None => {
                let reason = format!("it has {size} bytes for the shape {shape:?} of {dtype:?}");
                Err(Error::tensor(name, reason))
            }
        }
    }

    /// Copies a tensor's bytes to `out`.
    pub fn copy(&mut self, name: &str, out: &mut impl Write) -> Result<()> {
        let mut data = self.data(name)?;
        io::copy(&mut data, out)?;
        match data.limit() {
            0 => Ok(()),
            _ => Err(Error::tensor(name, "the file was truncated meanwhile")),
        }
    }

    /// The number of a tensor's bytes.
    pub fn size(&self, name: &str) -> Result<u64> {
        let (from, to) = self.range(name)?;
        Ok(to - from)
    }

    /// A tensor's bytes.
    fn data(&mut self, name: &str) -> Result<Take<&mut File>> {
        let (from, to) = self.range(name)?;
        self.file.seek(SeekFrom::Start(self.start.len() as u64 + from))?;
        Ok((&mut self.file).take(to - from))
    }

    fn range(&self, name: &str) -> Result<(u64, u64)> {
        let (from, to) = self.info(name)?.data_offsets;
        Ok((from as u64, to as u64))
    }

    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| Error::tensor(name, "it is missing"))
    }
}

/// A tensor of `count` values. F32 needs no second buffer of its size, which matters for the largest of a model.
fn tensor(
    mut data: impl Read,
    dtype: DType,
    shape: &[usize],
    count: usize,
) -> candle_core::Result<Tensor> {
    if dtype == DType::F32 {
        let (mut values, mut part) = (Vec::with_capacity(count), vec![0; 1 << 16]);
        while values.len() < count {
            let length = part.len().min(4 * (count - values.len()));
            let part = &mut part[..length];
            data.read_exact(part)?;
            values.extend(part.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        return Tensor::from_vec(values, shape, &Device::Cpu);
    }
    let mut bytes = vec![0; count * dtype.size_in_bytes()];
    data.read_exact(&mut bytes)?;
    Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)
}
