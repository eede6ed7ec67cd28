//! Every feature beside every other: right, or an error. `docs/combinations.md` has the table; with `UPDATE=1` in the
//! environment this writes it.

mod feature;
#[path = "../gguf/fixture.rs"]
#[allow(dead_code)]
mod fixture;
mod reference;
mod scenario;

use feature::{Feature, FEATURES};
use scenario::Scenario;
use std::fmt::Write;
use std::path::Path;

const PAGE: &str = "docs/combinations.md";
const START: &str = "<!-- the table -->\n";

/// What a pair does.
enum Cell {
    Right,
    Error(String),
    /// One excludes the other.
    NoMeaning,
}

fn cell(one: Feature, other: Feature) -> Cell {
    let Some(scenario) = Scenario::of(one, other) else { return Cell::NoMeaning };
    match scenario.run() {
        Ok(()) => Cell::Right,
        Err(error) => {
            // Files by their names alone: their folder is another one each time.
            let error = error.to_string();
            let words = error.lines().next().unwrap_or_default().split(' ');
            let file = |word: &str| word.rsplit(['/', '\\']).next().unwrap_or(word).to_owned();
            let temporary = std::env::temp_dir().display().to_string();
            let words = words.map(|word| match word.starts_with(&temporary) {
                true => file(word),
                false => word.to_owned(),
            });
            Cell::Error(words.collect::<Vec<_>>().join(" "))
        }
    }
}

fn table() -> String {
    let names = FEATURES.map(|(_, name)| name);
    let mut table = format!("| | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
    let mut errors = String::new();
    for (row, (one, name)) in FEATURES.into_iter().enumerate() {
        let others = FEATURES.into_iter().enumerate();
        let cells = others.map(|(column, (other, other_name))| match cell(one, other) {
            _ if column > row => String::new(),
            Cell::Right => "right".to_owned(),
            Cell::NoMeaning => "–".to_owned(),
            Cell::Error(error) => {
                writeln!(errors, "- {name} with {other_name}: {error}").unwrap();
                "error".to_owned()
            }
        });
        writeln!(table, "| {name} | {} |", cells.collect::<Vec<_>>().join(" | ")).unwrap();
    }
    format!("{table}\n## The errors\n\n{errors}")
}

#[test]
fn the_page_says_what_combines_with_what() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let page = std::fs::read_to_string(&path).unwrap();
    let (text, old) = page.split_once(START).unwrap();
    let new = table();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, format!("{text}{START}\n{new}")).unwrap();
        return;
    }
    assert!(
        old.trim() == new.trim(),
        "{PAGE} is not what the crate does: run this test with UPDATE=1\n{new}"
    );
}
