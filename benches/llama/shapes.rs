//! The sizes of models like Llama.

/// The sizes of a model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub d: usize,
    pub layers: usize,
    pub vocabulary: usize,
}

impl Shape {
    /// Each linear layer: its name, outputs and inputs.
    pub fn linears(&self) -> [(&'static str, usize, usize); 7] {
        let (q, kv) = (self.heads * self.d, self.kv_heads * self.d);
        [
            ("q_proj", q, self.hidden),
            ("k_proj", kv, self.hidden),
            ("v_proj", kv, self.hidden),
            ("o_proj", self.hidden, q),
            ("gate_proj", self.intermediate, self.hidden),
            ("up_proj", self.intermediate, self.hidden),
            ("down_proj", self.hidden, self.intermediate),
        ]
    }
}

pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "0.5B",
        hidden: 896,
        intermediate: 4864,
        heads: 14,
        kv_heads: 2,
        d: 64,
        layers: 24,
        vocabulary: 151_936,
    },
    Shape {
        name: "1.5B",
        hidden: 1536,
        intermediate: 8960,
        heads: 12,
        kv_heads: 2,
        d: 128,
        layers: 28,
        vocabulary: 151_936,
    },
    Shape {
        name: "7B",
        hidden: 4096,
        intermediate: 11_008,
        heads: 32,
        kv_heads: 32,
        d: 128,
        layers: 32,
        vocabulary: 32_000,
    },
    Shape {
        name: "14B",
        hidden: 5120,
        intermediate: 13_824,
        heads: 40,
        kv_heads: 8,
        d: 128,
        layers: 48,
        vocabulary: 152_064,
    },
];
