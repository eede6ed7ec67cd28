"""What an adapter says that was trained on a GGUF file: `lora chat`, PEFT on torch and llama.cpp, greedily.

    pip install torch transformers peft gguf xllamacpp
    python greedy.py MODEL.gguf FOLDER ADAPTER CONVERSATIONS [COUNT]

FOLDER is the model dequantised (`benches/compare/llama.py dequantise MODEL.gguf FOLDER`), ADAPTER what
`lora train MODEL.gguf FILE --out ADAPTER` wrote, and CONVERSATIONS a file of lines with `messages`, or with `prompt` and
`completion`, of which the first COUNT (3) are asked. Prints PEFT's mean loss over the replies, which `lora train` prints as the validation loss
with `--valid CONVERSATIONS`, and the replies of all three.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import xllamacpp
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
LONGEST = 60


def ours(model, adapter, entry):
    """The last event is the adapter's reply."""
    said = ["--prompt", entry["messages"][-2]["content"]] if "messages" in entry else ["--raw", "--prompt", entry["prompt"]]
    command = ["cargo", "run", "-q", "--release", "-p", "loralib-cli", "--", "chat", model, "--adapter", adapter,
               *said, "--tokens", str(LONGEST), "--json"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["text"].strip()


def peft(folder, adapter):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval(), tokenizer


def prompt(tokenizer, entry):
    """What the reply follows, as a template or the file writes it."""
    if "messages" not in entry:
        return entry["prompt"]
    return tokenizer.apply_chat_template(entry["messages"][:-1], tokenize=False, add_generation_prompt=True)


def encode(tokenizer, text, entry):
    return tokenizer(text, add_special_tokens="messages" not in entry).input_ids


def say(model, tokenizer, entry):
    ids = torch.tensor([encode(tokenizer, prompt(tokenizer, entry), entry)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if "messages" in entry else tokenizer.eos_token_id
    out = model.generate(ids, max_new_tokens=LONGEST, do_sample=False, eos_token_id=end, pad_token_id=end)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def loss(model, tokenizer, entries):
    total, count = 0.0, 0
    for entry in entries:
        given = prompt(tokenizer, entry)
        if "messages" in entry:
            text, end = tokenizer.apply_chat_template(entry["messages"], tokenize=False), []
        else:
            text, end = given + entry["completion"], [tokenizer.eos_token_id]
        encoded = tokenizer(text, add_special_tokens=bool(end), return_offsets_mapping=True)
        ids = encoded.input_ids + end
        labels = [id if to > len(given) else -100 for id, (_, to) in zip(ids, encoded.offset_mapping)] + end
        mean = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        learned = sum(label >= 0 for label in labels[1:])
        total, count = total + mean * learned, count + learned
    return total / count


def llama_cpp(model, adapter):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = model, 512, 2
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = str(Path(adapter) / "adapter.gguf"), 1.0
    params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    options = {"max_tokens": LONGEST, "temperature": 0.0, "stop": ["<|im_end|>"]}
    return lambda text: server.handle_completions({"prompt": text} | options)["choices"][0]["text"].strip()


if __name__ == "__main__":
    torch.set_num_threads(2)
    gguf, folder, adapter, file, *count = sys.argv[1:]
    entries = [json.loads(line) for line in open(file, encoding="utf-8")]
    model, tokenizer = peft(folder, adapter)
    server = llama_cpp(gguf, adapter)
    with torch.no_grad():
        print(f"PEFT's loss {loss(model, tokenizer, entries):.4f}")
        for entry in entries[: int(count[0]) if count else 3]:
            print("\nsaid     ", prompt(tokenizer, entry))
            print("lora     ", ours(gguf, adapter, entry))
            print("PEFT     ", say(model, tokenizer, entry))
            print("llama.cpp", server(prompt(tokenizer, entry)))
