//! One base for many adapters.

use crate::encoder::Encoder;
use crate::{Pair, Result, OUT};
use candle_core::{Device, Tensor};
use loralib::{Adapter, Adapters};
use std::time::Instant;

/// 32 texts of eight users, each with an adapter of its own: in one batch, and one user after another.
pub fn serve(encoder: &Encoder, adapters: &Adapters, pairs: &[Pair]) -> Result<()> {
    let names: Vec<_> = (0..8).map(|user| format!("user {user}")).collect();
    for name in &names {
        adapters.add(name, &Adapter::load(OUT, &Device::Cpu)?)?;
    }
    let texts: Vec<_> = pairs.iter().take(32).map(|pair| pair[1].as_str()).collect();
    let each = texts.len().div_ceil(names.len());
    let rows: Vec<_> = (0..texts.len()).map(|i| Some(names[i / each].as_str())).collect();
    let together = || adapters.with_rows(&rows, || encoder.of(&texts));
    let alone = || {
        let of =
            |(name, texts): (&String, &[&str])| adapters.with(name.as_str(), || encoder.of(texts));
        Tensor::cat(
            &names
                .iter()
                .zip(texts.chunks(each))
                .map(of)
                .collect::<candle_core::Result<Vec<_>>>()?,
            0,
        )
    };
    let apart = (together()? - alone()?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    let time = |f: &dyn Fn() -> candle_core::Result<Tensor>| -> Result<f64> {
        let mut times = vec![];
        for _ in 0..21 {
            let start = Instant::now();
            f()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[10])
    };
    let (one, each) = (time(&together)?, time(&alone)?);
    println!("{} texts of {} adapters: {one:.1} ms in one batch, {each:.1} ms one after another, {apart:.0e} apart", texts.len(), names.len());
    Ok(())
}
