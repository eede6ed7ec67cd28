//! The modules of `src`, and the files that define what a path names.

use fancy_regex::Regex;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module's path from the crate, such as `["ops", "conv"]`.
pub type Module = Vec<String>;

pub struct File {
    /// The path below `src`.
    pub name: String,
    /// Without comments, strings, visibilities, tests and `use` declarations.
    pub code: String,
    /// The names that `use` declares, with their paths.
    pub uses: Vec<(String, Module)>,
}

pub type Files = BTreeMap<Module, File>;

pub fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap()
}

fn read(folder: &Path, module: &[String], files: &mut Files) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let stem = entry.file_stem().unwrap().to_str().unwrap();
        let mut own = module.to_vec();
        if !["lib", "mod"].contains(&stem) {
            own.push(stem.to_owned());
        }
        if entry.is_dir() {
            read(&entry, &own, files);
        } else {
            let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
            let name = entry.strip_prefix(src).unwrap().to_str().unwrap().to_owned();
            files.insert(own, parse(name, &fs::read_to_string(&entry).unwrap()));
        }
    }
}

fn parse(name: String, text: &str) -> File {
    let code = regex(r#"//[^\n]*|pub\(in [^)]*\)|"(?:[^"\\]|\\.)*""#).replace_all(text, "");
    let code =
        regex(r"(?s)#\[cfg\((?:all\()?test[^\]]*\]\s*mod \w+ \{.*?\n\}").replace_all(&code, "");
    let declaration = regex(r"(?m)^\s*(?:pub(?:\([^)]*\))? )?use ([^;]+);");
    let uses =
        declaration.captures_iter(&code).flat_map(|found| expand(&found.unwrap()[1])).collect();
    File { name, code: declaration.replace_all(&code, "").into_owned(), uses }
}

/// The names of a `use` tree with their paths; `*` is a name too.
pub fn expand(tree: &str) -> Vec<(String, Module)> {
    if let (Some(open), Some(close)) = (tree.find('{'), tree.rfind('}')) {
        let mut depth = 0;
        let branches = tree[open + 1..close].split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        });
        let branches = branches.filter(|branch| !branch.trim().is_empty());
        return branches.flat_map(|branch| expand(&(tree[..open].to_owned() + branch))).collect();
    }
    let (path, name) = tree.split_once(" as ").unwrap_or((tree, ""));
    let mut path: Module = path.split("::").map(|part| part.trim().to_owned()).collect();
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let name = if name.is_empty() { path[path.len() - 1].clone() } else { name.trim().to_owned() };
    vec![(name, path)]
}

/// The files that `path` in module `from` leads to: those that define the item, and those that re-export it; none for
/// another crate's.
pub fn resolve(files: &Files, from: &[String], path: &[String]) -> BTreeSet<String> {
    let parent = |module: &[String]| module[..module.len().saturating_sub(1)].to_vec();
    let child = |module: &[String], name: &str| [module, &[name.to_owned()]].concat();
    let (mut at, mut rest) = match path[0].as_str() {
        "crate" => (vec![], &path[1..]),
        "self" => (from.to_vec(), &path[1..]),
        "super" => (parent(from), &path[1..]),
        _ if files.contains_key(&child(from, &path[0])) => (from.to_vec(), path),
        name => {
            let mut uses = files[from].uses.iter();
            return match uses.find(|(own, used)| own == name && used[0] != *name) {
                Some((_, used)) => resolve(files, from, &[used, &path[1..]].concat()),
                None => BTreeSet::new(),
            };
        }
    };
    while let Some(next) = rest.first() {
        match next.as_str() {
            "super" => at = parent(&at),
            _ if files.contains_key(&child(&at, next)) => at.push(next.clone()),
            _ => break,
        }
        rest = &rest[1..];
    }
    let Some(item) = rest.first() else { return [files[&at].name.clone()].into() };
    let mut found = defining(files, &at, item);
    // A module's parts may import each other by way of the module. A macro's items are not found.
    if found.is_empty() || !from.starts_with(&at) {
        found.insert(files[&at].name.clone());
    }
    found
}

/// The files that define an item of a module, in the module or where it is re-exported from.
fn defining(files: &Files, at: &[String], item: &String) -> BTreeSet<String> {
    let file = &files[at];
    let mut found = BTreeSet::new();
    for (name, path) in &file.uses {
        if name == item || item == "*" {
            found.extend(resolve(files, at, path));
        } else if name == "*" {
            let module = path[..path.len() - 1].iter().filter(|part| *part != "crate");
            let module: Module = module.cloned().collect();
            if files.contains_key(&module) {
                found.extend(defining(files, &module, item));
            }
        }
    }
    let kinds = "fn|struct|enum|trait|type|const|static|macro_rules!";
    if regex(&format!(r"\b({kinds}) {}\b", fancy_regex::escape(item))).is_match(&file.code).unwrap()
    {
        found.insert(file.name.clone());
    }
    found
}

pub fn source() -> Files {
    let mut files = Files::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &[], &mut files);
    files
}
