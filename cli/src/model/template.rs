//! The model's chat template: messages to the text that the model continues.

use crate::Result;
use chrono::Local;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{context, Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::Value;
use std::fmt::Write;
use std::io;

/// A Jinja template, with what transformers gives it.
pub struct Template {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// `bos` and `eos` are the texts of the tokens around a text.
    pub fn new(source: String, bos: String, eos: String) -> Result<Self> {
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        env.set_unknown_method_callback(unknown_method_callback);
        env.add_function("raise_exception", |reason: String| -> std::result::Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        env.add_function("strftime_now", now);
        env.add_filter("tojson", to_json);
        let source = without_generation(&source);
        env.add_template_owned("chat", source).map_err(|e| format!("the chat template: {e}"))?;
        Ok(Self { env, bos, eos })
    }

    /// The conversation as one text; with `reply` also what stands before the assistant's next words.
    pub fn render(&self, messages: &[Value], reply: bool) -> Result<String> {
        let values = context! {
            messages => Serde(messages),
            add_generation_prompt => reply,
            bos_token => &self.bos,
            eos_token => &self.eos,
            // As transformers without them: none, which is not undefined.
            tools => (),
            documents => (),
        };
        let rendered = self.env.get_template("chat").and_then(|chat| chat.render(values));
        rendered.map_err(|e| format!("the chat template: {e}").into())
    }
}

/// `{% generation %}` marks for transformers what the assistant says; the text is the same without it.
fn without_generation(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (tag, end) = (&rest[start + 2..start + len], start + len + 2);
        kept += &rest[..start];
        let name = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        kept += &match name {
            "generation" => format!("{{%{}%}}", tag.replacen(name, "if true", 1)),
            "endgeneration" => format!("{{%{}%}}", tag.replacen(name, "endif", 1)),
            _ => rest[start..end].to_owned(),
        };
        rest = &rest[end..];
    }
    kept + rest
}

/// The local time, by C's format.
fn now(format: &str) -> std::result::Result<String, Error> {
    let mut text = String::new();
    match write!(text, "{}", Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?}"))),
    }
}

/// As Python's `json.dumps(value, ensure_ascii=False)`, with its `indent`.
fn to_json(
    value: &Jinja,
    indent: Option<usize>,
    options: Kwargs,
) -> std::result::Result<String, Error> {
    let indent = indent.or(options.get("indent")?);
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = vec![];
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n);
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut Serializer::with_formatter(&mut text, formatter))
                .map_err(failed)?;
        }
        None => {
            value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(failed)?;
        }
    }
    String::from_utf8(text).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Python's separators.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(source: &str) -> Result<String> {
        let template = Template::new(source.to_owned(), "<s>".to_owned(), "</s>".to_owned())?;
        let user = json!({"role": "user", "content": "a \"b\" <c> & d\u{e9}"});
        template.render(&[user, json!({"role": "assistant", "content": "e"})], false)
    }

    #[test]
    fn json_is_that_of_python() -> Result<()> {
        let message = r#"{"content": "a \"b\" <c> & dé", "role": "user"}"#;
        assert_eq!(rendered("{{ messages[0] | tojson }}")?, message);
        assert_eq!(rendered("{{ [1, [], {'k': none}] | tojson }}")?, r#"[1, [], {"k": null}]"#);
        let indented = "{\n    \"k\": [\n        1\n    ]\n}";
        assert_eq!(rendered("{{ {'k': [1]} | tojson(indent=4) }}")?, indented);
        assert_eq!(rendered("{{ {'k': [1]} | tojson(4) }}")?, indented);
        Ok(())
    }

    #[test]
    fn generation_is_no_text() -> Result<()> {
        let with = "{% for m in messages %}{%- generation -%} x {{ m.role }} {% endgeneration %}\n{% endfor %}";
        let without =
            "{% for m in messages %}{%- if true -%} x {{ m.role }} {% endif %}\n{% endfor %}";
        assert_eq!(rendered(with)?, rendered(without)?);
        assert_eq!(rendered(with)?, "x user x assistant ");
        Ok(())
    }

    #[test]
    fn loops_have_controls_and_namespaces_and_the_date_is_today() -> Result<()> {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == \
                      'user' %}{% continue %}{% endif %}{{ m.role }}{{ loop.index0 }}{% break %}{% endfor %}{{ ns.n }}";
        assert_eq!(rendered(source)?, "assistant12");
        assert_eq!(rendered("{{ strftime_now('%Y') }}")?, Local::now().format("%Y").to_string());
        Ok(())
    }

    #[test]
    fn tools_are_none() -> Result<()> {
        assert_eq!(
            rendered("{% if tools is not none or documents is not none %}x{% endif %}y")?,
            "y"
        );
        Ok(())
    }

    #[test]
    fn a_template_s_own_error_is_told() {
        let error = rendered("{{ raise_exception('no system role') }}").unwrap_err().to_string();
        assert!(
            error.contains("the chat template: ") && error.contains("no system role"),
            "{error}"
        );
        assert!(rendered("{{ strftime_now('%!') }}").unwrap_err().to_string().contains("%!"));
    }

    /// What `tests/interop/templates.py` wrote.
    #[test]
    #[ignore = "reads templates of real models, by LORA_TEMPLATES"]
    fn templates_of_real_models_are_rendered_as_by_transformers() -> Result<()> {
        let path = std::env::var_os("LORA_TEMPLATES").ok_or("LORA_TEMPLATES is not set")?;
        let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
        let mut differ = 0;
        for case in &cases {
            let text = |name: &str| case[name].as_str().unwrap_or_default().to_owned();
            let template = Template::new(text("source"), text("bos"), text("eos"));
            let messages = case["messages"].as_array().ok_or("no messages")?;
            let reply = case["reply"] == true;
            let ours = template.and_then(|template| template.render(messages, reply));
            if ours.as_ref().ok() != case["expected"].as_str().map(str::to_owned).as_ref() {
                println!(
                    "{}: {ours:?}, expected {} {}",
                    text("name"),
                    case["expected"],
                    case["error"]
                );
                differ += 1;
            }
        }
        assert!(differ == 0, "{differ} of {} differ", cases.len());
        Ok(())
    }
}
