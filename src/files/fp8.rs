//! Weights in FP8, which have their scales in tensors of their own.

use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What stands for `weight` in the names of scales: compressed-tensors', DeepSeek's and ComfyUI's.
const SCALES: [&str; 3] = ["weight_scale", "weight_scale_inv", "scale_weight"];

/// The sides of square blocks; DeepSeek's is the first.
const BLOCKS: [usize; 5] = [128, 64, 32, 256, 16];

/// The names that the scale of a weight, or of another parameter, may have.
pub(crate) fn scales_of(name: &str) -> impl Iterator<Item = String> + use<'_> {
    let path = name.strip_suffix("weight").filter(|path| path.is_empty() || path.ends_with('.'));
    let of_weight = path.into_iter().flat_map(|path| SCALES.map(|scale| format!("{path}{scale}")));
    of_weight.chain(["_scale", "_scale_inv"].map(|end| format!("{name}{end}")))
}

/// An error for a weight that has scales: its values alone are not those of the model.
pub(crate) fn refuse_scaled(name: &str, exists: impl Fn(&str) -> bool) -> Result<()> {
    match scales_of(name).find(|scale| exists(scale)) {
        None => Ok(()),
        Some(scale) => {
            let reason = format!(
                "it is in FP8 with {scale:?}, and its values alone are not those of the model: convert the file to BF16, \
                 or read it by `safetensors_var_builder`, which multiplies by the scales, also under `Adapter::merged`"
            );
            Err(Error::tensor(name, reason))
        }
    }
}

/// The values of a weight of one scale, of one for each output, or of one for each block. In F32.
pub(crate) fn scaled(name: &str, weight: &Tensor, scale: &Tensor) -> Result<Tensor> {
    if !matches!(scale.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        let what = format!("FP8 with scales in {:?}", scale.dtype());
        let reason = "they are no floats: convert the model to BF16";
        return Err(Error::tensor(name, Error::unsupported(what, reason)));
    }
    let (weight, scale) = (weight.to_dtype(DType::F32)?, scale.to_dtype(DType::F32)?);
    let scale_dims = scale.dims().to_vec();
    if scale.elem_count() == 1 {
        return Ok(weight.broadcast_mul(&scale.reshape(())?)?);
    }
    let misfit = || {
        let reason = format!(
            "its shape is {:?} and that of its scales {scale_dims:?}, expected one scale, one for each row, or one for \
             each block",
            weight.dims()
        );
        Error::tensor(name, reason)
    };
    let (rows, columns) = weight.dims2().map_err(|_| misfit())?;
    let scale = match *scale.dims() {
        [n] => scale.reshape((n, 1))?,
        _ => scale,
    };
    let (a, b) = scale.dims2().map_err(|_| misfit())?;
    let square = |side: &usize| (a, b) == (rows.div_ceil(*side), columns.div_ceil(*side));
    let (height, width) = match BLOCKS.into_iter().find(square) {
        Some(side) => (side, side),
        // One for each part of a row.
        None if a == rows && columns.checked_rem(b) == Some(0) => (1, columns / b),
        None => return Err(misfit()),
    };
    // Each scale as often as a block is high and wide, and the last ones cut off.
    let index = |n: usize, size: usize| {
        Tensor::from_iter((0..n as u32).map(|i| i / size as u32), scale.device())
    };
    let scale = scale.index_select(&index(rows, height)?, 0)?;
    let scale = scale.index_select(&index(columns, width)?, 1)?;
    Ok((weight * scale)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn scales_are_of_the_weight_a_row_or_a_block() -> Result<()> {
        let device = &Device::Cpu;
        let weight = Tensor::ones((130, 256), DType::F32, device)?.to_dtype(DType::F8E4M3)?;
        let at = |scale: &Tensor, row: usize, column: usize| -> Result<f32> {
            Ok(scaled("w", &weight, scale)?.get(row)?.get(column)?.to_scalar()?)
        };
        let one = Tensor::new(&[3f32], device)?;
        assert_eq!(at(&one, 129, 255)?, 3.);
        let rows = Tensor::arange(0f32, 130., device)?;
        assert_eq!(at(&rows, 129, 255)?, 129.);
        assert_eq!(at(&rows.reshape((130, 1))?, 7, 0)?, 7.);
        let blocks = Tensor::new(&[[1f32, 2.], [3., 4.]], device)?;
        assert_eq!(at(&blocks, 127, 127)?, 1.);
        assert_eq!(at(&blocks, 127, 128)?, 2.);
        assert_eq!(at(&blocks, 128, 0)?, 3.);
        assert_eq!(at(&blocks, 129, 255)?, 4.);
        let parts = Tensor::arange(0f32, 260., device)?.reshape((130, 2))?;
        assert_eq!(at(&parts, 1, 127)?, 2.);
        assert_eq!(at(&parts, 1, 128)?, 3.);
        let small = Tensor::arange(0f32, 12., device)?.reshape((3, 4))?;
        assert_eq!(at(&small, 63, 63)?, 0., "blocks of 64");
        assert_eq!(at(&small, 128, 64)?, 9.);
        let bytes = Tensor::ones((130, 8), DType::U8, device)?;
        assert!(at(&bytes, 0, 0).unwrap_err().to_string().contains("U8"));
        let halves = Tensor::new(&[[1f32], [2.]], device)?;
        assert!(at(&halves, 0, 0).is_err(), "of no known blocks");
        let error = at(&Tensor::ones(7, DType::F32, device)?, 0, 0).unwrap_err().to_string();
        assert!(error.contains("[130, 256]") && error.contains("[7]"), "{error}");
        Ok(())
    }
}
