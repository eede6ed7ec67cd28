//! The options of the command line.

use crate::Result;
use candle_core::Device;
use std::env;
use std::path::PathBuf;

const USAGE: &str =
    "the options are --quick (a few seconds instead of a minute: no good sentences), \
                     --device cpu or cuda, and --out FOLDER";

pub struct Options {
    pub quick: bool,
    pub device: Device,
    pub out: PathBuf,
}

impl Options {
    pub fn parse() -> Result<Self> {
        let (quick, device, out) = (false, Device::Cpu, PathBuf::from("target/finetune"));
        let (mut options, mut args) = (Self { quick, device, out }, env::args().skip(1));
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} without a value: {USAGE}"));
            match &arg[..] {
                "--quick" => options.quick = true,
                "--out" => options.out = value()?.into(),
                "--device" => {
                    options.device = match &value()?[..] {
                        "cpu" => Device::Cpu,
                        "cuda" => Device::new_cuda(0)?,
                        other => return Err(format!("no device {other:?}: {USAGE}").into()),
                    }
                }
                _ => return Err(format!("{arg:?}: {USAGE}").into()),
            }
        }
        Ok(options)
    }
}
