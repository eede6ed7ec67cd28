//! Times of two things that are run in turn, so that both meet the same machine, or of one.

use crate::cases::Run;
use candle_core::Result;
use std::time::Instant;

/// Runs both alternately for about four seconds; the median of each, in milliseconds.
pub fn alternate(a: &mut Run, b: &mut Run) -> Result<(f64, f64)> {
    // The first runs on a GPU also build its kernels.
    let (_, both) = (time(a)? + time(b)?, time(a)? + time(b)?);
    let runs = ((4000. / both) as usize).clamp(7, 301);
    let (mut of_a, mut of_b) = (vec![], vec![]);
    for _ in 0..runs {
        of_a.push(time(a)?);
        of_b.push(time(b)?);
    }
    Ok((median(of_a), median(of_b)))
}

/// Runs it for about a fifth of a second, after a run that does not count; the median, in
/// milliseconds.
pub fn burst(run: &mut Run) -> Result<f64> {
    let once = time(run)?;
    let runs = ((200. / once) as usize).clamp(1, 301);
    Ok(median((0..runs).map(|_| time(run)).collect::<Result<_>>()?))
}

fn time(run: &mut Run) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.
}
