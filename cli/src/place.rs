//! The device to run on.

use crate::Result;
use candle_core::Device;
use clap::ValueEnum;

#[derive(Clone, Copy, ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

impl Place {
    /// The device, with its random numbers from `seed`; the CPU's have none.
    pub fn device(self, seed: u64) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => {
                let device = Device::new_cuda(0)?;
                device.set_seed(seed)?;
                Ok(device)
            }
        }
    }
}
