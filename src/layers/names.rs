//! The names of an adapted layer's tensors: the layer's dotted path, then loralib's name of the tensor.

/// What a tensor is in the layer at its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// The factor A.
    A,
    /// The factor B.
    B,
    /// The frozen A₀ that is subtracted with B₀; see [`InitLoraWeights`](super::InitLoraWeights).
    InitialA,
    /// The frozen B₀.
    InitialB,
    /// DoRA's magnitude.
    Magnitude,
    /// The bias of B, PEFT's `lora_bias`.
    BiasOfB,
    /// Rows of a table, PEFT's `trainable_token_indices`.
    TokenRows,
    /// A parameter of the model.
    Base(&'a str),
}

use Part::{Base, BiasOfB, InitialA, InitialB, Magnitude, TokenRows, A, B};

const NAMES: [(&str, Part<'static>); 7] = [
    ("lora_A", A),
    ("lora_B", B),
    ("lora_A_initial", InitialA),
    ("lora_B_initial", InitialB),
    ("lora_magnitude_vector", Magnitude),
    ("lora_bias", BiasOfB),
    ("trainable_tokens", TokenRows),
];

impl<'a> Part<'a> {
    /// The path of a tensor's layer, and what the tensor is there.
    pub fn parse(name: &'a str) -> (&'a str, Self) {
        let (path, last) = name.rsplit_once('.').unwrap_or(("", name));
        let known = NAMES.iter().find(|(name, _)| *name == last);
        (path, known.map_or(Base(last), |(_, part)| *part))
    }

    /// The last component of the tensor's name.
    pub fn name(self) -> &'a str {
        match self {
            Base(last) => last,
            own => NAMES.iter().find(|(_, part)| *part == own).map_or("", |(name, _)| name),
        }
    }

    /// The tensor's name in the layer at `path`, which may be empty.
    pub fn at(self, path: &str) -> String {
        match path {
            "" => self.name().to_owned(),
            path => format!("{path}.{}", self.name()),
        }
    }

    /// Whether this is A or B.
    pub fn is_factor(self) -> bool {
        matches!(self, A | B)
    }

    /// Whether this is A₀ or B₀, which are saved and not trained.
    pub fn is_initial(self) -> bool {
        matches!(self, InitialA | InitialB)
    }

    /// Whether this is a tensor of a layer's update.
    pub fn is_lora(self) -> bool {
        self.is_factor() || self.is_initial() || self == Magnitude
    }

    /// Whether this is a tensor of an adapter, and not one of the model's own.
    pub fn is_adapter(self) -> bool {
        !matches!(self, Base(_))
    }
}

/// The path of a convolution, given that of its tensors by loralib's second names, as in `x.conv.weight`.
pub(crate) fn without_conv(path: &str) -> Option<&str> {
    match path.strip_suffix("conv")? {
        "" => Some(""),
        path => path.strip_suffix('.'),
    }
}

/// Whether `name` has the components of `module`, in a row, somewhere in its path.
pub(crate) fn is_within(name: &str, module: &str) -> bool {
    !module.is_empty() && format!(".{name}.").contains(&format!(".{module}."))
}

/// Whether `path` is `module` or ends in it after a dot. Every path ends in the empty module.
pub(crate) fn ends_in(path: &str, module: &str) -> bool {
    match path.strip_suffix(module) {
        Some(before) => before.is_empty() || before.ends_with('.') || module.is_empty(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_path_and_a_part() {
        assert_eq!(Part::parse("h.0.c_attn.lora_A"), ("h.0.c_attn", A));
        assert_eq!(Part::parse("lora_B"), ("", B));
        assert_eq!(Part::parse("wte.weight"), ("wte", Base("weight")));
        assert_eq!(Part::parse("lora_A.weight"), ("lora_A", Base("weight")));
        for (name, part) in NAMES {
            assert_eq!((part.at("q"), part.at("")), (format!("q.{name}"), name.to_owned()));
            assert_eq!(Part::parse(&part.at("a.b")), ("a.b", part));
        }
        assert_eq!(Base("bias").at("q"), "q.bias");
    }
}
