"""A step and the peak of memory of PEFT on torch beside which README.md has those of the example `chat`.

    pip install torch transformers peft gguf
    python llama.py dequantise model.gguf FOLDER   # a GGUF file as an F32 folder
    python llama.py step FOLDER [STEPS]            # r 8 on all linear layers, 2 x 128 random tokens, 2 threads
"""

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantise(file, folder):
    file = Path(file)
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        options = {"dtype": torch.float32} if kind is AutoModelForCausalLM else {}
        kind.from_pretrained(file.parent, gguf_file=file.name, **options).save_pretrained(folder)


def step(folder, steps="11"):
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    model.config.use_cache = False
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
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


if __name__ == "__main__":
    {"dequantise": dequantise, "step": step}[sys.argv[1]](*sys.argv[2:])
