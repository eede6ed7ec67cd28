"""What PEFT on torch keeps for the backward of a decoder layer of Llama, beside `cargo bench --bench kept`.

    pip install torch transformers peft
    python kept.py [SHAPE..] [TOKENS..]     # such as 7B 2048; by default 0.5B and 1.5B with 512 and 2048

Two layers in BF16 with adapters of rank 16 on all linear layers, and attention by scaled_dot_product_attention. Counted are
the tensors that autograd saves (`torch.autograd.graph.saved_tensors_hooks`), each storage once, without parameters and
buffers.
"""

import sys
from collections import Counter

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

SHAPES = {
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, head_dim=64),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, head_dim=128),
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, head_dim=128),
}
OPERATIONS = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "q_proj": "q_proj, k_proj, v_proj",
    "k_proj": "q_proj, k_proj, v_proj",
    "v_proj": "q_proj, k_proj, v_proj",
    "gate_proj": "gate_proj, up_proj",
    "up_proj": "gate_proj, up_proj",
    "mlp": "silu, product",
    "self_attn": "rope, attention",
}


def measure(name, tokens):
    config = LlamaConfig(**SHAPES[name], num_hidden_layers=2, vocab_size=64, max_position_embeddings=tokens)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    model = LlamaModel(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    kept, seen, where = Counter(), set(), ["other"]
    fixed = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    for path, module in model.named_modules():
        operation = next((part for part in reversed(path.split(".")) if part in OPERATIONS or part.endswith("_proj")), None)
        if operation is None or ".layers." not in path:
            continue
        operation = OPERATIONS.get(operation, operation)
        module.register_forward_pre_hook(lambda *_, operation=operation: where.append(operation))
        module.register_forward_hook(lambda *_: where.pop() and None)

    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[where[-1]] += storage.nbytes()
        alive.append(tensor)  # so that no other one takes its place
        return tensor

    x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=x, use_cache=False)
    return {operation: bytes / 2 for operation, bytes in kept.items() if operation != "other"}


def main():
    names = [arg for arg in sys.argv[1:] if arg in SHAPES] or ["0.5B", "1.5B"]
    lengths = [int(arg) for arg in sys.argv[1:] if arg.isdigit()] or [512, 2048]
    mib = 2**20
    for name in names:
        for tokens in lengths:
            kept = measure(name, tokens)
            print(f"\n{name}, {tokens} tokens, a layer: {sum(kept.values()) / mib:.1f} MiB\n")
            for operation, size in kept.items():
                print(f"| {operation} | {size / mib:.2f} |")


if __name__ == "__main__":
    main()
