//! An open safetensors file, merged and copied tensor by tensor.

use super::elements;
use super::merge_plan::Plan;
use super::safetensors::malformed;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, View};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

pub(super) struct Shard {
    file: File,
    /// The header as it stands in the file, with its length before it.
    start: Vec<u8>,
    pub header: Metadata,
    /// The length of the data behind the header.
    pub data: u64,
}

impl Shard {
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut start = vec![0; 8];
        file.read_exact(&mut start).map_err(|_| malformed("no header"))?;
        let size = start.iter().rev().fold(0u64, |n, &b| (n << 8) | u64::from(b));
        let Some(data) = length.checked_sub(8).and_then(|rest| rest.checked_sub(size)) else {
            return Err(malformed(format!("a header of {size} bytes in a file of {length}")));
        };
        (&mut file).take(size).read_to_end(&mut start)?;
        let header: Metadata = start
            .get(8..)
            .and_then(|json| serde_json::from_slice(json).ok())
            .ok_or_else(|| malformed("its header is not that of a safetensors file"))?;
        let shard = Self { file, start, header, data };
        let mut end = 0;
        for name in shard.header.offset_keys() {
            let (from, to) = shard.range(&name)?;
            if from != end || to < from {
                return Err(Error::tensor(name, format!("it lies at {from}..{to}, not at {end}")));
            }
            end = to;
        }
        match end == data {
            true => Ok(shard),
            false => Err(malformed(format!("{data} bytes of data for tensors of {end}"))),
        }
    }

    fn range(&self, name: &str) -> Result<(u64, u64)> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is not there"))?;
        Ok((info.data_offsets.0 as u64, info.data_offsets.1 as u64))
    }

    /// Writes this file with the changes of the plan.
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
            match plan.changes(&name) {
                false => {
                    let copied = io::copy(&mut (&mut self.file).take(to - from), out)?;
                    if copied != to - from {
                        return Err(Error::tensor(name, "the file became shorter"));
                    }
                }
                true => {
                    let changed = plan.apply(&name, &self.read(&name, (to - from) as usize)?)?;
                    let Some(changed) = changed else { continue };
                    out.write_all(&View::data(&changed))?;
                }
            }
            advance(to - from);
        }
        Ok(())
    }

    /// The tensor at which the file stands.
    fn read(&mut self, name: &str, size: usize) -> Result<Tensor> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is not there"))?;
        let mut bytes = vec![0; size];
        self.file.read_exact(&mut bytes)?;
        let dtype = DType::try_from(info.dtype).map_err(|e| Error::tensor(name, e))?;
        let count = elements(&info.shape).and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        if count != Some(size) {
            let reason = format!("{size} bytes for {:?} of {dtype:?}", info.shape);
            return Err(Error::tensor(name, reason));
        }
        Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)
            .map_err(|e| Error::tensor(name, e))
    }
}
