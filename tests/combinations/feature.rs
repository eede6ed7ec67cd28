//! What is combined.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    Lora,
    Dora,
    Pissa,
    Quantised,
    Tied,
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
pub const FEATURES: [(Feature, &str); 18] = [
    (Lora, "LoRA"),
    (Dora, "DoRA"),
    (Pissa, "PiSSA"),
    (Quantised, "quantised base"),
    (Tied, "tied head"),
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
