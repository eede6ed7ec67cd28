//! Slot accuracy: how many of the descriptions' values stand in the sentences for them.

use crate::data::Line;

/// How many slots stand in the sentences of the base and of the adapted model.
pub struct Slots {
    pub before: usize,
    pub after: usize,
    pub of: usize,
    pub descriptions: usize,
    /// Where a slot counts.
    pub counted: &'static str,
}

/// The values of a description, in the order of its fields.
pub fn values(description: &str) -> impl Iterator<Item = &str> {
    description.split('|').filter_map(|part| part.split_once(':')).map(|(_, value)| value.trim())
}

/// How many slots of `line` stand in `sentence`.
pub fn said(line: &Line, sentence: &str) -> usize {
    let sentence = words(sentence);
    let stands = |form: &String| {
        let form = words(form);
        sentence.windows(form.len().max(1)).any(|part| part == form)
    };
    line.slots.iter().filter(|forms| forms.iter().any(stands)).count()
}

/// Words, numbers and single signs in lower case: "cakes" does not stand in "pancakes".
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in text.to_lowercase().chars() {
        if !c.is_alphanumeric() {
            words.extend([c.to_string(), String::new()]);
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    words.retain(|word| !word.trim().is_empty());
    words
}
