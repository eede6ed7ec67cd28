"""Times this crate beside Python loralib on torch, in turn on the same machine (A B A B ...), and
beside peft-rs.

    python3 benches/compare/compare.py [--rounds 5] [--threads N] [--features avx512]
                                         [--device cuda] [--bench PROGRAM]

Installs torch and loralib into a folder of its own (target/compare) where this Python lacks them,
builds the crate's bench (or takes PROGRAM, built elsewhere by `cargo bench --no-run --bench ratios`),
and in each round times one layer after the other in both, each alone in a process of its own. Prints
one table: the median of each over the rounds, and the median of the rounds' ratios. A training step
is a forward and a backward from a given gradient, with a gradient for the input, as inside a model.
F32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "target" / "compare"
PACKAGES = ["torch", "loralib", "numpy"]


def layers(device):
    """What is compared, by the names of the bench's groups: the kind and its sizes."""
    linear = {
        "cpu": [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)],
        "cuda": [(4096, 4096, 16), (8192, 2048, 16)],
    }
    found = {}
    for kind in ["Linear", "MergedLinear"]:
        for m, d, r in linear[device]:
            found[f"{kind} {m}x{d} r {r}"] = kind, (m, d, r)
    found["Embedding 32000x512 r 8"] = "Embedding", ()
    for c, side in [(64, 56), (256, 14)]:
        found[f"Conv2d {c} channels {side}x{side}"] = "Conv2d", (c, side)
    return found


def python():
    """An interpreter with torch and loralib: this one, or that of a folder of its own."""
    test = f"import {', '.join(PACKAGES)}"
    if subprocess.run([sys.executable, "-c", test], capture_output=True).returncode == 0:
        return sys.executable
    interpreter = FOLDER / "bin" / "python"
    if not interpreter.exists():
        venv.create(FOLDER, with_pip=True)
    if subprocess.run([interpreter, "-c", test], capture_output=True).returncode != 0:
        subprocess.run([interpreter, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return interpreter


def bench(args):
    if args.bench:
        return [str(Path(args.bench).resolve())]
    features = ",".join([*args.features, *(["cuda"] if args.device == "cuda" else [])])
    return ["cargo", "bench", "--features", features, "--bench", "ratios", "--"]


def times(command, env):
    """Group name -> milliseconds."""
    out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    return {row["group"]: row["ms"] for row in rows}


def measure(group, device):
    """Runs in torch's interpreter: one layer of Python loralib."""
    import time

    import loralib as lora
    import torch

    torch.set_num_threads(int(os.environ["RAYON_NUM_THREADS"]))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    kind, sizes = layers(device)[group]
    if kind == "Embedding":
        layer, x = lora.Embedding(32000, 512, r=8, lora_alpha=16), torch.randint(32000, (2048,))
    elif kind == "Conv2d":
        c, side = sizes
        layer = lora.Conv2d(c, c, 3, r=8, lora_alpha=16, padding=1, bias=False)
        x = torch.randn(8, c, side, side)
    else:
        m, d, r = sizes
        options = dict(r=r, lora_alpha=2 * r, bias=False)
        x = torch.randn(m, d)
        if kind == "Linear":
            layer = lora.Linear(d, d, **options)
        else:
            layer = lora.MergedLinear(d, 3 * d, enable_lora=[True, False, True], **options)
    layer, x = layer.to(device), x.to(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = "lora_" in name
    x.requires_grad = x.is_floating_point()
    grad = torch.randn_like(layer(x))

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(grad)

    def forward():
        with torch.no_grad():
            layer(x)

    def time_of(run):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def report(what, run):
        """The median for about a second, as the bench has it."""
        time_of(run)
        runs = min(max(int(1000 / time_of(run)), 7), 301)
        ms = statistics.median(time_of(run) for _ in range(runs))
        print(json.dumps({"group": f"{group} {what}", "ms": ms}))

    report("forward", forward)
    report("step", step)
    if "Linear" in kind:
        layer.eval()
        report("forward, merged", forward)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--features", action="append", default=[], help="of this crate")
    parser.add_argument("--bench", help="the bench `ratios`, built elsewhere")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.device)
    # The second as cargo has it from .cargo/config.toml, for a PROGRAM too.
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads), MIMALLOC_PURGE_DELAY="-1")
    loralib = [python(), __file__, "--device", args.device, "--measure"]
    found = {}
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        for group in layers(args.device):
            ours = times([*bench(args), f"{group} ", "--json"], env)
            theirs = times([*loralib, group], env)
            for name in theirs:
                found.setdefault(name, []).append((ours[name], theirs[name]))
    print(f"{args.rounds} rounds, {args.device}, {args.threads} threads; milliseconds")
    print(f"{'':<42}{'this crate':>12}{'loralib':>12}{'ratio':>8}{'of the rounds':>20}")
    for name, rounds in found.items():
        mine, other = (statistics.median(side) for side in zip(*rounds))
        ratios = sorted(a / b for a, b in rounds)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        ratio = statistics.median(ratios)
        print(f"{name:<42}{mine:>12.3f}{other:>12.3f}{ratio:>8.3f}{spread:>20}")
    if args.device == "cpu" and not args.bench and not args.features:
        print(flush=True)
        subprocess.run(["cargo", "run", "-q", "--release"], cwd=HERE / "peft-rs", env=env, check=True)


if __name__ == "__main__":
    main()
