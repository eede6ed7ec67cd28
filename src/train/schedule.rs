//! Learning rates over the steps of a run.

use std::f64::consts::PI;

/// A factor of the learning rate for each step, as transformers' schedules of these names: it rises from 0 in
/// the warm-up, then stays, or falls to 0 at the last step by a line or by half a cosine.
///
/// ```
/// use loralib::train::Schedule;
/// let schedule = Schedule::Cosine { warmup: 10, steps: 110 };
/// let lr = |step| 2e-4 * schedule.factor(step); // for `opt.set_learning_rate` before each step
/// assert_eq!(lr(5), 1e-4);
/// assert_eq!(lr(10), 2e-4);
/// assert!((lr(60) - 1e-4).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// 1 after the warm-up.
    Constant {
        /// The steps of the warm-up.
        warmup: usize,
    },
    /// By a line.
    Linear {
        /// The steps of the warm-up.
        warmup: usize,
        /// All steps.
        steps: usize,
    },
    /// By half a cosine.
    Cosine {
        /// The steps of the warm-up.
        warmup: usize,
        /// All steps.
        steps: usize,
    },
}

impl Schedule {
    /// The factor of a step, from 0 on.
    pub fn factor(self, step: usize) -> f64 {
        let (Self::Constant { warmup } | Self::Linear { warmup, .. } | Self::Cosine { warmup, .. }) =
            self;
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let left = |steps: usize| {
            let (left, all) = (steps.saturating_sub(step), steps.saturating_sub(warmup));
            left as f64 / all.max(1) as f64
        };
        match self {
            Self::Constant { .. } => 1.,
            Self::Linear { steps, .. } => left(steps),
            Self::Cosine { steps, .. } => (1. - (PI * left(steps)).cos()) / 2.,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    /// By `transformers.get_linear_schedule_with_warmup(opt, 2, 6)` and the others.
    #[test]
    fn factors_are_transformers() {
        let factors = |schedule: Schedule| [0, 1, 2, 3, 4, 5, 6, 7].map(|s| schedule.factor(s));
        let constant = factors(Schedule::Constant { warmup: 2 });
        assert_eq!(constant, [0., 0.5, 1., 1., 1., 1., 1., 1.]);
        let linear = factors(Schedule::Linear { warmup: 2, steps: 6 });
        assert_eq!(linear, [0., 0.5, 1., 0.75, 0.5, 0.25, 0., 0.]);
        let cosine = factors(Schedule::Cosine { warmup: 2, steps: 6 });
        let expected = [0., 0.5, 1., 0.853_553_390_593_273_8, 0.5, 0.146_446_609_406_726_2, 0., 0.];
        for (a, b) in cosine.into_iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{cosine:?}");
        }
        assert_eq!(Schedule::Linear { warmup: 0, steps: 0 }.factor(0), 0.);
    }
}
