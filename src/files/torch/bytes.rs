//! A cursor over bytes: each function reads from the front of a slice and shortens it.

type Result<T> = std::result::Result<T, String>;

pub(super) fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(n).ok_or("it ends too early")?;
    *rest = after;
    Ok(taken)
}

pub(super) fn array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N]> {
    let (taken, after) = rest.split_first_chunk().ok_or("it ends too early")?;
    *rest = after;
    Ok(*taken)
}

pub(super) fn line<'a>(rest: &mut &'a [u8]) -> Result<&'a str> {
    let end = rest.iter().position(|b| *b == b'\n').ok_or("it ends too early")?;
    let line = take(rest, end)?;
    take(rest, 1)?;
    utf8(line)
}

pub(super) fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| e.to_string())
}

/// A little-endian integer of up to 8 bytes.
pub(super) fn long(bytes: &[u8]) -> Result<i64> {
    let negative = bytes.last().is_some_and(|top| top & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    let used = all.get_mut(..bytes.len()).ok_or("an integer has more than 8 bytes")?;
    used.copy_from_slice(bytes);
    Ok(i64::from_le_bytes(all))
}
