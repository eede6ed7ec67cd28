//! The FNV-1a hash, which unlike std's does not change between versions.

/// The hash of `bytes`.
pub(crate) fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::fnv1a;

    #[test]
    fn the_hash_is_the_published_one() {
        // The vectors of the reference implementation's test suite.
        for (text, hash) in [("", 0xcbf29ce484222325), ("a", 0xaf63dc4c8601ec8c)] {
            assert_eq!(fnv1a(text.bytes()), hash);
        }
        assert_eq!(fnv1a("foobar".bytes()), 0x85944171f73967e8);
    }
}
