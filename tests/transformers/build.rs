//! Copies the sources of candle-transformers from the registry's folder into the build folder, with
//! `use loralib::nn as candle_nn;` at the top of each file, and a second line in those that know flash attention.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const LINE: &str = "#[allow(unused_imports)]\nuse loralib::nn as candle_nn;\n";
const FLASH: &str = "#[allow(unused_imports)]\nuse loralib::nn::flash_attn as candle_flash_attn;\n";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.lock");
    let (from, to) = (sources()?, PathBuf::from(env::var("OUT_DIR")?).join("models"));
    if to.exists() {
        fs::remove_dir_all(&to)?;
    }
    copy(&from, &to)?;
    // The module above the copies re-exports these names instead of the file.
    let with_tracing = "pub use loralib::nn::with_tracing::*;\n\
                        pub use candle_transformers::models::with_tracing::QMatMul;\n";
    fs::write(to.join("models/with_tracing.rs"), with_tracing)?;
    let modules = ["models/mod.rs", "quantized_nn.rs", "fused_moe.rs"].map(|file| {
        let name = file.split(['/', '.']).next().unwrap_or_default();
        format!("#[path = {:?}]\npub mod {name};\n", to.join(file))
    });
    // Llama once more, on candle's composed operations.
    let llama = fs::read_to_string(to.join("models/llama.rs"))?;
    let composed = to.join("composed_llama.rs");
    fs::write(&composed, llama.replace("loralib::nn as", "crate::composed as"))?;
    let composed = format!(
        "pub mod composed_models {{ #[path = {composed:?}] pub mod llama; \
         pub use crate::composed::with_tracing; }}"
    );
    let modules = modules.concat() + &composed;
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("modules.rs"), modules)?;
    Ok(())
}

/// The folder of candle-transformers' sources, as cargo knows it.
fn sources() -> Result<PathBuf, Box<dyn Error>> {
    let cargo = env::var("CARGO")?;
    let metadata = Command::new(cargo).args(["metadata", "--format-version", "1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata has no packages")?;
    let package = packages.iter().find(|package| package["name"] == "candle-transformers");
    let manifest = package.and_then(|p| p["manifest_path"].as_str());
    Ok(Path::new(manifest.ok_or("no candle-transformers")?).with_file_name("src"))
}

/// The file with `moe::route` in place of all from the router's softmax to the sum of the experts.
fn routed(file: &str) -> Option<String> {
    let softmax = "let routing_weights = candle_nn::ops::softmax_last_dim(&router_logits)?;\n";
    let last = "ys = ys.index_add(&top_x, &current_hidden_states, 0)?;\n        }\n";
    let from = file.find(softmax)? + softmax.len();
    let to = from + file[from..].find(last)? + last.len();
    let norm = if file.contains("norm_topk_prob") { "self.norm_topk_prob" } else { "true" };
    let route = format!(
        "        let ys = candle_nn::moe::route(&xs, &routing_weights, self.num_experts_per_tok, {norm}, \
         |i, xs| self.experts[i].forward(xs))?;\n"
    );
    Some([&file[..from], &route, &file[to..]].concat())
}

fn copy(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else if entry.path().extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(entry.path())?;
            // After the file's inner documentation and attributes.
            let inner = |line: &str| line.starts_with("//!") || line.starts_with("#![");
            let lines: Vec<_> = text.split_inclusive('\n').collect();
            let head = lines.iter().rposition(|line| inner(line)).map_or(0, |last| last + 1);
            let head: usize = lines[..head].iter().map(|line| line.len()).sum();
            let (head, rest) = text.split_at(head);
            // qwen3.rs imports the crate's name itself.
            let own = "#[cfg(feature = \"flash-attn\")]\nuse candle_flash_attn;\n";
            let rest = rest.replace(own, "");
            let flash = if rest.contains("candle_flash_attn::") { FLASH } else { "" };
            let text = match entry.file_name().to_str() {
                // Its inner module has `use super::*` and names candle_nn in a function: ambiguous.
                Some("metavoice.rs") => text,
                // It has a Linear of its own, by the same constructor and forward.
                Some("t5.rs") => {
                    let from = rest.find("#[derive(Debug, Clone)]\npub struct Linear");
                    let to = rest.find("fn default_relative_attention");
                    let (from, to) = (from.ok_or("t5.rs: no Linear")?, to.ok_or("t5.rs: no end")?);
                    let own = "pub use candle_nn::{linear_no_bias, Linear};\n\n";
                    format!("{head}{LINE}{}{own}{}", &rest[..from], &rest[to..])
                }
                // The routers read their weights to the host, which cuts the graph.
                Some("mixtral.rs" | "qwen2_moe.rs" | "qwen3_moe.rs") => {
                    format!("{head}{LINE}{flash}{}", routed(&rest).ok_or("no router")?)
                }
                // It re-exports candle_nn already.
                _ if rest.contains("pub use candle_nn;") => {
                    text.replace("pub use candle_nn;", "pub use loralib::nn as candle_nn;")
                }
                _ => format!("{head}{LINE}{flash}{rest}"),
            };
            fs::write(target, text)?;
        }
    }
    Ok(())
}
