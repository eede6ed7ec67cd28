//! What is combined.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    Lora,
    Dora,
    Pissa,
    BiasOfB,
    Quantised,
    Tied,
    TiedUpdate,
    TokenRows,
    Embedding,
    Convolution,
    Dropout,
    Checkpointing,
    Adapters,
    Rows,
    Sums,
    Own,
    Peft,
    Diffusers,
    Kohya,
    Mlx,
    Gguf,
}

use Feature::*;

/// All features with their names in the table.
pub const FEATURES: [(Feature, &str); 21] = [
    (Lora, "LoRA"),
    (Dora, "DoRA"),
    (Pissa, "PiSSA"),
    (BiasOfB, "`lora_bias`"),
    (Quantised, "quantised base"),
    (Tied, "tied head"),
    (TiedUpdate, "`ensure_weight_tying`"),
    (TokenRows, "token rows"),
    (Embedding, "embedding"),
    (Convolution, "convolution"),
    (Dropout, "dropout"),
    (Checkpointing, "checkpointing"),
    (Adapters, "`Adapters::with`"),
    (Rows, "`with_rows`"),
    (Sums, "sums"),
    (Own, "own file"),
    (Peft, "PEFT"),
    (Diffusers, "diffusers"),
    (Kohya, "kohya"),
    (Mlx, "MLX"),
    (Gguf, "GGUF adapter"),
];
