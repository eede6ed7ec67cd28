//! The values of one block of each of ggml's formats. The order of the operations is ggml's, so that the
//! values are the same to the bit.

/// F16 to F32 by arithmetic and a selection, so that a loop around it is vectorized. Exact, subnormals
/// included.
#[inline(always)]
fn half(low: u8, high: u8) -> f32 {
    let h = u32::from(u16::from_le_bytes([low, high]));
    let (sign, rest) = ((h & 0x8000) << 16, (h & 0x7fff) << 13);
    // 2¹¹²: the exponent's bias grows from 15 to 127.
    let finite = (f32::from_bits(rest) * f32::from_bits(0x7780_0000)).to_bits();
    let infinite_or_nan = rest | 0x7f80_0000;
    f32::from_bits(sign | if h & 0x7c00 == 0x7c00 { infinite_or_nan } else { finite })
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

#[inline(always)]
pub(super) fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b[0], b[1]);
    for j in 0..16 {
        y[j] = (i32::from(b[2 + j] & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(b[2 + j] >> 4) - 8) as f32 * d;
    }
}

#[inline(always)]
pub(super) fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, min) = (half(b[0], b[1]), half(b[2], b[3]));
    for j in 0..16 {
        y[j] = f32::from(b[4 + j] & 15) * d + min;
        y[j + 16] = f32::from(b[4 + j] >> 4) * d + min;
    }
}

/// The fifth bit of value `j` of a block, as 16 or 0.
#[inline(always)]
fn fifth(bits: u32, j: usize) -> i32 {
    ((bits >> j) & 1) as i32 * 16
}

#[inline(always)]
pub(super) fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, bits) = (half(b[0], b[1]), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
    for j in 0..16 {
        y[j] = (i32::from(b[6 + j] & 15) + fifth(bits, j) - 16) as f32 * d;
        y[j + 16] = (i32::from(b[6 + j] >> 4) + fifth(bits, j + 16) - 16) as f32 * d;
    }
}

#[inline(always)]
pub(super) fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, min) = (half(b[0], b[1]), half(b[2], b[3]));
    let bits = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        y[j] = (i32::from(b[8 + j] & 15) + fifth(bits, j)) as f32 * d + min;
        y[j + 16] = (i32::from(b[8 + j] >> 4) + fifth(bits, j + 16)) as f32 * d + min;
    }
}

#[inline(always)]
pub(super) fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(b[0], b[1]);
    for j in 0..32 {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// The six bits of scale and of minimum of sub-block `j` of 32 values, as floats.
#[inline(always)]
fn scale_min(j: usize, s: &[u8; 12]) -> (f32, f32) {
    let (scale, min) = match j < 4 {
        true => (s[j] & 63, s[j + 4] & 63),
        false => ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// 64 values from 32 bytes, low halves first, each half with its own scale and minimum. `high` gives the
/// fifth bits, as 16 or 0, of byte `l` and half 0 or 1.
#[inline(always)]
fn k_values(
    (q, y): (&[u8], &mut [f32]),
    scales: [(f32, f32); 2],
    high: impl Fn(usize, usize) -> i32,
) {
    let [(d1, m1), (d2, m2)] = scales;
    let (low_values, high_values) = y.split_at_mut(32);
    for l in 0..32 {
        low_values[l] = d1 * (i32::from(q[l] & 15) + high(l, 0)) as f32 - m1;
        high_values[l] = d2 * (i32::from(q[l] >> 4) + high(l, 1)) as f32 - m2;
    }
}

/// The scales and minima of the `j`-th 64 values.
#[inline(always)]
fn k_scales(j: usize, head: &[u8; 16]) -> [(f32, f32); 2] {
    let (d, min) = (half(head[0], head[1]), half(head[2], head[3]));
    let s: [u8; 12] = std::array::from_fn(|i| head[4 + i]);
    [2 * j, 2 * j + 1].map(|j| {
        let (scale, minimum) = scale_min(j, &s);
        (d * scale, min * minimum)
    })
}

#[inline(always)]
pub(super) fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let head: [u8; 16] = std::array::from_fn(|i| b[i]);
    for j in 0..4 {
        let (q, y) = (&b[16 + 32 * j..][..32], &mut y[64 * j..][..64]);
        k_values((q, y), k_scales(j, &head), |_, _| 0);
    }
}

#[inline(always)]
pub(super) fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let head: [u8; 16] = std::array::from_fn(|i| b[i]);
    let bits = &b[16..48];
    for j in 0..4 {
        let (q, y) = (&b[48 + 32 * j..][..32], &mut y[64 * j..][..64]);
        k_values((q, y), k_scales(j, &head), |l, half| fifth(u32::from(bits[l]), 2 * j + half));
    }
}

#[inline(always)]
pub(super) fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(b[208], b[209]);
    for i in 0..2 {
        let (low, high) = (&b[64 * i..][..64], &b[128 + 32 * i..][..32]);
        let (scales, y) = (&b[192 + 8 * i..][..8], &mut y[128 * i..][..128]);
        for part in 0..2 {
            let [s0, s1, s2, s3] = [0, 2, 4, 6].map(|i| d * f32::from(scales[part + i] as i8));
            let value = |low: u8, high: u8| f32::from(((low & 15) | (high & 3) << 4) as i8 - 32);
            for l in 16 * part..16 * part + 16 {
                let (a, b, h) = (low[l], low[l + 32], high[l]);
                y[l] = s0 * value(a, h);
                y[l + 32] = s1 * value(b, h >> 2);
                y[l + 64] = s2 * value(a >> 4, h >> 4);
                y[l + 96] = s3 * value(b >> 4, h >> 6);
            }
        }
    }
}
