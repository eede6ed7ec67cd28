"""Small random models of transformers with their logits, for cli/src/model/tests.rs and cli/src/encoder/tests.rs.

    pip install torch transformers safetensors
    python models.py

Each folder has config.json and model.safetensors as transformers writes them, and logits.safetensors: ids of a text, and
the logits for it and for its first tokens.
"""

import json
import pathlib

import torch
import transformers as t
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def longrope(n):
    short, long = [1.0 + 0.1 * i for i in range(n)], [1.5 + i for i in range(n)]
    return dict(rope_type="longrope", rope_theta=10_000.0, short_factor=short, long_factor=long,
                original_max_position_embeddings=16)


PHI = dict(SIZES, original_max_position_embeddings=16, pad_token_id=0)
GEMMA = dict(SIZES, head_dim=16)
MODELS = {
    "llama": (t.LlamaConfig(**SIZES, rope_parameters=LLAMA3), t.LlamaForCausalLM),
    "mistral": (t.MistralConfig(**SIZES, head_dim=8, sliding_window=9), t.MistralForCausalLM),
    "qwen2": (t.Qwen2Config(**SIZES), t.Qwen2ForCausalLM),
    "qwen2_window": (t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
                     t.Qwen2ForCausalLM),
    "qwen3": (t.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True), t.Qwen3ForCausalLM),
    "gemma": (t.GemmaConfig(**GEMMA), t.GemmaForCausalLM),
    "gemma2": (t.Gemma2Config(**GEMMA, sliding_window=9, query_pre_attn_scalar=20, final_logit_softcapping=3.0,
                              attn_logit_softcapping=5.0), t.Gemma2ForCausalLM),
    "gemma3": (t.Gemma3TextConfig(**dict(GEMMA, num_hidden_layers=7), sliding_window=9, query_pre_attn_scalar=20),
               t.Gemma3ForCausalLM),
    "phi3": (t.Phi3Config(**PHI, rope_parameters=longrope(4), sliding_window=30), t.Phi3ForCausalLM),
    "phi4_mini": (t.Phi3Config(**PHI, rope_parameters=dict(longrope(3), partial_rotary_factor=0.75),
                               tie_word_embeddings=True), t.Phi3ForCausalLM),
}

for name, (config, kind) in MODELS.items():
    torch.manual_seed(7)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            is_gain = "norm" in key and "gemma" not in name
            value.copy_(torch.randn_like(value) * (0.1 if "norm" in key else 0.3) + is_gain)
    model.save_pretrained(HERE / name)
    ids = torch.arange(40) * 37 % 59
    with torch.no_grad():
        logits = {f"logits.{n}": model(ids[None, :n]).logits[0].contiguous() for n in (10, 40)}
    save_file({"ids": ids, **logits}, HERE / name / "logits.safetensors")
    (HERE / name / "generation_config.json").unlink(missing_ok=True)

# Encoders with a head for three labels: texts of different lengths, the scores, and the means of the hidden states.
SMALL = dict(vocab_size=60, max_position_embeddings=64, pad_token_id=1, num_labels=3)
BERT = dict(SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ENCODERS = {
    "bert": (t.BertConfig(**BERT), t.BertForSequenceClassification),
    "roberta": (t.RobertaConfig(**BERT, type_vocab_size=1), t.RobertaForSequenceClassification),
    "distilbert": (t.DistilBertConfig(**SMALL, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
                   t.DistilBertForSequenceClassification),
}
for name, (config, kind) in ENCODERS.items():
    torch.manual_seed(7)
    model = kind(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + ("orm.weight" in key))
    model.save_pretrained(HERE / name)
    expected = {}
    for n in (5, 9):
        ids = 2 + torch.arange(n) * (30 + n) % 57
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True)
        expected |= {f"ids.{n}": ids, f"scores.{n}": out.logits[0], f"mean.{n}": out.hidden_states[-1][0].mean(0)}
    save_file(expected, HERE / name / "expected.safetensors")


# The same models by the options' names in older files.
def older(name, new, change):
    config = json.loads((HERE / name / "config.json").read_text())
    change(config)
    (HERE / name / f"config.{new}.json").write_text(json.dumps(config, indent=2) + "\n")


def theta_beside(config):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None


def gemma3(config):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config["sliding_window_pattern"] = 6
    config.pop("layer_types")


def phi3(config):
    config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"]
    theta_beside(config)
    config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")
    config["rope_scaling"].pop("partial_rotary_factor", None)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")


older("llama", "older", theta_beside)
older("gemma3", "older", gemma3)
older("phi4_mini", "older", phi3)
