//! Groups of examples of similar lengths: little padding, and still a random order.

use crate::rng::Rng;

/// `items` in groups of `size`, sorted by length and each but the last full; with an `rng` equal
/// lengths and the groups are shuffled.
pub fn buckets<'a, T>(
    items: &'a [T],
    size: usize,
    length: impl Fn(&T) -> usize,
    mut rng: Option<&mut Rng>,
) -> Vec<Vec<&'a T>> {
    let mut sorted: Vec<_> = items.iter().collect();
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut sorted);
    }
    sorted.sort_by_key(|item| length(item));
    let mut groups: Vec<_> = sorted.chunks(size).map(<[_]>::to_vec).collect();
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut groups);
    }
    groups
}
