//! Quantised blocks to F32, where they lie.

use super::formats::{self, Format, Q4K, Q4_0, Q4_1, Q5K, Q5_0, Q5_1, Q6K, Q8_0};
use crate::ops::cpu::rows::vectorized;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{bail, CpuStorage, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::hint::black_box;

/// Values that a thread decodes at a time: a multiple of every format's block.
const SHARE: usize = 1 << 15;

/// A quantised matrix on the CPU. A block is a run of values of one row.
pub(in crate::ops::cpu) struct Blocks<'a> {
    pub(super) dtype: GgmlDType,
    pub(super) bytes: Cow<'a, [u8]>,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Blocks<'a> {
    pub fn new(w: &'a QTensor) -> Result<Self> {
        let ((rows, columns), dtype) = (w.shape().dims2()?, w.dtype());
        let blocks = Self { dtype, bytes: w.data()?, rows, columns };
        let (len, block) = (blocks.bytes_of(rows), dtype.block_size());
        if !columns.is_multiple_of(block) || blocks.bytes.len() < len {
            bail!(
                "a {dtype:?} weight of {rows} rows of {columns} values has {} bytes, expected {len} in \
                 blocks of {block} values",
                blocks.bytes.len()
            )
        }
        Ok(blocks)
    }

    pub(super) fn bytes_of(&self, rows: usize) -> usize {
        rows * (self.columns / self.dtype.block_size()) * self.dtype.type_size()
    }

    /// The rows from `from` on that fill `out`, in this thread.
    pub fn decode(&self, from: usize, out: &mut [f32]) -> Result<()> {
        decode(self.dtype, &self.bytes[self.bytes_of(from)..], out)
    }

    /// [`Blocks::decode`] by all threads.
    pub fn decode_in_parallel(&self, from: usize, out: &mut [f32]) -> Result<()> {
        let share_of_bytes = SHARE / self.dtype.block_size() * self.dtype.type_size();
        let bytes = &self.bytes[self.bytes_of(from)..];
        out.par_chunks_mut(SHARE)
            .zip(bytes.par_chunks(share_of_bytes))
            .try_for_each(|(out, bytes)| decode(self.dtype, bytes, out))
    }
}

/// The first blocks of `bytes`, as many as fill `out`.
fn decode(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        GgmlDType::F32 => by_blocks(bytes, out, formats::f32),
        GgmlDType::F16 => by_blocks(bytes, out, formats::f16),
        GgmlDType::BF16 => by_blocks(bytes, out, formats::bf16),
        GgmlDType::Q4_0 => values::<_, _, _, Q4_0>(bytes, out),
        GgmlDType::Q4_1 => values::<_, _, _, Q4_1>(bytes, out),
        GgmlDType::Q5_0 => values::<_, _, _, Q5_0>(bytes, out),
        GgmlDType::Q5_1 => values::<_, _, _, Q5_1>(bytes, out),
        GgmlDType::Q8_0 => values::<_, _, _, Q8_0>(bytes, out),
        GgmlDType::Q4K => values::<_, _, _, Q4K>(bytes, out),
        GgmlDType::Q5K => values::<_, _, _, Q5K>(bytes, out),
        GgmlDType::Q6K => values::<_, _, _, Q6K>(bytes, out),
        GgmlDType::Q8_1 | GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q8K => {
            let size = out.len() / dtype.block_size() * dtype.type_size();
            match dtype.from_data(Cow::Borrowed(&bytes[..size])).dequantize(out.len())? {
                CpuStorage::F32(values) => out.copy_from_slice(&values),
                values => bail!("{dtype:?} blocks were decoded to another dtype: {values:?}"),
            }
        }
    }
    Ok(())
}

/// The values of blocks of integers.
fn values<const BYTES: usize, const VALUES: usize, const GROUPS: usize, F>(
    bytes: &[u8],
    out: &mut [f32],
) where
    F: Format<BYTES, VALUES, GROUPS>,
{
    by_blocks(
        bytes,
        out,
        #[inline(always)]
        |b: &[u8; BYTES], y: &mut [f32; VALUES]| {
            let (mut q, [scales, offsets]) = ([0; VALUES], F::scales(b));
            F::integers(b, &mut q);
            // Hidden from the compiler, which would decode blocks with offsets beside each other and scatter their values.
            let q = if F::OFFSET { black_box(q) } else { q };
            let len = VALUES / GROUPS;
            let groups = y.chunks_exact_mut(len).zip(q.chunks_exact(len));
            for (i, (y, q)) in groups.enumerate() {
                let (scale, offset) = (scales[i], offsets[i]);
                for (y, q) in y.iter_mut().zip(q) {
                    let product = f32::from(*q) * scale;
                    *y = if F::OFFSET { product + offset } else { product };
                }
            }
        },
    );
}

#[inline(always)]
fn by_blocks<const SIZE: usize, const BLOCK: usize>(
    bytes: &[u8],
    out: &mut [f32],
    f: impl Fn(&[u8; SIZE], &mut [f32; BLOCK]),
) {
    vectorized(
        #[inline(always)]
        || {
            let (blocks, outs) = (bytes.as_chunks::<SIZE>().0, out.as_chunks_mut::<BLOCK>().0);
            for (block, out) in blocks.iter().zip(outs) {
                f(block, out);
            }
        },
    );
}
