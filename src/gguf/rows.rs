//! The order of the rows of q and k: llama.cpp's `llama` rotates neighbours of a head's dimensions, Hugging
//! Face the two halves, so that its converter interleaves the halves.

use candle_core::{Result, Tensor};

/// For each row in Hugging Face's order, the file's row.
pub(super) fn in_file(rows: usize, heads: usize) -> Option<Vec<usize>> {
    let head = rows.checked_div(heads).filter(|head| head * heads == rows && head % 2 == 0)?;
    let half = head / 2;
    let row = |row: usize| row / head * head + row % head % half * 2 + row % head / half;
    (half > 0).then(|| (0..rows).map(row).collect())
}

/// For each row of the file, the row in Hugging Face's order.
pub(super) fn in_hugging_face(rows: usize, heads: usize) -> Option<Vec<usize>> {
    let head = rows.checked_div(heads).filter(|head| head * heads == rows && head % 2 == 0)?;
    let row = |row: usize| row / head * head + row % 2 * (head / 2) + row % head / 2;
    (head > 0).then(|| (0..rows).map(row).collect())
}

/// The rows in the given order; each is moved whole, as its blocks are side by side.
pub(super) fn reordered(bytes: &[u8], row_bytes: usize, order: &[usize]) -> Option<Vec<u8>> {
    let mut reordered = Vec::with_capacity(bytes.len());
    for row in order {
        let start = row.checked_mul(row_bytes)?;
        reordered.extend_from_slice(bytes.get(start..start.checked_add(row_bytes)?)?);
    }
    (reordered.len() == bytes.len()).then_some(reordered)
}

/// The rows of a tensor in the given order.
pub(super) fn selected(tensor: &Tensor, order: Vec<usize>) -> Result<Tensor> {
    let order: Vec<i64> = order.into_iter().map(|row| row as i64).collect();
    tensor.index_select(&Tensor::new(order, tensor.device())?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orders_are_those_of_the_converter_and_inverse() {
        for (heads, head) in [(1, 2), (3, 8), (9, 64)] {
            let rows = heads * head;
            let (to, from) = (in_hugging_face(rows, heads).unwrap(), in_file(rows, heads).unwrap());
            for h in 0..heads {
                for (s, j) in [0, 1].into_iter().flat_map(|s| (0..head / 2).map(move |j| (s, j))) {
                    assert_eq!(to[h * head + 2 * j + s], h * head + s * head / 2 + j);
                }
            }
            assert!((0..rows).all(|row| from[to[row]] == row));
        }
        for (rows, heads) in [(0, 0), (0, 1), (6, 2), (10, 3), (4, 0)] {
            assert_eq!(in_file(rows, heads), None);
            assert_eq!(in_hugging_face(rows, heads), None);
        }
        assert_eq!(reordered(b"aabbcc", 2, &[2, 0, 1]).unwrap(), b"ccaabb");
        assert_eq!(reordered(b"aabbcc", 2, &[2, 0, 3]), None);
        assert_eq!(reordered(b"aabbcc", 2, &[2, 0]), None);
    }
}
