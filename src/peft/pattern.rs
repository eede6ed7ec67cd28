//! The keys of `rank_pattern` and `alpha_pattern`: regular expressions for the end of a path, after
//! a dot, as PEFT matches them.
//!
//! Characters, `.`, `\d`, `\w`, escapes, `*`, `+`, `?`, and `^` for a whole path. Others are an
//! error, for a pattern that is not understood would change the update without a word.

#[derive(Debug, Clone)]
pub(super) struct Pattern {
    whole: bool,
    items: Vec<Item>,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    accepts: Accepts,
    optional: bool,
    repeated: bool,
}

#[derive(Debug, Clone, Copy)]
enum Accepts {
    Any,
    Digit,
    Word,
    One(char),
}

impl Pattern {
    pub fn new(text: &str) -> Result<Self, String> {
        let body = text.strip_suffix('$').unwrap_or(text);
        let (whole, body) = match body.strip_prefix('^') {
            Some(body) => (true, body),
            None => (false, body),
        };
        let (mut items, mut chars) = (vec![], body.chars().peekable());
        while let Some(c) = chars.next() {
            let accepts = match c {
                '.' => Accepts::Any,
                '\\' => match chars.next() {
                    Some('d') => Accepts::Digit,
                    Some('w') => Accepts::Word,
                    Some(c) if !c.is_alphanumeric() => Accepts::One(c),
                    _ => return Err(format!("an escape in {text:?} that is not understood")),
                },
                '(' | ')' | '[' | ']' | '{' | '}' | '|' | '^' | '$' | '*' | '+' | '?' => {
                    return Err(format!("{c:?} in {text:?}, which is not understood"))
                }
                c => Accepts::One(c),
            };
            let times = chars.next_if(|c| matches!(c, '*' | '+' | '?'));
            items.push(Item {
                accepts,
                optional: matches!(times, Some('*' | '?')),
                repeated: matches!(times, Some('*' | '+')),
            });
        }
        Ok(Self { whole, items })
    }

    pub fn matches(&self, path: &str) -> bool {
        let n = self.items.len();
        // at[i]: the first i items have matched what was read so far.
        let mut at = vec![false; n + 1];
        let mut start = true;
        for c in path.chars().map(Some).chain([None]) {
            at[0] |= start;
            for i in 0..n {
                at[i + 1] |= at[i] && self.items[i].optional;
            }
            let Some(c) = c else { break };
            let mut next = vec![false; n + 1];
            for (i, item) in self.items.iter().enumerate() {
                let accepted = match item.accepts {
                    Accepts::Any => true,
                    Accepts::Digit => c.is_ascii_digit(),
                    Accepts::Word => c.is_alphanumeric() || c == '_',
                    Accepts::One(own) => own == c,
                };
                // A repeated item that has matched may match again.
                next[i + 1] = accepted && (at[i] || (item.repeated && at[i + 1]));
            }
            (at, start) = (next, c == '.' && !self.whole);
        }
        at[n]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_the_end_of_a_path_after_a_dot() -> Result<(), String> {
        let all = [
            ("q", "layers.0.q", true),
            ("q", "layers.0.eq", false),
            ("q", "q", true),
            ("q", "layers.q.0", false),
            ("layers.0.q", "model.layers.0.q", true),
            ("^layers.0.q", "model.layers.0.q", false),
            ("^layers.0.q$", "layers.0.q", true),
            (r"layers\.\d+\.q", "layers.12.q", true),
            (r"layers\.\d+\.q", "layers.x.q", false),
            (r"layers.*q", "model.layers.1.attn.q", true),
            (r"layers.*q", "model.layers.1.attn.k", false),
            ("ab?c+", "ac", true),
            ("ab?c+", "abbc", false),
            ("ab?c+", "abccc", true),
            (r"\w+", "a.b_1", true),
            (r"q\.o", "qxo", false),
            ("", "a", false),
            (".*", "", true),
        ];
        for (pattern, path, expected) in all {
            assert_eq!(Pattern::new(pattern)?.matches(path), expected, "{pattern} {path}");
        }
        for bad in ["a|b", "(a)", "[ab]", "a{2}", r"\bq", "*", "\\"] {
            assert!(Pattern::new(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
