//! Which keys a query of attention sees.

use std::ops::Range;

/// Query i is at the position i + offset among the keys, and sees those from `left` before its position to `right` after
/// it. Without a bound it sees all on that side.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Window {
    pub offset: i64,
    pub left: Option<usize>,
    pub right: Option<usize>,
}

impl Window {
    /// Query i sees the keys up to i + offset.
    pub fn causal(offset: i64) -> Self {
        Self { offset, left: None, right: Some(0) }
    }

    /// The position of query `i` among the keys.
    pub fn position(&self, i: usize) -> i64 {
        (i as i64).saturating_add(self.offset)
    }

    /// The keys that query `i` of `keys` sees.
    pub fn keys(&self, i: usize, keys: usize) -> Range<usize> {
        let (position, len) = (self.position(i), keys as i64);
        let bound = |b: usize| i64::try_from(b).unwrap_or(i64::MAX);
        let from = self.left.map_or(0, |left| position.saturating_sub(bound(left)).clamp(0, len));
        let right = |right| position.saturating_add(bound(right)).saturating_add(1).clamp(0, len);
        let to = self.right.map_or(len, right);
        from as usize..to.max(from) as usize
    }

    /// The keys that some of the queries see.
    pub fn keys_of(&self, queries: &Range<usize>, keys: usize) -> Range<usize> {
        let (first, last) = (queries.start, queries.end.saturating_sub(1));
        let (from, to) = (self.keys(first, keys).start, self.keys(last, keys).end);
        from..to.max(from)
    }

    /// Whether each of the queries sees all keys that some of them see.
    pub fn is_full(&self, queries: &Range<usize>, keys: usize) -> bool {
        let all = self.keys_of(queries, keys);
        let (first, last) = (queries.start, queries.end.saturating_sub(1));
        self.keys(first, keys) == all && self.keys(last, keys) == all
    }

    /// The queries that see a key: others are before or after them.
    pub fn seeing(&self, queries: usize, keys: usize) -> Range<usize> {
        let sees = |i: &usize| !self.keys(*i, keys).is_empty();
        match ((0..queries).find(sees), (0..queries).rfind(sees)) {
            (Some(first), Some(last)) => first..last + 1,
            _ => 0..0,
        }
    }

    /// The most keys that a query sees.
    pub fn width(&self, keys: usize) -> usize {
        match (self.left, self.right) {
            (Some(left), Some(right)) => left.saturating_add(right).saturating_add(1).min(keys),
            _ => keys,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_queries_sees_what_its_queries_see() {
        for offset in -4..9 {
            for (left, right) in [
                (None, None),
                (None, Some(0)),
                (Some(2), Some(0)),
                (Some(0), Some(3)),
                (Some(1), None),
            ] {
                let window = Window { offset, left, right };
                let sees = |i: usize, j: usize| {
                    let apart = j as i64 - window.position(i);
                    left.is_none_or(|left| -apart <= left as i64)
                        && right.is_none_or(|right| apart <= right as i64)
                };
                let keys = |i: usize| (0..6).filter(|j| sees(i, *j)).collect::<Vec<_>>();
                let seeing: Vec<_> = (0..5).filter(|i| !keys(*i).is_empty()).collect();
                assert_eq!(window.seeing(5, 6).collect::<Vec<_>>(), seeing, "{window:?}");
                for i in 0..5 {
                    assert_eq!(window.keys(i, 6).collect::<Vec<_>>(), keys(i), "{window:?} {i}");
                    assert!(keys(i).len() <= window.width(6));
                }
                let Some(first) = seeing.first() else { continue };
                for last in &seeing {
                    let mut all: Vec<_> = (*first..last + 1).flat_map(keys).collect();
                    all.sort_unstable();
                    all.dedup();
                    let (of, queries) = (window.keys_of(&(*first..last + 1), 6), *first..last + 1);
                    assert_eq!(of.collect::<Vec<_>>(), all, "{window:?} {queries:?}");
                    let full = queries.clone().all(|i| keys(i) == all);
                    assert_eq!(window.is_full(&queries, 6), full, "{window:?} {queries:?}");
                }
            }
        }
    }
}
