"""Compares logits: adapters written by this crate and loaded by loralib and peft, and the reverse. Prints
the largest difference of each case, and checks the keys of our PEFT folders against those vLLM accepts.

python tests/interop/interop.py   (torch 2, loralib, peft, safetensors; cargo)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import loralib
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).parents[2]
worst = 0.0


class Toy(nn.Module):
    def __init__(self, embed, qkv, o, conv):
        super().__init__()
        self.embed, self.qkv, self.o, self.conv, self.head = embed, qkv, o, conv, nn.Linear(80, 3)

    def forward(self, ids):
        x = self.o(torch.tanh(self.qkv(self.embed(ids))))
        return self.head(self.conv(x.unsqueeze(1)).flatten(1))


def plain():
    return Toy(nn.Embedding(11, 6), nn.Linear(6, 18), nn.Linear(18, 6), nn.Conv2d(1, 4, 3))


def with_loralib():
    options = dict(r=2, lora_alpha=3)
    return Toy(
        loralib.Embedding(11, 6, **options),
        loralib.MergedLinear(6, 18, enable_lora=[True, False, True], **options),
        loralib.Linear(18, 6, **options),
        loralib.Conv2d(1, 4, 3, **options),
    )


def rust(mode, folder):
    command = ["cargo", "run", "--quiet", "--example", "interop", "--", mode, str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)


def compare(case, ours, theirs):
    global worst
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if "not small" not in case:
        worst = max(worst, difference)
    print(f"{case:58} {difference:.1e}")


def vllm(case, folder):
    """vLLM requires A/B pairs of one r and alpha: it ignores patterns and refuses other tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    keys = load_file(folder / "adapter_model.safetensors").keys()
    stray = [k for k in keys if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    halves = {k.rsplit(".lora_", 1)[0] for k in keys if k not in stray}
    pairs = all(f"{h}.lora_{x}.weight" in keys for h in halves for x in "AB")
    prefix = all(k.startswith("base_model.model.") for k in keys)
    patterns = bool(config["rank_pattern"] or config["alpha_pattern"])
    print(f"{case:58} pairs {pairs}, prefix {prefix}, patterns {patterns}, other keys {stray}")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    base, ids = plain().eval(), torch.randint(0, 11, (2, 7))
    save_file(base.state_dict() | {"ids": ids}, folder / "base.safetensors")
    weights = base.state_dict()

    rust("write", folder)
    for name in ["rust", "rust_rslora"]:
        ours = load_file(folder / f"{name}_logits.safetensors")["logits"]
        compare(f"{name}: effect of the adapter (not small)", ours, base(ids))
        model = plain()
        model.load_state_dict(weights)
        model = PeftModel.from_pretrained(model, folder / f"{name}_peft").eval()
        compare(f"{name}: peft loads our folder", ours, model(ids))
        compare(f"{name}: peft merges our folder", ours, model.merge_and_unload()(ids))
        model = plain()
        model.load_state_dict(weights)
        model = PeftModel.from_pretrained(model, folder / f"{name}_one").eval()
        compare(f"{name}: peft loads our folder of one rank", ours, model(ids))
        model = plain().eval()
        missing, unexpected = model.load_state_dict(load_file(folder / f"{name}_merged.safetensors"), strict=False)
        assert not missing and unexpected == ["ids"], (missing, unexpected)
        compare(f"{name}: torch runs our merged file", ours, model(ids))
    ours = load_file(folder / "rust_logits.safetensors")["logits"]
    model = with_loralib()
    rename = {k: k.replace("conv.", "conv.conv.") for k in weights}
    model.load_state_dict({rename[k]: v for k, v in weights.items()}, strict=False)
    missing, unexpected = model.load_state_dict(load_file(folder / "rust.safetensors"), strict=False)
    assert not unexpected and not any("lora_" in k for k in missing), (missing, unexpected)
    compare("rust: loralib loads our file, unmerged", ours, model(ids))
    compare("rust: loralib loads our file, merged", ours, model.eval()(ids))

    model.train()
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.copy_(0.5 * torch.randn_like(value))
    torch.save(loralib.lora_state_dict(model), folder / "python.pt")
    peft_logits = {}
    for name, rslora in [("python_peft", False), ("python_peft_rslora", True)]:
        toy = plain()
        toy.load_state_dict(weights)
        targets = ["embed", "qkv", "o", "conv"]
        adapted = get_peft_model(toy, LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets)).eval()
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.copy_(0.5 * torch.randn_like(value))
        adapted.save_pretrained(folder / name)
        peft_logits[name] = adapted(ids)
    rust("read", folder)
    load = lambda name: load_file(folder / f"{name}_logits.safetensors")["logits"]
    compare("we load what loralib saved with torch.save", load("python_pt"), model(ids))
    for name, theirs in peft_logits.items():
        compare(f"we load what peft saved: {name}", load(name), theirs)
    vllm("vLLM's rules: linear layers, one rank", folder / "rust_served")
    vllm("vLLM's rules: all layers, several ranks", folder / "rust_peft")
    print(f"the largest difference: {worst:.1e}")


main()
