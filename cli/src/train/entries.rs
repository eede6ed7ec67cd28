//! The entries of a data file, with where each stands.

use crate::Result;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// An entry of a data file.
pub enum Entry {
    /// A line of a text.
    Line(String),
    /// A line of JSON Lines, or an element of a JSON array.
    Json(Value),
}

/// Each entry and where it stands: `file:line`, or `file[index]` in a JSON array. A .txt file has lines, trimmed and not
/// blank; others have JSON. An error names the file and the line; a file without entries is one.
pub fn entries(path: &Path) -> Result<Vec<(String, Entry)>> {
    let at = path.display();
    let bytes = fs::read(path).map_err(|e| format!("{at}: {e}"))?;
    if bytes.starts_with(b"PAR1") {
        return Err(format!("{at}: Parquet is not read: write it as JSON Lines").into());
    }
    // Some editors put a byte order mark before the text.
    let text = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let plain = path.extension().is_some_and(|extension| extension == "txt");
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let entries = match first {
        Some(b'[') if !plain => array(path, text)?,
        _ => lines(path, text, plain)?,
    };
    match entries.is_empty() {
        true => Err(format!("{at}: it is empty").into()),
        false => Ok(entries),
    }
}

fn array(path: &Path, text: &[u8]) -> Result<Vec<(String, Entry)>> {
    let at = path.display();
    let all: Vec<Value> = serde_json::from_slice(text).map_err(|e| format!("{at}: {e}"))?;
    let entry = |(i, json)| (format!("{at}[{i}]"), Entry::Json(json));
    Ok(all.into_iter().enumerate().map(entry).collect())
}

fn lines(path: &Path, text: &[u8], plain: bool) -> Result<Vec<(String, Entry)>> {
    let mut entries = vec![];
    for (i, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let at = format!("{}:{}", path.display(), i + 1);
        let line = std::str::from_utf8(line).map_err(|e| format!("{at}: {e}"))?.trim();
        if line.is_empty() {
            continue;
        }
        let entry = match plain {
            true => Entry::Line(line.to_owned()),
            false if i == 0 && !line.starts_with(['{', '"']) => {
                let reason = "expected JSON Lines or a JSON array, or a .txt file";
                return Err(format!("{at}: {reason}: {}", shortened(line)).into());
            }
            false => Entry::Json(
                serde_json::from_str(line)
                    .map_err(|e| format!("{at}: {e}: {}", shortened(line)))?,
            ),
        };
        entries.push((at, entry));
    }
    Ok(entries)
}

/// A line for a message.
pub fn shortened(line: &str) -> String {
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}..", &line[..end]),
        None => line.to_owned(),
    }
}
