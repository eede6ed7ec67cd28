"""Folders that PEFT saved, each option of `fixtures/checkpoints.py`, are loaded and saved by this crate, and loaded and
merged by PEFT again. Prints the largest difference from PEFT's own merged weights of each.

python tests/interop/resaved.py   (torch 2, peft, transformers, loralib, safetensors; cargo)
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))

import checkpoints
import enable_lora

MODELS = {
    "gpt2": checkpoints.tiny_gpt2,
    "dora_gpt2": checkpoints.tiny_gpt2,
    "tied_tokens": checkpoints.tiny_gpt2,
    "embed_tokens": checkpoints.tiny_llama,
    "enable_lora": enable_lora.Toy,
    "tied_table": lambda: checkpoints.tiny_llama(tied=True),
    "parameters": checkpoints.Moe,
    "square_parameters": lambda: checkpoints.Moe(4),
}


def resaved(source, folder):
    command = ["cargo", "run", "--quiet", "--example", "interop", "--", "resave", str(source), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    tensors = load_file(source / "model.safetensors")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model = MODELS.get(source.name, checkpoints.Toy)()
    if hasattr(model, "config") and model.config is None:  # PEFT 0.2 reads it, newer versions may do without.
        del type(model).config
    model.load_state_dict(part("base."), strict=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return max((merged[k] - v).abs().max().item() for k, v in part("merged.").items())


worst = 0.0
for source in sorted((FIXTURES / "peft").iterdir()):
    # PEFT does not merge groups, and adds the update of tied_head twice.
    if not source.name.startswith(("groups", "tied_head")):
        with tempfile.TemporaryDirectory() as folder:
            difference = resaved(source, folder)
        print(f"{source.name:20} {difference:.1e}")
        worst = max(worst, difference)
assert worst < 2e-6, worst
