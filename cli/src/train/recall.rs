//! Whether a query's own sentence is the nearest.

use super::sentences::Example;
use crate::Result;
use candle_core::Tensor;
use lora::train::normalize;
use loralib as lora;
use std::collections::BTreeMap;

/// How many queries are compared at a time.
const QUERIES: usize = 256;

/// For each pair how many sentences are nearer to its query than its own, without those that also belong to the query.
/// `queries` and `sentences` are (pairs, d).
pub fn ranks(queries: &Tensor, sentences: &Tensor, pairs: &[&Example]) -> Result<Vec<usize>> {
    let mut of_query = BTreeMap::<_, Vec<_>>::new();
    let mut first_of = BTreeMap::new();
    for (i, pair) in pairs.iter().enumerate() {
        of_query.entry(&pair.texts[0]).or_default().push(&pair.texts[1]);
        first_of.entry(&pair.texts[1]).or_insert(i);
    }
    let rank = |i: usize, row: &[f32]| {
        let own = &of_query[&pairs[i].texts[0]];
        let others = first_of.iter().filter(|(text, _)| !own.contains(text));
        // Beside a NaN, all are nearer.
        others.filter(|(_, at)| row[i].is_nan() || row[**at] > row[i]).count()
    };
    let (queries, sentences) = (normalize(queries)?, normalize(sentences)?.t()?.contiguous()?);
    let mut ranks = vec![];
    while ranks.len() < pairs.len() {
        let count = QUERIES.min(pairs.len() - ranks.len());
        let cosines = queries.narrow(0, ranks.len(), count)?.matmul(&sentences)?;
        for row in cosines.to_vec2::<f32>()? {
            ranks.push(rank(ranks.len(), &row));
        }
    }
    Ok(ranks)
}
