//! No file of `src` imports itself through others, and each folder imports only from those below it.
//!
//! `cargo test --test imports -- --nocapture` prints what each folder imports.

mod source;

use source::{expand, regex, resolve, source, Files, Module};
use std::collections::{BTreeMap, BTreeSet};

/// The folders, each above those that it may import from. `error.rs` is below all.
const ORDER: [&str; 14] = [
    "train", "adapters", "adapter", "gguf", "merge", "formats", "base", "utils", "weights",
    "files", "nn", "layers", "ops", "regex.rs",
];

/// The files that each file imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// What each file imports: what it names, and the module by whose re-export it does.
fn graph(files: &Files) -> Graph {
    let inline = regex(r"(?<![\w:$.])[a-z_]\w*(?:::\w+)+");
    let imports = files.iter().map(|(module, file)| {
        let uses = file.uses.iter().map(|(_, path)| path.clone());
        let paths = inline.find_iter(&file.code).map(|found| found.unwrap().as_str());
        let paths = paths.map(|path| path.split("::").map(str::to_owned).collect());
        let mut all: BTreeSet<_> =
            uses.chain(paths).flat_map(|path| resolve(files, module, &path)).collect();
        all.remove(&file.name);
        (file.name.clone(), all)
    });
    imports.collect()
}

/// A circle of files that import each other.
fn circle(mut graph: Graph) -> Option<String> {
    // Without the files that import none of the others, all that are left lead to a circle.
    while let Some(leaf) =
        graph.iter().find(|(_, imports)| !imports.iter().any(|to| graph.contains_key(to)))
    {
        let leaf = leaf.0.clone();
        graph.remove(&leaf);
    }
    let mut path = vec![graph.keys().next()?];
    loop {
        let next = graph[*path.last()?].iter().find(|to| graph.contains_key(*to))?;
        if let Some(start) = path.iter().position(|file| *file == next) {
            let circle = path[start..].iter().chain([&next]).map(|file| file.as_str());
            return Some(circle.collect::<Vec<_>>().join(" -> "));
        }
        path.push(next);
    }
}

#[test]
fn files_import_without_a_circle() {
    assert_eq!(circle(graph(&source())), None);
}

#[test]
fn folders_import_in_one_direction() {
    let folder = |file: &str| file.split('/').next().unwrap().to_owned();
    let mut folders = BTreeMap::<String, BTreeSet<String>>::new();
    for (file, imports) in graph(&source()) {
        folders.entry(folder(&file)).or_default().extend(imports.iter().map(|file| folder(file)));
    }
    // The crate's root, its pages of documentation and the random values of its tests.
    for file in ["lib.rs", "docs.rs", "random.rs"] {
        folders.remove(file);
    }
    let place = |folder: &String| ORDER.iter().position(|name| name == folder);
    for (from, imports) in &mut folders {
        imports.remove(from);
        println!("{from}: {}", Vec::from_iter(imports.iter().cloned()).join(", "));
        assert!(from == "error.rs" || place(from).is_some(), "{from} has no place in the order");
        let above = imports.iter().find(|to| *to != "error.rs" && place(to) <= place(from));
        assert_eq!(above, None, "{from} imports from a folder above it");
    }
    assert!(folders["error.rs"].is_empty());
}

#[test]
fn imports_lead_to_the_defining_and_the_reexporting_file() {
    let files = source();
    let resolved = |from: &str, path: &str| {
        let parts = |text: &str| text.split("::").map(str::to_owned).collect::<Module>();
        Vec::from_iter(resolve(&files, &parts(from), &parts(path)))
    };
    assert_eq!(resolved("ops::linear", "crate::Error"), ["error.rs"]);
    assert_eq!(
        resolved("merge", "crate::utils::StateDict"),
        ["files/mod.rs", "files/state_dict.rs", "utils/mod.rs"]
    );
    let weights = ["adapter/mod.rs", "weights/lora_weights.rs", "weights/mod.rs"];
    assert_eq!(resolved("merge", "crate::LoraWeights"), weights);
    assert_eq!(resolved("layers::linear", "crate::ops::LowRank"), ["ops/lora.rs", "ops/mod.rs"]);
    assert_eq!(resolved("layers::linear", "ops::linear"), ["ops/linear/mod.rs"]);
    assert_eq!(resolved("ops::merge", "crate::ops::LowRank"), ["ops/lora.rs"]);
    let filled = resolved("ops::conv::cpu", "super::super::cpu::filled");
    assert_eq!(filled, ["ops/cpu/buffer.rs", "ops/cpu/mod.rs"]);
    assert_eq!(resolved("merge::weight", "candle_core::Tensor"), [""; 0]);
    let names: Vec<_> =
        expand("a::{b::{self, C as D}, e::*, f}").into_iter().map(|n| n.0).collect();
    assert_eq!(names, ["b", "D", "*", "f"]);
}
