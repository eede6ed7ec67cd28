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
    Tokens::new(&tokenizer(), &[&json!("end")])
}

fn tokenizer() -> String {
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
    tokenizer.to_string()
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
fn conversations_of_every_form_are_the_same() -> Result<()> {
    let same = [
        r#"{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b"}]}"#,
        r#"{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "b"}], "system": ""}"#,
        r#"{"prompt": [{"role": "user", "content": "a b"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
        r#"{"instruction": "a b", "input": "", "output": "b", "text": "a b b"}"#,
    ];
    for line in same {
        let (ids, learned) = &read_line(line.as_bytes(), 10)?[1];
        assert_eq!(ids, &[3, 1, 2, 5, 4, 2, 5], "{line}");
        assert_eq!(learned, &[false, false, false, false, false, true, true], "{line}");
    }
    Ok(())
}

#[test]
fn replies_in_a_prompt_are_given() -> Result<()> {
    let line =
        br#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;
    let line: Vec<_> = line.iter().copied().filter(|byte| *byte != b'\n').collect();
    let (ids, learned) = &read_line(&line, 20)?[1];
    assert_eq!(ids, &[3, 1, 5, 4, 2, 5, 3, 1, 5, 4, 2, 5]);
    assert_eq!(learned.iter().filter(|learned| **learned).count(), 2);
    assert_eq!(learned[10..], [true, true]);
    Ok(())
}

/// The token that a tokenizer puts before each text.
#[test]
fn a_text_s_first_token_is_not_learned() -> Result<()> {
    let mut json: serde_json::Value = serde_json::from_str(&tokenizer())?;
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "user", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"user": {"id": "user", "ids": [3], "tokens": ["user"]}},
    });
    let tokens = Tokens::new(&json.to_string(), &[&json!("end")])?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("texts.txt");
    fs::write(&file, "a b\nb\n")?;
    let texts = examples(&read(&file, &Columns::default(), None)?, &tokens, 10)?.all;
    assert_eq!(texts[0].ids, [3, 1, 2, 5, 3, 2, 5]);
    assert_eq!(texts[0].learned, [false, true, true, true, false, true, true]);
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
