//! New memory, filled by all threads: its first touch costs several times a pass over it.

use rayon::iter::{repeat_n, IndexedParallelIterator, ParallelIterator};

/// Bytes from which a buffer is worth a second thread.
const SHARED: usize = if cfg!(test) { 1 << 10 } else { 1 << 19 };

/// Values that are written at a time.
const LINE: usize = 16;

/// `len` times `value`.
pub(super) fn filled<T: Copy + Send>(value: T, len: usize) -> Vec<T> {
    if len.saturating_mul(size_of::<T>()) < SHARED {
        return vec![value; len];
    }
    let lines = repeat_n([value; LINE], len.div_ceil(LINE));
    let least = SHARED / 2 / size_of::<[T; LINE]>();
    let mut y = lines.with_min_len(least).collect::<Vec<_>>().into_flattened();
    y.truncate(len);
    y
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
