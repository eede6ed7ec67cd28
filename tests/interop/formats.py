"""Compares merged weights: files that `lora convert` writes, loaded and merged by diffusers and PEFT, with those
of the adapters they were made from. Prints the largest difference of each case, relative to the largest value.

python tests/interop/formats.py   (the packages of tests/fixtures/formats.py and checkpoints.py; cargo)
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))
import checkpoints
import formats


def convert(source, to, out, *options):
    command = ["cargo", "run", "--quiet", "-p", "loralib-cli", "--", "convert"]
    command += ["--from", source, "--to", to, "--out", out, *options]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compare(case, ours, model):
    """The weights of a model against those that `model` has after the merge."""
    all = load_file(model)
    merged = {k.removeprefix("merged."): v for k, v in all.items() if k.startswith("merged.")}
    changed = [k for k in merged if not torch.equal(merged[k], all["base." + k])]
    worst = max(((ours[k] - merged[k]).abs().max() / merged[k].abs().max()).item() for k in changed)
    print(f"{case:58} {len(changed)} weights, {worst:.1e}")


def bases(folder):
    """A file of each component with the names of its weights and no values."""
    names = (FIXTURES / "formats/kohya/names.txt").read_text().split()
    options = []
    for component in ["unet", "text_encoder"]:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        own = {k.removeprefix(f"{component}."): empty for k in names if k.startswith(f"{component}.")}
        header = json.dumps(own).encode()
        path = folder / f"{component}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        options += ["--base", f"{component}={path}"]
    return options


@torch.no_grad()
def main():
    folder = Path(tempfile.mkdtemp())
    for case in ["kohya/attention", "kohya/conv", "diffusers/new", "diffusers/old"]:
        source, name = FIXTURES / "formats" / case, case.replace("/", "-")
        kohya = case.startswith("kohya")
        convert(source / "lora.safetensors" if kohya else source, "diffusers", folder / name, *(bases(folder) if kohya else []))
        ours = formats.merged_by_diffusers(folder / name / "pytorch_lora_weights.safetensors")
        compare(f"diffusers merges our file of {case}", ours, source / "model.safetensors")
        if case == "diffusers/new":  # diffusers ignores alphas of single layers in a kohya file's attention.
            continue
        convert(folder / name, "kohya", folder / f"{name}.safetensors")
        ours = formats.merged_by_diffusers(folder / f"{name}.safetensors")
        compare(f"diffusers merges our kohya file of {case}", ours, source / "model.safetensors")
    for case in ["linear", "rslora", "pattern", "embedding", "conv"]:
        source = FIXTURES / "peft" / case
        convert(source, "peft-plain", folder / case, "--rounded")
        base = {k.removeprefix("base."): v for k, v in load_file(source / "model.safetensors").items() if k.startswith("base.")}
        model = checkpoints.Toy()
        model.load_state_dict(base)
        ours = PeftModel.from_pretrained(model, folder / case).merge_and_unload().state_dict()
        compare(f"PEFT merges our plain folder of {case}", ours, source / "model.safetensors")


main()
