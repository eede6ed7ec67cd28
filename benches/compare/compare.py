"""Times this crate beside Python loralib on torch, or for DoRA beside PEFT, in turn on the same machine
(A B A B ...), and beside peft-rs.

    python3 benches/compare/compare.py [FILTER] [--rounds 25] [--threads N] [--features avx512]
                                         [--device cuda] [--bench PROGRAM]

Installs torch, loralib and PEFT into a folder of its own (target/compare) where this Python lacks them, and
builds the crate's bench (or takes PROGRAM, built elsewhere by `cargo bench --no-run --bench ratios`).
Each layer waits in two processes, and in each round one after the other runs it for about a fifth of a
second: a machine whose speed varies is the same for both. Prints one table: the median of each over the
rounds, and of the rounds' ratios the median and the middle half. A training step is a forward and a
backward from a given gradient, with a gradient for the input, as inside a model. F32. FILTER is how the
names of the layers begin: `Conv`, or `"Linear 512x768"`. peft-rs, whose bench is a crate of its own,
comes last, unless there is a FILTER, PROGRAM or feature.
"""

import argparse
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "target" / "compare"
PACKAGES = ["torch", "loralib", "peft", "numpy"]


def layers(device):
    """What is compared, by the names of the bench's groups: the kind and its sizes."""
    linear = {
        "cpu": [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)],
        "cuda": [(4096, 4096, 16), (8192, 2048, 16)],
    }
    found = {}
    for kind in ["Linear", "MergedLinear", "DoRA"]:
        for m, d, r in linear[device]:
            found[f"{kind} {m}x{d} r {r}"] = kind, (m, d, r)
    found["Embedding 32000x512 r 8"] = "Embedding", ()
    for c, side in [(64, 56), (256, 14)]:
        found[f"Conv2d {c} channels {side}x{side}"] = "Conv2d", (c, side)
    return found


def python():
    """An interpreter with these packages: this one, or that of a folder of its own."""
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


class Runner:
    """A process that runs what it is told the name of, and answers with the milliseconds."""

    def __init__(self, command, env):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Closes its input, at which it ends.
        self.process.communicate()

    def time(self, name):
        try:
            self.process.stdin.write(name + "\n")
        except BrokenPipeError:
            pass  # It ended before, and so gives no answer.
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"no time of {name!r} by {self.process.args}")
        return float(answer)


def dora(d, r):
    """PEFT's layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(d, d, bias=False))
    config = LoraConfig(r=r, lora_alpha=2 * r, use_dora=True, target_modules=["0"])
    return get_peft_model(model, config).base_model.model[0]


def measure(group, device):
    """Runs in torch's interpreter: one layer of Python loralib or PEFT."""
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
        if kind == "DoRA":
            layer = dora(d, r)
        elif kind == "Linear":
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

    def burst(run):
        """As the bench has it."""
        runs = min(max(int(200 / time_of(run)), 1), 301)
        return statistics.median(time_of(run) for _ in range(runs))

    for line in sys.stdin:
        what = line.strip().removeprefix(f"{group} ")
        layer.train(what != "forward, merged")
        print(burst(step if what == "step" else forward), flush=True)


def compare(name, ours, theirs, rounds):
    # The first runs also start threads and build a GPU's kernels.
    for side in [ours, theirs]:
        side.time(name)
    found = [(ours.time(name), theirs.time(name)) for _ in range(rounds)]
    mine, other = (statistics.median(side) for side in zip(*found))
    low, ratio, high = statistics.quantiles((a / b for a, b in found), n=4)
    spread = f"{low:.3f} to {high:.3f}"
    print(f"{name:<42}{mine:>12.3f}{other:>12.3f}{ratio:>8.3f}{spread:>18}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("filter", nargs="?", default="")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--features", action="append", default=[], help="of this crate")
    parser.add_argument("--bench", help="the bench `ratios`, built elsewhere")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.device)
    if args.rounds < 2:
        parser.error("--rounds: at least 2")
    groups = [group for group in layers(args.device) if group.startswith(args.filter)]
    if not groups:
        parser.error(f"no layer's name begins with {args.filter!r}: {', '.join(layers(args.device))}")
    # The second as cargo has it from .cargo/config.toml, for a PROGRAM too.
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads), MIMALLOC_PURGE_DELAY="-1")
    loralib = [python(), __file__, "--device", args.device, "--measure"]
    print(f"{args.rounds} rounds, {args.device}, {args.threads} threads; milliseconds")
    print(f"{'':<42}{'this crate':>12}{'Python':>12}{'ratio':>8}{'middle half':>18}")
    for group in groups:
        ours, theirs = [*bench(args), f"{group} ", "--ask"], [*loralib, group]
        with Runner(ours, env) as ours, Runner(theirs, env) as theirs:
            merged = ["forward, merged"] if "Linear" in group else []
            for what in ["forward", "step", *merged]:
                compare(f"{group} {what}", ours, theirs, args.rounds)
    if args.device == "cpu" and not (args.bench or args.features or args.filter):
        print(flush=True)
        subprocess.run(["cargo", "run", "-q", "--release"], cwd=HERE / "peft-rs", env=env, check=True)


if __name__ == "__main__":
    main()
