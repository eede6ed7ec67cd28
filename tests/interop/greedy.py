"""What an adapter says that was trained on a GGUF file: `lora chat`, PEFT on torch and llama.cpp, greedily.

    pip install torch transformers peft gguf xllamacpp
    python greedy.py MODEL.gguf FOLDER ADAPTER CONVERSATIONS [COUNT]

FOLDER is the model dequantised (`benches/compare/llama.py dequantise MODEL.gguf FOLDER`), ADAPTER what
`lora train MODEL.gguf FILE --out ADAPTER` wrote, and CONVERSATIONS a file of lines with `messages`, of which
the first COUNT (3) are asked. Prints PEFT's mean loss over the replies, which `lora train` prints as the validation loss
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


def ours(model, adapter, said):
    """The last event is the adapter's reply."""
    command = ["cargo", "run", "-q", "--release", "-p", "loralib-cli", "--", "chat", model, "--adapter", adapter,
               "--prompt", said, "--tokens", str(LONGEST), "--json"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["text"].strip()


def peft(folder, adapter):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval(), tokenizer


def prompt(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def say(model, tokenizer, messages):
    ids = tokenizer(prompt(tokenizer, messages), return_tensors="pt", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(ids, max_new_tokens=LONGEST, do_sample=False, eos_token_id=end, pad_token_id=end)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def loss(model, tokenizer, conversations):
    total, count = 0.0, 0
    for messages in conversations:
        given = tokenizer(prompt(tokenizer, messages[:-1]), add_special_tokens=False).input_ids
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        labels = [-100] * len(given) + ids[len(given):]
        mean = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + mean * (len(ids) - len(given)), count + len(ids) - len(given)
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
    conversations = [json.loads(line)["messages"] for line in open(file, encoding="utf-8")]
    model, tokenizer = peft(folder, adapter)
    server = llama_cpp(gguf, adapter)
    with torch.no_grad():
        print(f"PEFT's loss {loss(model, tokenizer, conversations):.4f}")
        for messages in conversations[: int(count[0]) if count else 3]:
            messages = messages[:-1]
            print("\nsaid     ", messages[-1]["content"])
            print("lora     ", ours(gguf, adapter, messages[-1]["content"]))
            print("PEFT     ", say(model, tokenizer, messages))
            print("llama.cpp", server(prompt(tokenizer, messages)))
