//! Products of a few rows with rows of blocks, which are not decoded: a group's integers are multiplied, and its scale and
//! offset applied to the sums.

use super::blocks::Blocks;
use super::formats::{Format, Q4K, Q4_0, Q4_1, Q5K, Q5_0, Q5_1, Q6K, Q8_0};
use crate::ops::cpu::rows::vectorized;
use candle_core::quantized::GgmlDType;
use std::hint::black_box;

/// Rows of values beside rows of blocks.
pub(in crate::ops::cpu) struct Rows<'a> {
    /// (rows, columns)
    x: &'a [f32],
    /// The sums of the values beside each group of a block's integers, (rows, groups).
    sums: Vec<f32>,
    dot: Dot,
}

/// The products of rows with the rows of the weight from `from` on, into `y` (rows of the weight, rows of x).
type Dot = fn(&Rows, &Blocks, usize, &mut [f32]);

impl<'a> Rows<'a> {
    /// `None` if the weight's format has no integers of this crate's.
    pub fn new(x: &'a [f32], w: &Blocks) -> Option<Self> {
        let (group, dot): (usize, Dot) = match w.dtype {
            GgmlDType::Q4_0 => (32, dot::<18, 32, 1, Q4_0>),
            GgmlDType::Q4_1 => (32, dot::<20, 32, 1, Q4_1>),
            GgmlDType::Q5_0 => (32, dot::<22, 32, 1, Q5_0>),
            GgmlDType::Q5_1 => (32, dot::<24, 32, 1, Q5_1>),
            GgmlDType::Q8_0 => (32, dot::<34, 32, 1, Q8_0>),
            GgmlDType::Q4K => (32, dot::<144, 256, 8, Q4K>),
            GgmlDType::Q5K => (32, dot::<176, 256, 8, Q5K>),
            GgmlDType::Q6K => (16, dot::<210, 256, 16, Q6K>),
            _ => return None,
        };
        let sums = x.chunks_exact(group).map(|x| x.iter().sum()).collect();
        Some(Self { x, sums, dot })
    }

    /// See [`Dot`].
    pub fn dot(&self, w: &Blocks, from: usize, y: &mut [f32]) {
        (self.dot)(self, w, from, y);
    }
}

/// Values that are summed beside each other.
const LANES: usize = 16;

fn dot<const BYTES: usize, const VALUES: usize, const GROUPS: usize, F>(
    rows: &Rows,
    w: &Blocks,
    from: usize,
    y: &mut [f32],
) where
    F: Format<BYTES, VALUES, GROUPS>,
{
    let (k, m) = (w.columns, rows.x.len() / w.columns);
    let (blocks, groups) = (k / VALUES, k / VALUES * GROUPS);
    vectorized(
        #[inline(always)]
        || {
            let bytes = &w.bytes[w.bytes_of(from)..].as_chunks::<BYTES>().0;
            for (w, y) in bytes.chunks_exact(blocks).zip(y.chunks_exact_mut(m)) {
                for (i, y) in y.iter_mut().enumerate() {
                    let x = rows.x[i * k..][..k].as_chunks::<VALUES>().0;
                    let sums = rows.sums[i * groups..][..groups].as_chunks::<GROUPS>().0;
                    *y = one_row::<BYTES, VALUES, GROUPS, F>(w, x, sums);
                }
            }
        },
    );
}

#[inline(always)]
fn one_row<const BYTES: usize, const VALUES: usize, const GROUPS: usize, F>(
    w: &[[u8; BYTES]],
    x: &[[f32; VALUES]],
    sums: &[[f32; GROUPS]],
) -> f32
where
    F: Format<BYTES, VALUES, GROUPS>,
{
    let (mut total, mut rest) = ([0f32; LANES], [0f32; GROUPS]);
    for ((w, x), sums) in w.iter().zip(x).zip(sums) {
        let (mut q, [scales, offsets]) = ([0; VALUES], F::scales(w));
        F::integers(w, &mut q);
        let len = VALUES / GROUPS;
        let groups = q.chunks_exact(len).zip(x.chunks_exact(len));
        for ((q, x), scale) in groups.zip(&scales) {
            let mut products = [0f32; LANES];
            for (q, x) in q.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0) {
                for ((product, q), x) in products.iter_mut().zip(q).zip(x) {
                    *product = f32::from(*q).mul_add(*x, *product);
                }
            }
            for (total, product) in total.iter_mut().zip(products) {
                *total = scale.mul_add(product, *total);
            }
        }
        if F::OFFSET {
            for ((rest, offset), sum) in rest.iter_mut().zip(offsets).zip(sums) {
                *rest = offset.mul_add(*sum, *rest);
            }
        }
    }
    // Hidden from the compiler, which would shuffle the lanes in the loop above for the order of this sum.
    let mut total = black_box(total);
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        let (low, high) = total.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    total[0] + black_box(rest).iter().sum::<f32>()
}
