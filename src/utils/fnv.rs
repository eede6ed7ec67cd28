//! The FNV-1a hash, which unlike std's does not change between versions.

use std::io::{self, Read};

const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of `bytes`.
pub(crate) fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    with(EMPTY, bytes)
}

/// The number of bytes that a reader gives, and their hash.
pub(crate) fn fnv1a_of(mut reader: impl Read) -> io::Result<(usize, u64)> {
    let (mut len, mut hash, mut part) = (0, EMPTY, vec![0; 1 << 16]);
    loop {
        let read = match reader.read(&mut part) {
            Ok(0) => return Ok((len, hash)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        (len, hash) = (len + read, with(hash, part[..read].iter().copied()));
    }
}

fn with(hash: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes
        .into_iter()
        .fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::{fnv1a, fnv1a_of};

    #[test]
    fn the_hash_is_the_published_one() {
        // The vectors of the reference implementation's test suite.
        for (text, hash) in [("", 0xcbf29ce484222325), ("a", 0xaf63dc4c8601ec8c)] {
            assert_eq!(fnv1a(text.bytes()), hash);
        }
        assert_eq!(fnv1a("foobar".bytes()), 0x85944171f73967e8);
        assert_eq!(fnv1a_of(&b"foobar"[..]).unwrap(), (6, 0x85944171f73967e8));
        let long = vec![7; 200_000];
        assert_eq!(fnv1a_of(&long[..]).unwrap(), (long.len(), fnv1a(long.iter().copied())));
    }
}
