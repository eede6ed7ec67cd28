//! Python's regular expressions, in which PEFT names modules.

use fancy_regex::{Regex, RegexBuilder};

/// Bytes of a compiled expression, which a hostile file must not exceed.
const SIZE_LIMIT: usize = 1 << 20;

/// Compiles `prefix` and then `expression`, to match a whole text.
pub(crate) fn full_match(prefix: &str, expression: &str) -> std::result::Result<Regex, String> {
    compile_between(&format!(r"\A{prefix}(?:"), expression, r")\z")
}

/// Compiles `expression` between two texts that may open and close a group.
pub(crate) fn compile_between(
    before: &str,
    expression: &str,
    after: &str,
) -> std::result::Result<Regex, String> {
    // Alone first, so that the expression's parentheses cannot close those around it.
    let compile = |text: &str| RegexBuilder::new(text).delegate_size_limit(SIZE_LIMIT).build();
    compile(expression)
        .and_then(|_| compile(&format!("{before}{expression}{after}")))
        .map_err(|e| e.to_string())
}
