"""PEFT on torch beside `cargo bench --bench steps`: the same rows.

    pip install torch transformers peft
    python steps.py [models] [layers] [--small] [--device cuda]

Models have random weights in BF16, adapters of rank 16 in F32 on all linear layers, and attention by
scaled_dot_product_attention.
"""

import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = "--small" in sys.argv
DEVICE = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cpu"
LIMIT = 20
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
SHAPES = {
    "0.5B": (896, 4864, 14, 2, 64, 24, 151_936),
    "1.5B": (1536, 8960, 12, 2, 128, 28, 151_936),
    "7B": (4096, 11_008, 32, 32, 128, 32, 32_000),
}
if SMALL:
    SHAPES = {"small": (128, 256, 4, 2, 32, 2, 1000)}


def peak():
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def row(name, tokens, new):
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step, times, began = new(), [], time.time()
        while len(times) < 12 and (len(times) < 3 or time.time() - began < LIMIT):
            wait()
            start = time.time()
            step()
            wait()
            times.append((time.time() - start) * 1e3)
        ms = sorted(times[2:])[len(times[2:]) // 2]
        print(f"| {name} | {ms:.1f} | {tokens / ms * 1e3:.0f} | {peak():.0f} |", flush=True)
    except torch.OutOfMemoryError:
        print(f"| {name} | out of memory | | |", flush=True)


def model(shape, tokens, checkpointing):
    hidden, intermediate, heads, kv_heads, d, layers, vocabulary = shape
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=d, num_hidden_layers=layers,
                         vocab_size=vocabulary, max_position_embeddings=tokens, use_cache=False)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        net = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    net = get_peft_model(net, LORA).train()
    if checkpointing:
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    ids = (torch.arange(tokens, device=DEVICE) * 7919 % vocabulary).unsqueeze(0)

    def step():
        net(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def linear(n, tokens):
    net = torch.nn.Sequential(torch.nn.Linear(n, n, bias=False)).to(DEVICE, torch.bfloat16)
    net = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
    x = torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16)

    def step():
        net(x).backward(g)
        net.zero_grad(set_to_none=True)

    return step


def main():
    everything = not {"models", "layers"} & set(sys.argv)
    if everything or "models" in sys.argv:
        tokens = 64 if SMALL else 2048
        print("\n| a step of | tokens | by | ms | tokens a second | peak, MiB |\n|---|---|---|---|---|---|")
        for name, shape in SHAPES.items():
            for checkpointing in [False, True]:
                by = "PEFT, checkpointing" if checkpointing else "PEFT"
                row(f"{name} | 1 x {tokens} | {by}", tokens, lambda: model(shape, tokens, checkpointing))
    if everything or "layers" in sys.argv:
        print("\n| a step of a linear layer | tokens | by | ms | tokens a second | peak, MiB |\n|---|---|---|---|---|---|")
        for n in [64] if SMALL else [4096, 5120, 8192]:
            for tokens in [32] if SMALL else [2048, 8192]:
                row(f"{n} x {n} | {tokens} | PEFT", tokens, lambda: linear(n, tokens))


if __name__ == "__main__":
    main()
