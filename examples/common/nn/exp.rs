//! An exponential that vector instructions can follow.

/// `eˣ` for x ≤ 0, to 2e-7 of its value and without a branch: `2ⁿ·eʳ` with |r| ≤ ln 2 / 2. Below -87
/// it is 0.
#[inline(always)]
pub fn exp_negative(x: f32) -> f32 {
    const LEAST: f32 = -87.;
    // Not by `max`, which would make a number of NaN.
    let bounded = if x < LEAST { LEAST } else { x };
    // Adding 1.5·2²³ rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.;
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts: n times the first is exact.
    let r = (bounded - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let series = 1.
        + r * (1. + r * (0.5 + r * (1. / 6. + r * (1. / 24. + r * (1. / 120. + r * (1. / 720.))))));
    let y = series * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LEAST {
        0.
    } else {
        y
    }
}
