"""PEFT on torch beside `lora train`: a step and the peak of memory, or a whole run.

    pip install torch transformers peft gguf
    python llama.py dequantise model.gguf FOLDER   # a GGUF file as an F32 folder
    python llama.py step FOLDER [STEPS] [checkpointing]
    python llama.py train FOLDER TRAIN VALID ADAPTER [STEPS] [RATE]

`step` trains r 8 on all linear layers with 2 x 128 random tokens, in 2 threads. `train` repeats
`lora train FOLDER TRAIN --valid VALID --batch 2 --length 128 --no-packing --steps STEPS --lr RATE`: the same
conversations in the same order, the same rates and clipping, from the factors in ADAPTER. `lora train` with the same
options and `--steps 1 --lr 0 --out ADAPTER` writes those that it begins with.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantise(file, folder):
    file = Path(file)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are dense: without it transformers refuses to save them
    del model.config.quantization_config
    model.save_pretrained(folder)


def step(folder, steps="11", checkpointing=""):
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    model.config.use_cache = False
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    times = []
    for _ in range(int(steps)):
        ids = torch.randint(0, vocabulary, (2, 128))
        start = time.time()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"a step took {sorted(times)[len(times) // 2] * 1e3:.0f} ms (median), peak {peak:.0f} MiB")


class Rng:
    """SplitMix64, as in examples/common/rng.rs."""

    def __init__(self, seed):
        self.state, self.mask = seed, (1 << 64) - 1

    def below(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.mask
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.mask
        return (z ^ (z >> 31)) % n

    def shuffle(self, items):
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]


def examples(file, tokenizer, length):
    """Ids and labels of each conversation with one reply, which alone is learned."""
    found = []
    for line in open(file, encoding="utf-8"):
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        given = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"][: length + 1]
        ends = [end for _, end in encoded["offset_mapping"]]
        found.append((ids, [i if end > len(given) else -100 for i, end in zip(ids, ends)]))
    return found


def shuffled(examples, rng):
    """As `lora train --no-packing` orders them."""
    examples = list(examples)
    rng.shuffle(examples)
    return examples


def loss(model, group):
    """The mean over the labels, and their number."""
    width = max(len(ids) for ids, _ in group)
    pad = lambda items, value: torch.tensor([i + [value] * (width - len(i)) for i in items])
    ids, labels = pad([g[0] for g in group], 0), pad([g[1] for g in group], -100)
    return model(ids, labels=labels).loss, (labels[:, 1:] >= 0).sum().item()


def train(folder, data, valid, adapter, steps="300", rate="2e-4"):
    from peft import PeftModel

    torch.set_num_threads(2)
    steps, rate, warmup = int(steps), float(rate), int(steps) // 20
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    valid = examples(valid, tokenizer, 128)

    def measure(step):
        with torch.no_grad():
            losses = [loss(model, valid[i : i + 2]) for i in range(0, len(valid), 2)]
        mean = sum(mean.item() * n for mean, n in losses) / sum(n for _, n in losses)
        print(f"step {step}: validation loss {mean:.4f}, perplexity {math.exp(mean):.3f}", flush=True)

    rng, waiting = Rng(0), []
    data = examples(data, tokenizer, 128)
    measure(0)
    for step in range(steps):
        while len(waiting) < 2:
            waiting.extend(shuffled(data, rng))
        factor = step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        loss(model, [waiting.pop(0), waiting.pop(0)])[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            measure(step + 1)


if __name__ == "__main__":
    {"dequantise": dequantise, "step": step, "train": train}[sys.argv[1]](*sys.argv[2:])
