//! The embedded text: lines in the E2E format, drawn from a small grammar for each domain.
//!
//! A grammar's lines are `field NAME: value = words; ..`, whose words (the value itself where none
//! are given) fill `{NAME}`, and templates: `open` for first sentences, `more` for those behind them.
//! `(a|b)` is a choice. The first field is always given.

use crate::data::Line;
use crate::rng::Rng;
use crate::Result;
use std::collections::{BTreeMap, HashSet};

const HOTELS: &str = include_str!("hotels.txt");
const CAFES: &str = include_str!("cafes.txt");

/// Lines about hotels, `n` of them; always the same.
pub fn hotels(n: usize) -> Result<Vec<Line>> {
    Grammar::parse(HOTELS)?.lines(n, &mut Rng::new(1))
}

/// Lines about cafes, `n` of them and always the same; no two descriptions are equal.
pub fn cafes(n: usize) -> Result<Vec<Line>> {
    Grammar::parse(CAFES)?.lines(n, &mut Rng::new(2))
}

#[derive(Default)]
struct Grammar<'a> {
    /// Each field's values and their words, in the grammar's order.
    fields: Vec<(&'a str, Vec<(&'a str, &'a str)>)>,
    open: Vec<&'a str>,
    more: Vec<&'a str>,
}

impl<'a> Grammar<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let mut grammar = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.split_once(' ') {
                Some(("open", template)) => grammar.open.push(template),
                Some(("more", template)) => grammar.more.push(template),
                Some(("field", rest)) => {
                    let (name, values) = rest.split_once(": ").ok_or("a field without values")?;
                    let value = |v: &'a str| v.split_once(" = ").unwrap_or((v, v));
                    grammar.fields.push((name, values.split("; ").map(value).collect()));
                }
                _ => return Err(format!("the grammar's line {line:?} is of no kind").into()),
            }
        }
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
        let (mut description, mut unsaid) = (vec![], BTreeMap::new());
        for (i, (field, values)) in self.fields.iter().enumerate() {
            // The first field names the thing that is described.
            if i == 0 || rng.below(5) < 2 {
                let (value, words) = values[rng.below(values.len())];
                let said = chosen(value, rng);
                description.push(format!("{field} : {said}"));
                unsaid.insert(*field, if words == value { said } else { words.to_owned() });
            }
        }
        let mut sentences = vec![self.sentence(&self.open, &mut unsaid, rng)?];
        while !unsaid.is_empty() {
            sentences.push(self.sentence(&self.more, &mut unsaid, rng)?);
        }
        let at = format!("the embedded text on {}", self.fields[0].0);
        Ok(Line { at, description: description.join(" | "), sentence: sentences.join(" ") })
    }

    /// A template filled with values that were not said yet, which it removes.
    fn sentence(
        &self,
        templates: &[&str],
        unsaid: &mut BTreeMap<&'a str, String>,
        rng: &mut Rng,
    ) -> Result<String> {
        let mentions = |t: &str, field: &str| t.contains(&format!("{{{field}}}"));
        let known = |t: &&&str| {
            let mut said = self.fields.iter().filter(|(field, _)| mentions(t, field)).peekable();
            said.peek().is_some() && said.all(|(field, _)| unsaid.contains_key(field))
        };
        let fitting: Vec<_> = templates.iter().filter(known).collect();
        if fitting.is_empty() {
            return Err(format!("the grammar has no template for {unsaid:?}").into());
        }
        let template = fitting[rng.below(fitting.len())];
        let mut text = template.to_string();
        for (field, _) in self.fields.iter().filter(|(field, _)| mentions(template, field)) {
            if let Some(words) = unsaid.remove(field) {
                text = text.replace(&format!("{{{field}}}"), &words);
            }
        }
        Ok(chosen(&text, rng))
    }
}

/// `text` with one of each choice's alternatives.
fn chosen(text: &str, rng: &mut Rng) -> String {
    let Some((before, rest)) = text.split_once('(') else { return text.to_owned() };
    let (choice, after) = rest.split_once(')').unwrap_or((rest, ""));
    let words: Vec<_> = choice.split('|').collect();
    format!("{before}{}{}", words[rng.below(words.len())], chosen(after, rng))
}
