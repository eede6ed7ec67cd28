//! The flattened names of layers.

use crate::weights::NO_COMPONENT;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// The beginnings of names and of the paths they stand for. All are read; of those that fit a path, [`Names`]
/// writes the first.
const PREFIXES: [(&str, &str); 20] = [
    ("lora_unet_", "unet.model.diffusion_model."),
    ("lora_unet_", "unet."),
    ("lora_unet_", "diffusion_model."),
    ("lora_unet_", "transformer.model.diffusion_model."),
    ("lora_unet_", "transformer."),
    ("lora_transformer_", "transformer."),
    // The text encoders in the single file of an original release: Stable Diffusion 1, SDXL and 3.
    ("lora_te_", "text_encoder.cond_stage_model.transformer."),
    ("lora_te1_", "text_encoder.cond_stage_model.transformer."),
    ("lora_te1_", "text_encoder.conditioner.embedders.0.transformer."),
    ("lora_te1_", "text_encoder.text_encoders.clip_l.transformer."),
    ("lora_te2_", "text_encoder_2.text_encoders.clip_g.transformer."),
    ("lora_te3_", "text_encoder_3.text_encoders.t5xxl.transformer."),
    // transformers 5 has no `text_model` in the paths of CLIP; these programs have.
    ("lora_te_text_model_encoder_layers_", "text_encoder.encoder.layers."),
    ("lora_te1_text_model_encoder_layers_", "text_encoder.encoder.layers."),
    ("lora_te2_text_model_encoder_layers_", "text_encoder_2.encoder.layers."),
    ("lora_te_", "text_encoder."),
    ("lora_te1_", "text_encoder."),
    // T5 is the second text encoder of Flux, and has its name in Stable Diffusion 3.
    ("lora_te3_encoder_block_", "text_encoder_2.encoder.block."),
    ("lora_te2_", "text_encoder_2."),
    ("lora_te3_", "text_encoder_3."),
];

/// The first parts of layers in the layout of an original release, which diffusers names otherwise.
const ORIGINAL: [&str; 6] = [
    "input_blocks",
    "middle_block",
    "output_blocks",
    "double_blocks",
    "single_blocks",
    "joint_blocks",
];

fn flattened(prefix: &str, rest: &str) -> String {
    format!("{prefix}{}", rest.replace('.', "_"))
}

/// The modules of the bases by their flattened names.
pub(super) struct Modules(BTreeMap<String, Vec<String>>);

impl Modules {
    pub fn new(names: &[impl AsRef<str>]) -> Self {
        let mut modules = BTreeMap::<_, Vec<_>>::new();
        for module in names.iter().filter_map(|name| name.as_ref().strip_suffix(".weight")) {
            for (prefix, beginning) in PREFIXES {
                if let Some(rest) = module.strip_prefix(beginning) {
                    let flat = flattened(prefix, rest);
                    modules.entry(flat).or_default().push(module.to_owned());
                }
            }
        }
        Self(modules)
    }

    /// The path of the module with this flattened name.
    pub fn find(&self, flat: &str) -> Result<&str, String> {
        match self.0.get(flat).map(Vec::as_slice) {
            Some([module]) => Ok(module),
            Some(several) => Err(format!("several layers have this name: {several:?}")),
            None => Err(self.missing(flat)),
        }
    }

    fn missing(&self, flat: &str) -> String {
        for part in ORIGINAL {
            let begins = |name: &str| {
                name.strip_prefix("lora_unet_").is_some_and(|rest| rest.starts_with(part))
            };
            if begins(flat) && !self.0.keys().any(|name| begins(name)) {
                return format!(
                    "its layer has the name of the original release, and the base is in another layout: give \
                     the names of the original checkpoint, which has `{part}`"
                );
            }
        }
        let of_open_clip = |name: &String| name.contains("_transformer_resblocks_");
        if flat.starts_with("lora_te") && self.0.keys().any(of_open_clip) {
            return "its layer has a name of transformers, and the base has OpenCLIP's `resblocks`, in which \
                    projections are fused: give transformers' text encoder"
                .to_owned();
        }
        let same = |name: &str| {
            let pairs = name.bytes().zip(flat.bytes());
            pairs.take_while(|(a, b)| a == b).count()
        };
        let mut nearest: Vec<_> = self.0.keys().collect();
        nearest.sort_by_key(|name| Reverse(same(name)));
        nearest.truncate(3);
        format!("the bases have no such layer; the nearest names are {nearest:?}")
    }
}

/// The names to write for an adapter.
pub(super) struct Names {
    /// The beginning of a text encoder's names that the model's programs do not read.
    other_encoder: &'static str,
    /// The same of a transformer.
    other_transformer: &'static str,
}

impl Names {
    /// sd-scripts has `lora_te_` for the text encoder beside a U-Net of Stable Diffusion 1 and 2, `lora_te1_` in all
    /// other models. For a transformer `lora_unet_` has the layers of the original release, `lora_transformer_`
    /// diffusers'.
    pub fn new<'a>(paths: impl Iterator<Item = &'a str> + Clone) -> Self {
        // SDXL's attentions have several blocks; it and Stable Diffusion 3 have several encoders in one file.
        let of_later = |path: &str| {
            [".transformer_blocks.1.", ".conditioner.embedders.", ".text_encoders."]
                .iter()
                .any(|part| path.contains(part))
        };
        let first = |path: &str| {
            (path.starts_with("text_encoder.") || path.starts_with("unet.")) && !of_later(path)
        };
        let of_diffusers = |path: &str| {
            let rest = path.strip_prefix("transformer.").unwrap_or_default();
            rest.starts_with("transformer_blocks.")
                || rest.starts_with("single_transformer_blocks.")
        };
        let all = || paths.clone();
        Self {
            other_encoder: if all().all(first) { "lora_te1_" } else { "lora_te_" },
            other_transformer: if all().any(of_diffusers) {
                "lora_unet_"
            } else {
                "lora_transformer_"
            },
        }
    }

    pub fn flattened(&self, path: &str) -> Result<String, String> {
        let fits = |entry: &(&str, &str)| {
            let other = entry.0.starts_with(self.other_encoder)
                || *entry == (self.other_transformer, "transformer.");
            path.starts_with(entry.1) && !other
        };
        let (prefix, beginning) = PREFIXES.into_iter().find(fits).ok_or(NO_COMPONENT)?;
        Ok(flattened(prefix, &path[beginning.len()..]))
    }
}
