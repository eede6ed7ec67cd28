//! Damaged copies of a file.

use crate::Random;

/// Truncations, two flipped bits in each byte of the header, then random damage: changed bits and bytes,
/// runs of 0xff or of digits, and pieces that are removed, copied or moved.
pub fn mutants(good: &[u8], random: usize, mut try_one: impl FnMut(&[u8])) {
    let step = good.len().div_ceil(5000);
    for end in (0..good.len()).step_by(step) {
        try_one(&good[..end]);
    }
    for at in 0..good.len().min(800) {
        for bit in [0, at % 8] {
            let mut bad = good.to_vec();
            bad[at] ^= 1 << bit;
            try_one(&bad);
        }
    }
    let mut r = Random(0x5EED);
    for _ in 0..random {
        let mut bad = good.to_vec();
        for _ in 0..1 + r.below(3) {
            // Headers are at the ends of a file.
            let near = match r.below(3) {
                0 => r.below(64.min(bad.len())),
                1 => bad.len() - 1 - r.below(400.min(bad.len())),
                _ => r.below(bad.len()),
            };
            let n = (1 + r.below(16)).min(bad.len() - near);
            let other = r.below(bad.len() - n + 1);
            match r.below(7) {
                0 => bad[near] ^= 1 << r.below(8),
                1 => bad[near] = r.below(256) as u8,
                2 => bad[near..near + n].fill(0xff),
                3 => bad[near..near + n].fill(b'9'),
                4 => drop(bad.drain(near..near + n)),
                5 => bad.copy_within(near..near + n, other),
                _ => {
                    let piece = bad[near..near + n].to_vec();
                    bad.splice(other..other, piece);
                }
            }
            if bad.is_empty() {
                bad.push(0);
            }
        }
        try_one(&bad);
    }
}
