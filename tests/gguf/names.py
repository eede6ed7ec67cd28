"""Writes expected_names.json: for each architecture, the names of transformers' tensors and gguf-py's.

pip install torch transformers gguf
"""

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 2
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}


def names(architecture, model_type):
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=LAYERS,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=32,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(key, LAYERS)
    pairs = {}
    for name in model.state_dict():
        own = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            # Gemma's files have no head of their own.
            assert (architecture, name) in [("gemma", "lm_head.weight"), ("gemma2", "lm_head.weight")]
            continue
        pairs[name] = own
    return dict(sorted(pairs.items()))


if __name__ == "__main__":
    expected = {a: names(a, m) for a, m in MODEL_TYPES.items()}
    text = json.dumps(expected, indent=1) + "\n"
    Path(__file__).with_name("expected_names.json").write_text(text)
