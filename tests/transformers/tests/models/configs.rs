//! candle-transformers' types read the `config.json` that transformers 5 writes.

use candle_transformers::models::{gemma, gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3};
use loralib::base::read_config;
use loralib::Result;
use std::path::PathBuf;

/// A folder that transformers 5 wrote.
fn folder(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../cli/tests/models", name].iter().collect()
}

#[test]
fn options_of_the_rotation_are_those_of_transformers_5() -> Result<()> {
    let llama: llama::LlamaConfig = read_config(folder("llama"))?;
    assert_eq!(llama.rope_theta, 500_000.);
    assert_eq!(llama.rope_scaling.map(|scaling| scaling.factor), Some(8.));
    assert_eq!(read_config::<mistral::Config>(folder("mistral"))?.rope_theta, 10_000.);
    assert_eq!(read_config::<qwen2::Config>(folder("qwen2"))?.rope_theta, 10_000.);
    assert_eq!(read_config::<qwen3::Config>(folder("qwen3"))?.rope_theta, 10_000.);
    assert_eq!(read_config::<gemma::Config>(folder("gemma"))?.rope_theta, 10_000.);
    assert_eq!(read_config::<gemma2::Config>(folder("gemma2"))?.rope_theta, 10_000.);
    let gemma: gemma3::Config = read_config(folder("gemma3"))?;
    assert_eq!((gemma.rope_theta, gemma.rope_local_base_freq), (1e6, 10_000.));
    assert_eq!((gemma.sliding_window, gemma.sliding_window_pattern), (9, 6));
    let phi: phi3::Config = read_config(folder("phi4_mini"))?;
    assert_eq!((phi.rope_theta, phi.partial_rotary_factor), (10_000., Some(0.75)));
    assert_eq!(phi.rope_scaling.map(|scaling| scaling.short_factor.len()), Some(3));
    Ok(())
}

#[test]
fn a_window_that_a_type_drops_is_an_error() {
    // candle's Qwen2 has one window for all layers, its Llama none.
    let error = read_config::<llama::LlamaConfig>(folder("mistral")).unwrap_err().to_string();
    assert!(error.contains("mistral") && error.contains("sliding_window"), "{error}");
}
