//! ggml's formats of blocks: small integers, and for each group of them a scale and what is added.

/// Blocks of `VALUES` values in `BYTES` bytes. The value of the integer q in group g is `q·scale + offset`, rounded as ggml
/// does.
pub(super) trait Format<const BYTES: usize, const VALUES: usize, const GROUPS: usize> {
    /// Whether a group has an offset: without one nothing is added, which keeps -0.
    const OFFSET: bool;

    fn integers(b: &[u8; BYTES], q: &mut [i8; VALUES]);

    /// The scale of each group of VALUES / GROUPS values, and the offset.
    fn scales(b: &[u8; BYTES]) -> [[f32; GROUPS]; 2];
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

/// F16 to F32 by arithmetic and selections, so that a loop around it is vectorized. Exact, and without an F32 that is
/// subnormal, on which processors take a hundred times as long: scales of small weights are subnormal in F16.
#[inline(always)]
fn half(low: u8, high: u8) -> f32 {
    let h = u32::from(u16::from_le_bytes([low, high]));
    let (sign, exponent, rest) = ((h & 0x8000) << 16, h & 0x7c00, (h & 0x7fff) << 13);
    // The exponent's bias grows from 15 to 127.
    let normal = rest + (112 << 23);
    // Multiples of 2⁻²⁴.
    let subnormal = ((h & 0x3ff) as f32 * f32::from_bits(103 << 23)).to_bits();
    let infinite_or_nan = rest | 0x7f80_0000;
    let finite = if exponent == 0 { subnormal } else { normal };
    f32::from_bits(sign | if exponent == 0x7c00 { infinite_or_nan } else { finite })
}

#[inline(always)]
pub(super) fn f32(b: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes(*b);
}

#[inline(always)]
pub(super) fn f16(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = half(b[0], b[1]);
}

#[inline(always)]
pub(super) fn bf16(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
}

/// The halves of each byte: the low ones first.
#[inline(always)]
fn nibbles<const N: usize>(bytes: &[u8], q: &mut [i8], f: impl Fn(usize, u8) -> u8) {
    for j in 0..N {
        q[j] = f(j, bytes[j] & 15) as i8;
        q[j + N] = f(j + N, bytes[j] >> 4) as i8;
    }
}

/// The fifth bit of value `j` of a block, as 16 or 0, from the bits of all 32.
#[inline(always)]
fn fifth(bits: &[u8], j: usize) -> u8 {
    if bits[j / 8] & (1 << (j % 8)) == 0 {
        0
    } else {
        16
    }
}

impl Format<18, 32, 1> for Q4_0 {
    const OFFSET: bool = false;

    #[inline(always)]
    fn integers(b: &[u8; 18], q: &mut [i8; 32]) {
        nibbles::<16>(&b[2..], q, |_, q| q.wrapping_sub(8));
    }

    #[inline(always)]
    fn scales(b: &[u8; 18]) -> [[f32; 1]; 2] {
        [[half(b[0], b[1])], [0.]]
    }
}

impl Format<20, 32, 1> for Q4_1 {
    const OFFSET: bool = true;

    #[inline(always)]
    fn integers(b: &[u8; 20], q: &mut [i8; 32]) {
        nibbles::<16>(&b[4..], q, |_, q| q);
    }

    #[inline(always)]
    fn scales(b: &[u8; 20]) -> [[f32; 1]; 2] {
        [[half(b[0], b[1])], [half(b[2], b[3])]]
    }
}

impl Format<22, 32, 1> for Q5_0 {
    const OFFSET: bool = false;

    #[inline(always)]
    fn integers(b: &[u8; 22], q: &mut [i8; 32]) {
        nibbles::<16>(&b[6..], q, |j, q| (q + fifth(&b[2..6], j)).wrapping_sub(16));
    }

    #[inline(always)]
    fn scales(b: &[u8; 22]) -> [[f32; 1]; 2] {
        [[half(b[0], b[1])], [0.]]
    }
}

impl Format<24, 32, 1> for Q5_1 {
    const OFFSET: bool = true;

    #[inline(always)]
    fn integers(b: &[u8; 24], q: &mut [i8; 32]) {
        nibbles::<16>(&b[8..], q, |j, q| q + fifth(&b[4..8], j));
    }

    #[inline(always)]
    fn scales(b: &[u8; 24]) -> [[f32; 1]; 2] {
        [[half(b[0], b[1])], [half(b[2], b[3])]]
    }
}

impl Format<34, 32, 1> for Q8_0 {
    const OFFSET: bool = false;

    #[inline(always)]
    fn integers(b: &[u8; 34], q: &mut [i8; 32]) {
        q.iter_mut().zip(&b[2..]).for_each(|(q, b)| *q = *b as i8);
    }

    #[inline(always)]
    fn scales(b: &[u8; 34]) -> [[f32; 1]; 2] {
        [[half(b[0], b[1])], [0.]]
    }
}

/// The scales and the offsets of the eight groups of a block that begins with its scale, its minimum and 12 bytes
/// with six bits for each.
#[inline(always)]
fn k_scales(b: &[u8]) -> [[f32; 8]; 2] {
    let (d, min) = (half(b[0], b[1]), half(b[2], b[3]));
    // Four of the bytes at a time.
    let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    let (first, second, third) = (word(4), word(8), word(12));
    let low = |word: u32| word & 0x3f3f_3f3f;
    let high = |four: u32, word: u32| (four & 0x0f0f_0f0f) | (word >> 6 & 0x0303_0303) << 4;
    let bytes = |low: u32, high: u32| (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    let scales = bytes(low(first), high(third, first));
    let minima = bytes(low(second), high(third >> 4, second));
    [scales.map(|scale| d * f32::from(scale)), minima.map(|minimum| -(min * f32::from(minimum)))]
}

impl Format<144, 256, 8> for Q4K {
    const OFFSET: bool = true;

    #[inline(always)]
    fn integers(b: &[u8; 144], q: &mut [i8; 256]) {
        for (b, q) in b[16..].chunks_exact(32).zip(q.chunks_exact_mut(64)) {
            nibbles::<32>(b, q, |_, q| q);
        }
    }

    #[inline(always)]
    fn scales(b: &[u8; 144]) -> [[f32; 8]; 2] {
        k_scales(b)
    }
}

impl Format<176, 256, 8> for Q5K {
    const OFFSET: bool = true;

    #[inline(always)]
    fn integers(b: &[u8; 176], q: &mut [i8; 256]) {
        let bits = &b[16..48];
        for (i, (b, q)) in b[48..].chunks_exact(32).zip(q.chunks_exact_mut(64)).enumerate() {
            nibbles::<32>(b, q, |j, q| q + ((bits[j % 32] >> (2 * i + j / 32)) & 1) * 16);
        }
    }

    #[inline(always)]
    fn scales(b: &[u8; 176]) -> [[f32; 8]; 2] {
        k_scales(b)
    }
}

impl Format<210, 256, 16> for Q6K {
    const OFFSET: bool = false;

    #[inline(always)]
    fn integers(b: &[u8; 210], q: &mut [i8; 256]) {
        for (i, q) in q.chunks_exact_mut(128).enumerate() {
            let (low, high) = (&b[64 * i..][..64], &b[128 + 32 * i..][..32]);
            let value = |low: u8, high: u8| ((low & 15) | (high & 3) << 4) as i8 - 32;
            for l in 0..32 {
                let (a, b, h) = (low[l], low[l + 32], high[l]);
                q[l] = value(a, h);
                q[l + 32] = value(b, h >> 2);
                q[l + 64] = value(a >> 4, h >> 4);
                q[l + 96] = value(b >> 4, h >> 6);
            }
        }
    }

    #[inline(always)]
    fn scales(b: &[u8; 210]) -> [[f32; 16]; 2] {
        let d = half(b[208], b[209]);
        let mut scales = [0.; 16];
        scales.iter_mut().zip(&b[192..]).for_each(|(s, b)| *s = d * f32::from(*b as i8));
        [scales, [0.; 16]]
    }
}
