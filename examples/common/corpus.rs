//! The embedded text: lines in the E2E format, drawn from a small grammar for each domain.
//!
//! A grammar's lines are `field NAME: value = words; ..`, whose words (the value itself where none
//! are given) fill `{NAME}`, and templates: `open` for first sentences, `more` for those behind them.
//! `(a|b)` is a choice, among labels too: the first one is the NAME. The first field names what is
//! described and is always given. The others come in the grammar's order, or in any order where a
//! line says `shuffled`, and the sentences follow the description: a base that has met many labels
//! and orders learns to copy what stands there, and so takes a new domain's labels.
//!
//! Every seventh name is held out: it stands in validation lines and in no others, so that no
//! description of validation was trained on. The name's two words stand in other names, and its
//! other values in other lines.

use crate::rng::Rng;
use crate::Result;
use std::collections::HashSet;

const HOTELS: &str = include_str!("hotels.txt");
const CAFES: &str = include_str!("cafes.txt");

/// A description and the sentence for it.
#[derive(Clone)]
pub struct Line {
    pub description: String,
    pub sentence: String,
    /// For each value of the description, its forms: one of them should stand in the sentence.
    pub slots: Vec<Vec<String>>,
}

/// `n` lines about hotels, always the same.
pub fn hotels(n: usize) -> Result<Vec<Line>> {
    Grammar::parse(HOTELS, false)?.lines(n, &mut Rng::new(1))
}

/// `n` lines about cafes for training, always the same.
pub fn cafes(n: usize) -> Result<Vec<Line>> {
    Grammar::parse(CAFES, false)?.lines(n, &mut Rng::new(2))
}

/// `n` lines about cafes with the names that are held out, always the same.
pub fn other_cafes(n: usize) -> Result<Vec<Line>> {
    Grammar::parse(CAFES, true)?.lines(n, &mut Rng::new(3))
}

struct Field {
    /// The first one is its name in templates.
    labels: Vec<String>,
    /// With the forms that each takes in sentences.
    values: Vec<(String, Vec<String>)>,
}

#[derive(Default)]
struct Grammar<'a> {
    fields: Vec<Field>,
    /// Whether the fields behind the first come in any order.
    shuffled: bool,
    open: Vec<&'a str>,
    more: Vec<&'a str>,
}

impl<'a> Grammar<'a> {
    /// With the names that are held out, or with the others.
    fn parse(text: &'a str, held_out: bool) -> Result<Self> {
        let mut grammar = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.split_once(' ') {
                None if line == "shuffled" => grammar.shuffled = true,
                Some(("open", template)) => grammar.open.push(template),
                Some(("more", template)) => grammar.more.push(template),
                Some(("field", rest)) => {
                    let (label, given) = rest.split_once(": ").ok_or("a field without values")?;
                    let values = given.split("; ").flat_map(values).collect();
                    grammar.fields.push(Field { labels: forms(label), values });
                }
                _ => return Err(format!("the grammar's line {line:?} is of no kind").into()),
            }
        }
        let named = grammar.fields.first_mut().ok_or("a grammar without fields")?;
        let mut seventh = (0..7).cycle().map(|i| i == 0);
        named.values.retain(|_| seventh.next() == Some(held_out));
        Ok(grammar)
    }

    /// `n` lines whose descriptions all differ.
    fn lines(&self, n: usize, rng: &mut Rng) -> Result<Vec<Line>> {
        let (mut lines, mut seen) = (vec![], HashSet::new());
        while lines.len() < n {
            let line = self.line(rng)?;
            if seen.insert(line.description.clone()) {
                lines.push(line);
            }
        }
        Ok(lines)
    }

    fn line(&self, rng: &mut Rng) -> Result<Line> {
        let mut fields: Vec<_> = self.fields.iter().collect();
        if self.shuffled {
            rng.shuffle(&mut fields[1..]);
        }
        let (mut description, mut slots, mut unsaid) = (vec![], vec![], vec![]);
        for (i, Field { labels, values }) in fields.into_iter().enumerate() {
            if i == 0 || rng.below(3) == 0 {
                let (value, forms) = &values[rng.below(values.len())];
                description.push(format!("{} : {value}", labels[rng.below(labels.len())]));
                unsaid.push((&labels[0][..], &forms[rng.below(forms.len())][..]));
                slots.push(forms.clone());
            }
        }
        let mut unsaid = &unsaid[..];
        let mut sentences = vec![sentence(&self.open, &mut unsaid, rng)?];
        while !unsaid.is_empty() {
            sentences.push(sentence(&self.more, &mut unsaid, rng)?);
        }
        let (description, sentence) = (description.join(" | "), sentences.join(" "));
        Ok(Line { description, sentence, slots })
    }
}

/// A template filled with the fields that were not said yet and come first, which it takes off.
fn sentence(templates: &[&str], unsaid: &mut &[(&str, &str)], rng: &mut Rng) -> Result<String> {
    let says = |template: &str| {
        let first = unsaid.get(..template.matches('{').count())?;
        let said = first.iter().all(|(field, _)| template.contains(&format!("{{{field}}}")));
        said.then_some(first.len())
    };
    let fitting: Vec<_> = templates.iter().filter_map(|t| Some((t, says(t)?))).collect();
    if fitting.is_empty() {
        return Err(format!("the grammar has no template for {unsaid:?}").into());
    }
    let (template, n) = fitting[rng.below(fitting.len())];
    let (said, rest) = unsaid.split_at(n);
    *unsaid = rest;
    let fill =
        |text: String, (field, words): &(&str, &str)| text.replace(&format!("{{{field}}}"), words);
    Ok(said.iter().fold(template.to_string(), fill))
}

/// A field's value with its words as forms, or each alternative of a value without words.
fn values(given: &str) -> Vec<(String, Vec<String>)> {
    match given.split_once(" = ") {
        Some((value, words)) => vec![(value.to_owned(), forms(words))],
        None => forms(given).into_iter().map(|value| (value.clone(), vec![value])).collect(),
    }
}

/// `text` with each alternative of its choices.
fn forms(text: &str) -> Vec<String> {
    let Some((before, rest)) = text.split_once('(') else { return vec![text.to_owned()] };
    let (choice, after) = rest.split_once(')').unwrap_or((rest, ""));
    let after = forms(after);
    let with = |word: &str| -> Vec<_> {
        after.iter().map(|after| format!("{before}{word}{after}")).collect()
    };
    choice.split('|').flat_map(with).collect()
}
