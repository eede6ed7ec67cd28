//! Quantised blocks where they lie: as F32, and as products of their integers. candle decodes whole tensors in one thread.

mod blocks;
mod dot;
mod formats;

pub(super) use blocks::Blocks;
pub(super) use dot::Rows;

#[cfg(test)]
mod tests {
    use super::Blocks;
    use candle_core::quantized::QStorage;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::Device;
    use candle_core::Result;
    use rand::{RngCore, SeedableRng};

    const FORMATS: [GgmlDType; 15] = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q8_1,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ];

    /// Any bytes are blocks: subnormal, infinite and NaN scales among them.
    #[test]
    fn every_format_is_decoded_as_by_candle_to_the_bit() -> Result<()> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for dtype in FORMATS {
            let (rows, columns) = (200, 512);
            let mut bytes = vec![0; rows * columns / dtype.block_size() * dtype.type_size()];
            rng.fill_bytes(&mut bytes);
            let storage = QStorage::from_data(bytes.into(), &Device::Cpu, dtype)?;
            let w = QTensor::new(storage, (rows, columns))?;
            let expected = w.dequantize(&Device::Cpu)?.to_vec2::<f32>()?;
            let blocks = Blocks::new(&w)?;
            for from in [0, 3] {
                let mut out = vec![0.; (rows - from) * columns];
                let expected: Vec<_> = expected[from..].concat();
                let differ =
                    |a: &f32, b: &f32| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
                blocks.decode(from, &mut out)?;
                assert!(!out.iter().zip(&expected).any(|(a, b)| differ(a, b)), "{dtype:?}");
                out.fill(0.);
                blocks.decode_in_parallel(from, &mut out)?;
                assert!(!out.iter().zip(&expected).any(|(a, b)| differ(a, b)), "{dtype:?}");
            }
        }
        Ok(())
    }
}
