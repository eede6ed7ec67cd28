"""Times this crate beside Python loralib on torch, in turn on the same machine (A B A B ...), and
beside peft-rs.

    python3 benches/compare/compare.py [--rounds 3] [--threads N] [--features avx512]
                                         [--device cuda] [--bench PROGRAM]

Installs torch and loralib into a folder of its own (target/compare) where this Python lacks them,
builds the crate's bench (or takes PROGRAM, built elsewhere by `cargo bench --no-run --bench ratios`),
runs both alternately, and prints one table: the median of each over all rounds, and their ratio. A
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "target" / "compare"
PACKAGES = ["torch", "loralib", "numpy"]
KINDS = ["Linear", "Embedding", "Conv2d"]


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


def ours(args, env):
    """Group name -> milliseconds."""
    found = {}
    for kind in KINDS:
        command = [*bench(args), kind, "--json"]
        out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
        for line in out.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found.setdefault(row["group"], []).append(row["ours"])
    return {group: statistics.median(times) for group, times in found.items()}


def theirs(interpreter, args, env):
    command = [interpreter, __file__, "--measure", "--device", args.device]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def measure(device):
    """Runs in torch's interpreter: the same groups in Python loralib."""
    import time

    import loralib as lora
    import torch

    torch.set_num_threads(int(os.environ["RAYON_NUM_THREADS"]))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {}

    def timed(run):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def median(run):
        timed(run)
        runs = min(max(int(2.0 / timed(run)), 7), 301)
        return statistics.median(timed(run) * 1e3 for _ in range(runs))

    def layer(group, module, x, merged=False):
        module, x = module.to(device), x.to(device)
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

    cpu = [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)]
    for m, d, r in cpu if device == "cpu" else [(4096, 4096, 16), (8192, 2048, 16)]:
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--features", action="append", default=[], help="of this crate")
    parser.add_argument("--bench", help="the bench `ratios`, built elsewhere")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.device)
    interpreter = python()
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    a, b = [], []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        a.append(ours(args, env))
        b.append(theirs(interpreter, args, env))
    print(f"{args.rounds} rounds, {args.device}, {args.threads} threads; milliseconds")
    print(f"{'':<40}{'this crate':>12}{'loralib':>12}{'ratio':>8}")
    for group in b[0]:
        if group in a[0]:
            mine = statistics.median(r[group] for r in a)
            other = statistics.median(r[group] for r in b)
            print(f"{group:<40}{mine:>12.3f}{other:>12.3f}{mine / other:>8.3f}")
    if args.device == "cpu" and not args.bench and not args.features:
        print(flush=True)
        subprocess.run(["cargo", "run", "-q", "--release"], cwd=HERE / "peft-rs", env=env, check=True)


if __name__ == "__main__":
    main()
