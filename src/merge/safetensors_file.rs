//! An open safetensors file that is merged tensor by tensor.

use super::plan::Plan;
use crate::ops::checked_elem_count;
use crate::utils::checkpoint::safetensors::malformed;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, View};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

pub(super) struct SafetensorsFile {
    file: File,
    /// The header with its length, as in the file.
    start: Vec<u8>,
    pub header: Metadata,
    /// The length of the data after the header.
    pub data: u64,
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut start = vec![0; 8];
        file.read_exact(&mut start).map_err(|_| malformed("it has no header"))?;
        let size = start.iter().rev().fold(0u64, |n, &b| (n << 8) | u64::from(b));
        let Some(data) = length.checked_sub(8).and_then(|rest| rest.checked_sub(size)) else {
            return Err(malformed(format!("its header has {size} bytes, the file {length}")));
        };
        (&mut file).take(size).read_to_end(&mut start)?;
        let header: Metadata = start
            .get(8..)
            .and_then(|json| serde_json::from_slice(json).ok())
            .ok_or_else(|| malformed("its header is not that of a safetensors file"))?;
        let opened = Self { file, start, header, data };
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

    fn range(&self, name: &str) -> Result<(u64, u64)> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is missing"))?;
        Ok((info.data_offsets.0 as u64, info.data_offsets.1 as u64))
    }

    /// Writes the file to `out` with the changes of the plan.
    pub fn merge(
        &mut self,
        plan: &Plan,
        out: &mut File,
        advance: &mut dyn FnMut(u64),
    ) -> Result<()> {
        out.write_all(&self.start)?;
        self.file.seek(SeekFrom::Start(self.start.len() as u64))?;
        for name in self.header.offset_keys() {
            let (from, to) = self.range(&name)?;
            if plan.changes(&name) {
                let changed = plan.apply(&name, &self.read(&name, (to - from) as usize)?)?;
                let Some(changed) = changed else { continue };
                out.write_all(&View::data(&changed))?;
            } else {
                let copied = io::copy(&mut (&mut self.file).take(to - from), out)?;
                if copied != to - from {
                    return Err(Error::tensor(name, "the file was truncated meanwhile"));
                }
            }
            advance(to - from);
        }
        Ok(())
    }

    /// Reads the tensor at the file's position.
    fn read(&mut self, name: &str, size: usize) -> Result<Tensor> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is missing"))?;
        let mut bytes = vec![0; size];
        self.file.read_exact(&mut bytes)?;
        let dtype = DType::try_from(info.dtype).map_err(|e| Error::tensor(name, e))?;
        let count =
            checked_elem_count(&info.shape).and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        if count != Some(size) {
            let reason = format!("it has {size} bytes for the shape {:?} of {dtype:?}", info.shape);
            return Err(Error::tensor(name, reason));
        }
        Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)
            .map_err(|e| Error::tensor(name, e))
    }
}
