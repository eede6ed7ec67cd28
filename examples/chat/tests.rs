//! Bad lines and options are refused with where and what they are; tokens are drawn by their probabilities.

use crate::args::Args;
use crate::data::read;
use crate::examples::examples;
use crate::sample::Sampler;
use crate::template::Template;
use crate::tokens::Tokens;
use crate::Result;
use candle_core::{Device, Tensor};
use clap::{CommandFactory, Parser};
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
    let documents = read(&file, Some(&template()?))?;
    let (examples, _) = examples(&documents, &tokens()?, length)?;
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
    let cases: [(&[u8], &[&str]); 7] = [
        (br#"{"messages": ["#, &["EOF while parsing", r#"{"messages": ["#]),
        (br#"{"prompt": "a"}"#, &["\"completion\"", r#"{"prompt": "a"}"#]),
        (br#"{"messages": []}"#, &["no message of the role \"assistant\""]),
        (none_learned, &["no message of the role \"assistant\""]),
        (br#"{"messages": [{"role": "user"}]}"#, &["\"content\": {\"role\":\"user\"}"]),
        (br#"{"prompt": "a a a a a a", "completion": " b"}"#, &["first 4 of 7", "--length"]),
        (b"{\"prompt\": \"\xff\"}", &["invalid utf-8"]),
    ];
    for (line, expected) in cases {
        let error = read_line(line, 4).unwrap_err().to_string();
        for words in [&["train.jsonl:2: "], expected].concat() {
            assert!(error.contains(words), "{error:?} does not contain {words:?}");
        }
    }
}

#[test]
fn options_that_mean_nothing_are_refused() {
    Args::command().debug_assert();
    let parsed = |options: &str| Args::try_parse_from(options.split(' ')).map(drop);
    parsed("chat --model m --adapter a --temperature 0 --top-p 1").unwrap();
    for (options, expected) in [
        ("--temperature=-1", "0 or more"),
        ("--temperature inf", "0 or more"),
        ("--top-p 0", "above 0 and at most 1"),
        ("--top-p 1.1", "above 0 and at most 1"),
        ("--validate-every 0", "0 is not in 1.."),
        ("--resume", "--data"),
        ("--adapter a", "--model"),
    ] {
        let error = parsed(&format!("chat {options}")).unwrap_err().to_string();
        assert!(error.contains(expected), "{options}: {error}");
    }
}

#[test]
fn tokens_are_drawn_by_their_probabilities_from_the_likeliest() -> Result<()> {
    let probabilities = [0.1f32, 0.5, 0.3, 0.1];
    let logits = Tensor::new(&probabilities.map(f32::ln), &Device::Cpu)?;
    let shares = |temperature, top_p| -> Result<[f64; 4]> {
        let (mut sampler, mut shares) = (Sampler::new(temperature, top_p, 7), [0.; 4]);
        for _ in 0..20_000 {
            shares[sampler.next(&logits)? as usize] += 1. / 20_000.;
        }
        Ok(shares)
    };
    for (temperature, top_p, expected) in [
        (0., 1., [0., 1., 0., 0.]),
        (1., 1e-9, [0., 1., 0., 0.]),
        (1., 0.7, [0., 0.625, 0.375, 0.]),
        (1., 1., [0.1, 0.5, 0.3, 0.1]),
        // The squares, in proportion.
        (0.5, 1., [1. / 36., 25. / 36., 9. / 36., 1. / 36.]),
    ] {
        let found = shares(temperature, top_p)?;
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 0.02, "{temperature}, {top_p}: {found:?}");
        }
    }
    Ok(())
}

#[test]
fn the_same_seed_draws_the_same_tokens() -> Result<()> {
    let logits = Tensor::zeros(100, candle_core::DType::F32, &Device::Cpu)?;
    let drawn = |seed| -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(1., 1., seed);
        (0..20).map(|_| sampler.next(&logits)).collect()
    };
    assert_eq!(drawn(1)?, drawn(1)?);
    assert_ne!(drawn(1)?, drawn(2)?);
    Ok(())
}
