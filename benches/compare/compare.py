"""Times this crate beside Python loralib on torch, in turn on the same machine (A B A B ...).

    python3 benches/compare/compare.py [--rounds 3] [--threads N]

Installs torch and loralib into a folder of its own (target/compare), builds the crate's bench, runs
both alternately, and prints one table: the median of each over all rounds, and their ratio. A
training step is a forward and a backward from a given gradient, with a gradient for the input, as
inside a model. F32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "target" / "compare"
KINDS = ["Linear", "Embedding", "Conv2d"]


def python():
    """The interpreter of a folder that holds torch and loralib."""
    interpreter = FOLDER / "bin" / "python"
    if not interpreter.exists():
        venv.create(FOLDER, with_pip=True)
    has = subprocess.run([interpreter, "-c", "import torch, loralib"], capture_output=True)
    if has.returncode != 0:
        subprocess.run([interpreter, "-m", "pip", "install", "-q", "torch", "loralib", "numpy"], check=True)
    return interpreter


def ours(env):
    """Group name -> milliseconds."""
    found = {}
    for kind in KINDS:
        command = ["cargo", "bench", "--bench", "ratios", "--", kind, "--json"]
        out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
        for line in out.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found.setdefault(row["group"], []).append(row["ours"])
    return {group: statistics.median(times) for group, times in found.items()}


def theirs(interpreter, env):
    out = subprocess.run(
        [interpreter, __file__, "--measure"], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout)


def measure():
    """Runs in the folder's interpreter: the same groups in Python loralib."""
    import time

    import loralib as lora
    import torch

    torch.set_num_threads(int(os.environ["RAYON_NUM_THREADS"]))
    found = {}

    def median(run):
        run()
        start = time.perf_counter()
        run()
        runs = min(max(int(2.0 / (time.perf_counter() - start)), 7), 301)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def layer(group, module, x, merged=False):
        for name, parameter in module.named_parameters():
            parameter.requires_grad = "lora_" in name
        if x.is_floating_point():
            x.requires_grad = True
        grad = torch.randn_like(module(x))

        def step():
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x).backward(grad)

        def forward():
            with torch.no_grad():
                module(x)

        found[f"{group} forward"] = median(forward)
        found[f"{group} step"] = median(step)
        if merged:
            module.eval()
            found[f"{group} forward, merged"] = median(forward)

    for m, d, r in [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)]:
        options = dict(r=r, lora_alpha=2 * r, bias=False)
        layer(f"Linear {m}x{d} r {r}", lora.Linear(d, d, **options), torch.randn(m, d), True)
        merged = lora.MergedLinear(d, 3 * d, enable_lora=[True, False, True], **options)
        layer(f"MergedLinear {m}x{d} r {r}", merged, torch.randn(m, d), True)
    table = lora.Embedding(32000, 512, r=8, lora_alpha=16)
    layer("Embedding 32000x512 r 8", table, torch.randint(32000, (2048,)))
    for c, side in [(64, 56), (256, 14)]:
        conv = lora.Conv2d(c, c, 3, r=8, lora_alpha=16, padding=1, bias=False)
        layer(f"Conv2d {c} channels {side}x{side}", conv, torch.randn(8, c, side, side))
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure()
    interpreter = python()
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    a, b = [], []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        a.append(ours(env))
        b.append(theirs(interpreter, env))
    print(f"{args.rounds} rounds, {args.threads} threads; milliseconds")
    print(f"{'':<40}{'loralib (Rust)':>16}{'loralib (torch)':>17}{'ratio':>8}")
    for group in b[0]:
        if group in a[0]:
            mine = statistics.median(r[group] for r in a)
            other = statistics.median(r[group] for r in b)
            print(f"{group:<40}{mine:>16.3f}{other:>17.3f}{mine / other:>8.3f}")


if __name__ == "__main__":
    main()
