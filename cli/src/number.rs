//! Numbers of options, with what they may be.

use std::ops::Range;

/// Above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    within(text, f64::MIN_POSITIVE..f64::INFINITY, "above 0")
}

/// 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    within(text, 0.0..f64::INFINITY, "0 or more")
}

/// The probability of dropping a value.
pub fn dropout(text: &str) -> Result<f32, String> {
    within(text, 0.0..1., "0 or more and below 1").map(|p| p as f32)
}

/// The probability of at least one token.
pub fn share(text: &str) -> Result<f64, String> {
    within(text, f64::MIN_POSITIVE..1f64.next_up(), "above 0 and at most 1")
}

/// A share of less than a half.
pub fn half(text: &str) -> Result<f64, String> {
    within(text, 0.0..0.5, "0 or more and below 0.5")
}

fn within(text: &str, range: Range<f64>, expected: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|e| format!("{e}"))?;
    range.contains(&value).then_some(value).ok_or(format!("expected a number {expected}"))
}
