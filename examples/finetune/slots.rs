//! Slot accuracy: how many of the descriptions' values stand in the sentences for them.

use crate::corpus::Line;

/// How many slots of `line` stand in `sentence`, by the grammar's words for its value.
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
