//! Preferences: two answers to a prompt, of which one is chosen.

use super::batch::{Batch, Rows, IGNORED};
use super::columns::Columns;
use super::data::{conversation, Document, NO_TEMPLATE};
use super::entries::{entries, shortened, Entry};
use super::examples::{encode, Example};
use crate::model::{Template, Tokens};
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use serde_json::{json, Value};
use std::path::Path;
use std::sync::OnceLock;

/// An entry of a data file.
pub struct Preference {
    pub chosen: Document,
    pub rejected: Document,
}

const EXPECTED: &str = "expected \"prompt\", \"chosen\" and \"rejected\", texts or lists of messages; --columns gives \
                        other names";

const SHORTENED: &str =
    "the chat template shortens earlier replies: an answer has to be one message";

/// The preferences of JSON Lines or of a JSON array. An error names the file, the line and what it is.
pub fn read(
    path: &Path,
    columns: &Columns,
    template: Option<&Template>,
) -> Result<Vec<Preference>> {
    let mut all = vec![];
    for (at, entry) in entries(path)? {
        let Entry::Json(json) = entry else { return Err(format!("{at}: {EXPECTED}").into()) };
        let read = from_json(&at, &json, columns, template);
        all.push(read.map_err(|e| format!("{at}: {e}: {}", shortened(&json.to_string())))?);
    }
    Ok(all)
}

/// Answers are texts after a prompt, or messages after those that both begin with, as TRL reads them.
fn from_json(
    at: &str,
    json: &Value,
    columns: &Columns,
    template: Option<&Template>,
) -> Result<Preference> {
    if let Some(missing) = columns.missing(json) {
        return Err(format!("no column {missing:?}").into());
    }
    let [prompt, chosen, rejected] =
        ["prompt", "chosen", "rejected"].map(|name| columns.of(json, name));
    let (chosen, rejected) = match (chosen, rejected) {
        (Value::String(chosen), Value::String(rejected)) => texts(at, prompt, chosen, rejected)?,
        (Value::Array(chosen), Value::Array(rejected)) => {
            messages(at, prompt, chosen, rejected, template.ok_or(NO_TEMPLATE)?)?
        }
        _ => return Err(EXPECTED.into()),
    };
    match chosen.text() == rejected.text() {
        true => Err("the chosen answer is the rejected one".into()),
        false => Ok(Preference { chosen, rejected }),
    }
}

/// Without a prompt, it is what both answers begin with.
fn texts(at: &str, prompt: &Value, chosen: &str, rejected: &str) -> Result<(Document, Document)> {
    let (prompt, chosen, rejected) = match prompt {
        Value::String(prompt) => (&prompt[..], chosen, rejected),
        Value::Null => {
            let (prompt, rest) = chosen.split_at(shared(chosen, rejected));
            (prompt, rest, &rejected[prompt.len()..])
        }
        other => return Err(format!("the prompt is {other}, beside texts as answers").into()),
    };
    let answer = |answer: &str| Document::completion(at, prompt.to_owned(), answer.to_owned());
    Ok((answer(chosen), answer(rejected)))
}

fn messages(
    at: &str,
    prompt: &Value,
    chosen: &[Value],
    rejected: &[Value],
    template: &Template,
) -> Result<(Document, Document)> {
    let both = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    let given = match prompt {
        Value::Array(prompt) => prompt.clone(),
        // Beside whole conversations, the prompt as a text is there twice.
        Value::String(prompt) if both == 0 => vec![json!({ "role": "user", "content": prompt })],
        _ => vec![],
    };
    let answer = |answer: &[Value]| -> Result<Document> {
        let messages = [&given[..], answer].concat();
        let documents = conversation(at, &messages, given.len() + both, template)?;
        match <[Document; 1]>::try_from(documents) {
            Ok([document]) => Ok(document),
            Err(_) => Err(SHORTENED.into()),
        }
    };
    Ok((answer(chosen)?, answer(rejected)?))
}

/// How many bytes two texts begin with alike, without a space at the end.
fn shared(a: &str, b: &str) -> usize {
    let alike = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    let end = alike.map_or(a.len().min(b.len()), |((at, _), _)| at);
    a[..end].strip_suffix(' ').map_or(end, str::len)
}

/// A preference as tokens.
pub struct Pair {
    pub chosen: Example,
    pub rejected: Example,
    /// What the reference gives to both, once it is known.
    pub reference: OnceLock<[f32; 2]>,
}

impl Pair {
    pub fn examples(&self) -> [&Example; 2] {
        [&self.chosen, &self.rejected]
    }
}

/// The pairs of a file, and what became of its entries.
pub struct Pairs {
    pub all: Vec<Pair>,
    /// Pairs with an answer that was cut off.
    pub cut: usize,
    /// Where the pairs stand whose answers are the same, or one of them empty, so cut.
    pub dropped: Vec<String>,
}

/// Pairs of at most `length` tokens to read in each of both texts.
pub fn pairs(preferences: &[Preference], tokens: &Tokens, length: usize) -> Result<Pairs> {
    let (mut all, mut cut, mut dropped) = (vec![], 0, vec![]);
    for Preference { chosen, rejected } in preferences {
        let mut is_cut = false;
        let mut within = |document: &Document| -> Result<Example> {
            let mut example = encode(document, tokens)?;
            is_cut |= example.cut(length);
            Ok(example)
        };
        let pair = Pair {
            chosen: within(chosen)?,
            rejected: within(rejected)?,
            reference: OnceLock::new(),
        };
        let empty = pair.examples().iter().any(|example| example.predicted() == 0);
        if empty || pair.chosen.ids == pair.rejected.ids {
            dropped.push(chosen.at.clone());
            continue;
        }
        cut += usize::from(is_cut);
        all.push(pair);
    }
    match (all.is_empty(), dropped.first()) {
        (true, Some(at)) => Err(format!(
            "{at}: no answers that differ among the first {length} tokens: see --length"
        )
        .into()),
        _ => Ok(Pairs { all, cut, dropped }),
    }
}

/// Some pairs, first all chosen answers, then all rejected ones, each after its prompt.
pub struct Compared<'a> {
    pub pairs: Vec<&'a Pair>,
    /// The labels (1, tokens) are the token after each where a log-probability is needed, or -100.
    pub texts: Batch,
    /// Of each token the number of its text (tokens).
    pub text: Tensor,
    /// 1 where an answer is predicted, else 0 (tokens).
    pub learned: Tensor,
}

impl AsRef<Batch> for Compared<'_> {
    fn as_ref(&self) -> &Batch {
        &self.texts
    }
}

/// Pairs in random order.
pub struct Sampled<'a> {
    pub pairs: &'a [Pair],
    /// Whether the prompts of chosen answers are learned too.
    pub prompts: bool,
}

impl<'a> Rows for Sampled<'a> {
    type Row = &'a Pair;
    type Batch = Compared<'a>;

    fn rows(&self, rng: Option<&mut Rng>) -> Vec<Self::Row> {
        let mut all: Vec<_> = self.pairs.iter().collect();
        if let Some(rng) = rng {
            rng.shuffle(&mut all);
        }
        all
    }

    fn batch(&self, rows: &[Self::Row], device: &Device) -> Result<Compared<'a>> {
        let (mut ids, mut labels, mut lens) = (vec![], vec![], vec![]);
        let (mut text, mut learned) = (vec![], vec![]);
        let chosen = rows.iter().map(|pair| (&pair.chosen, self.prompts));
        for (example, all) in chosen.chain(rows.iter().map(|pair| (&pair.rejected, false))) {
            let inputs = example.inputs();
            text.extend(std::iter::repeat_n(lens.len() as u32, inputs));
            lens.push(inputs);
            ids.extend_from_slice(&example.ids[..inputs]);
            for (id, is_learned) in example.ids.iter().zip(&example.learned).skip(1) {
                labels.push(if *is_learned || all { i64::from(*id) } else { IGNORED });
                learned.push(f32::from(u8::from(*is_learned)));
            }
        }
        let count = ids.len();
        let shape = (1, count);
        let texts = Batch {
            ids: Tensor::from_vec(ids, shape, device)?,
            labels: Tensor::from_vec(labels, shape, device)?,
            lens,
            counted: rows.len(),
        };
        Ok(Compared {
            pairs: rows.to_vec(),
            texts,
            text: Tensor::from_vec(text, count, device)?,
            learned: Tensor::from_vec(learned, count, device)?,
        })
    }
}
