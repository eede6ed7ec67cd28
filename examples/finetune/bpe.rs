//! Byte-level BPE, as GPT-2's, trained on a little text: most of its words become one token, and other words several.

use std::collections::{BTreeMap, HashMap};

/// The token that ends descriptions and sentences; those below are single bytes.
pub const END: u32 = 256;

pub struct Bpe {
    /// The bytes of each token.
    tokens: Vec<Vec<u8>>,
    /// The token that two others become. The lowest is merged first.
    merges: HashMap<[u32; 2], u32>,
}

impl Bpe {
    /// At most `size` tokens for these texts.
    pub fn train<'a>(texts: impl Iterator<Item = &'a str>, size: usize) -> Self {
        let mut counts = BTreeMap::<&str, usize>::new();
        texts.flat_map(words).for_each(|word| *counts.entry(word).or_default() += 1);
        let mut words: Vec<_> = counts.into_iter().map(|(word, n)| (bytes(word), n)).collect();
        let mut tokens: Vec<_> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        tokens.push(vec![]); // END
        let mut merges = HashMap::new();
        while tokens.len() < size {
            let mut pairs = BTreeMap::<[u32; 2], usize>::new();
            for (ids, n) in &words {
                ids.windows(2).for_each(|pair| *pairs.entry([pair[0], pair[1]]).or_default() += n);
            }
            let Some((&pair, _)) = pairs.iter().max_by_key(|(_, n)| **n) else { break };
            let merged = tokens.len() as u32;
            tokens.push(pair.map(|id| &tokens[id as usize][..]).concat());
            merges.insert(pair, merged);
            words.iter_mut().for_each(|(ids, _)| merge(ids, pair, merged));
        }
        Self { tokens, merges }
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        let encode = |word| {
            let mut ids = bytes(word);
            let known = |ids: &[u32]| {
                let pairs = ids.windows(2).map(|pair| [pair[0], pair[1]]);
                pairs.filter_map(|pair| Some((*self.merges.get(&pair)?, pair))).min()
            };
            while let Some((merged, pair)) = known(&ids) {
                merge(&mut ids, pair, merged);
            }
            ids
        };
        words(text).flat_map(encode).collect()
    }

    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<_> = ids.iter().flat_map(|&id| self.tokens[id as usize].clone()).collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

/// Words, and single signs, each with the space before it.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let joined = |a: char, b: char| a == ' ' || a.is_alphanumeric() && b.is_alphanumeric();
        let mut pairs = rest.chars().zip(rest.char_indices().skip(1));
        let end = pairs.find(|(a, (_, b))| !joined(*a, *b)).map_or(rest.len(), |(_, (i, _))| i);
        let (word, others) = rest.split_at(end);
        rest = others;
        (!word.is_empty()).then_some(word)
    })
}

fn bytes(word: &str) -> Vec<u32> {
    word.bytes().map(u32::from).collect()
}

/// Puts one token in place of each pair.
fn merge(ids: &mut Vec<u32>, pair: [u32; 2], merged: u32) {
    let mut i = 0;
    while i + 1 < ids.len() {
        if [ids[i], ids[i + 1]] == pair {
            ids.splice(i..i + 2, [merged]);
        }
        i += 1;
    }
}
