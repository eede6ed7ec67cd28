//! New memory, filled by all threads, since the first touch of a page costs several times a pass over it; and sums in
//! place.

use rayon::iter::{repeat_n, IndexedParallelIterator, ParallelIterator};
use std::ops::AddAssign;

/// The least number of bytes for a second thread.
const PARALLEL_MIN: usize = if cfg!(test) { 1 << 10 } else { 1 << 19 };

/// Values written at a time.
const LINE: usize = 16;

/// A vector of `len` times `value`.
pub(in crate::ops) fn filled<T: Copy + Send>(value: T, len: usize) -> Vec<T> {
    if len.saturating_mul(size_of::<T>()) < PARALLEL_MIN {
        return vec![value; len];
    }
    let lines = repeat_n([value; LINE], len.div_ceil(LINE));
    let least = PARALLEL_MIN / 2 / size_of::<[T; LINE]>();
    let mut y = lines.with_min_len(least).collect::<Vec<_>>().into_flattened();
    y.truncate(len);
    y
}

/// `y += x`
pub(in crate::ops) fn add_assign<T: Copy + AddAssign>(y: &mut [T], x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
}

#[cfg(test)]
mod tests {
    use super::filled;

    #[test]
    fn every_length_is_filled() {
        for len in [0, 1, 255, 256, 257, 4096, 10_001] {
            assert_eq!(filled(1.5f32, len), vec![1.5; len]);
            assert_eq!(filled(7u8, len), vec![7; len]);
        }
    }
}
