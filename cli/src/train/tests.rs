//! Bad lines are refused with where and what they are, and replies alone are learned.

use super::columns::Columns;
use super::data::read;
use super::examples::examples;
use crate::model::{Template, Tokens};
use crate::Result;
use serde_json::json;
use std::fs;

/// A token for each of these words, the last of which ends a text.
fn tokens() -> Result<Tokens> {
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {"?": 0, "a": 1, "b": 2, "user": 3, "assistant": 4, "end": 5},
            "unk_token": "?",
        },
    });
    Tokens::new(&tokenizer.to_string(), &[&json!("end")])
}

fn template() -> Result<Template> {
    let source = "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}\
                  {% if add_generation_prompt %}assistant {% endif %}";
    Template::new(source.to_owned(), String::new(), "end".to_owned())
}

/// The ids and what is learned of each example of a file with two good lines and this one between them.
fn read_line(line: &[u8], length: usize) -> Result<Vec<(Vec<u32>, Vec<bool>)>> {
    let dir = tempfile::tempdir()?;
    let (file, good) = (dir.path().join("train.jsonl"), br#"{"prompt": "a", "completion": " b"}"#);
    fs::write(&file, [&good[..], line, good].join(&b'\n'))?;
    let documents = read(&file, &Columns::default(), Some(&template()?))?;
    let examples = examples(&documents, &tokens()?, length)?.all;
    Ok(examples.into_iter().map(|example| (example.ids, example.learned)).collect())
}

#[test]
fn replies_alone_are_learned() -> Result<()> {
    let line = br#"{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b"}]}"#;
    let (ids, learned) = &read_line(line, 10)?[1];
    assert_eq!(ids, &[3, 1, 2, 5, 4, 2, 5]);
    assert_eq!(learned, &[false, false, false, false, false, true, true]);
    let (ids, learned) = &read_line(br#"{"prompt": "a b", "completion": " a"}"#, 10)?[1];
    assert_eq!((&ids[..], &learned[..]), (&[1, 2, 1, 5][..], &[false, false, true, true][..]));
    Ok(())
}

#[test]
fn a_bad_line_is_an_error_with_its_place_and_text() {
    let none_learned = br#"{"messages": [{"role": "user", "content": "a"}]}"#;
    let cases: [(&[u8], &[&str]); 9] = [
        (br#"{"messages": ["#, &["EOF while parsing", r#"{"messages": ["#]),
        (br#"{"prompt": "a"}"#, &["\"completion\"", r#"{"prompt":"a"}"#]),
        (br#"{"messages": []}"#, &["no message of the role \"assistant\""]),
        (none_learned, &["no message of the role \"assistant\""]),
        (br#"{"messages": [{"role": "user"}]}"#, &["\"content\": {\"role\":\"user\"}"]),
        (br#"{"instruction": "a"}"#, &["expected \"text\"", "--columns"]),
        (br#"{"conversations": [{"from": "dog", "value": "a"}]}"#, &["a turn from \"dog\""]),
        (br#"{"conversations": [{"from": "gpt"}]}"#, &["\"value\": {\"from\":\"gpt\"}"]),
        (b"{\"prompt\": \"\xff\"}", &["invalid utf-8"]),
    ];
    for (line, expected) in cases {
        let error = read_line(line, 4).unwrap_err().to_string();
        for words in [&["train.jsonl:2: "], expected].concat() {
            assert!(error.contains(words), "{error:?} does not contain {words:?}");
        }
    }
}
