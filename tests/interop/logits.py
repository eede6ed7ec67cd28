"""transformers' logits of a GGUF file or a folder, for `lora`'s decoder.

    pip install torch transformers gguf safetensors
    python tests/interop/logits.py MODEL TEXT logits.safetensors 64 600
    LORA_MODEL=MODEL LORA_LOGITS=logits.safetensors cargo test --release -p loralib-cli -- --ignored
"""

import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

source, text, out, *lengths = sys.argv[1:]
folder, file = os.path.split(source)
where = (folder, {"gguf_file": file}) if source.endswith(".gguf") else (source, {})
model = AutoModelForCausalLM.from_pretrained(where[0], **where[1], dtype=torch.float32, attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0, : max(map(int, lengths))]
tensors = {"ids": ids}
for n in map(int, lengths):
    with torch.no_grad():
        # The last tokens alone: a large vocabulary makes a large file.
        tensors[f"logits.{n}"] = model(ids[None, :n]).logits[0, -20:].contiguous()
save_file(tensors, out)
print(f"{ids.numel()} tokens, logits after {lengths}")
