//! The lines of a text file, with where each stands.

use crate::Result;
use std::fs;
use std::path::Path;

/// `file:line` and the text of each line that is not blank, trimmed. An error names the file and the
/// line; a file without any is one.
pub fn lines(path: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines = vec![];
    for (i, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let at = format!("{}:{}", path.display(), i + 1);
        let line = std::str::from_utf8(line).map_err(|e| format!("{at}: {e}"))?.trim();
        if !line.is_empty() {
            lines.push((at, line.to_owned()));
        }
    }
    match lines.is_empty() {
        true => Err(format!("{}: no lines", path.display()).into()),
        false => Ok(lines),
    }
}
