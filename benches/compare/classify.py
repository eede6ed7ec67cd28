"""Times the example `classify` beside transformers and PEFT on torch, in turn on the same machine.

    python benches/compare/classify.py --model FOLDER --train FILE --valid FILE [--rounds 3] [--threads N]
        [--method lora|full] [--features avx512]

Needs torch, transformers and peft. Both train one epoch of the same sentences in the same batches:
sorted by length, padded to the longest of the batch, F32, AdamW, without the encoder's own dropout,
rank 8 on query and value. Prints the median step of each round, and the accuracy behind it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "target" / "compare-classify"
BATCH = 32
RATES = {"lora": 4e-3, "full": 4e-4}


def ours(args, env):
    command = ["cargo", "run", "--release", "--quiet", "-p", "classify"]
    command += ["--features", args.features] if args.features else []
    command += ["--", "--model", args.model, "--train", args.train, "--valid", args.valid]
    command += ["--method", args.method, "--epochs", "1", "--out", str(OUT)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    [row] = json.loads((OUT / "report.json").read_text())
    return row["milliseconds_per_step"], 100 * row["right_merged"] / row["examples"]


def theirs(args, env):
    command = [sys.executable, __file__, "--measure", *sys.argv[1:]]
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def batches(path, labels, tokenizer):
    lines = [line.strip().split("\t", 1) for line in Path(path).read_text().splitlines()]
    labels += sorted({label for label, _ in lines} - set(labels))
    ids = tokenizer([sentence for _, sentence in lines], truncation=True, max_length=128)["input_ids"]
    examples = sorted(zip(ids, (labels.index(label) for label, _ in lines)), key=lambda e: len(e[0]))
    return [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]


def measure(args):
    import peft
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    labels, tokenizer = [], AutoTokenizer.from_pretrained(args.model)
    train, valid = (batches(path, labels, tokenizer) for path in (args.train, args.valid))
    random.Random(0).shuffle(train)
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, add_pooling_layer=False)
    encoder = AutoModel.from_pretrained(args.model, **none)
    if args.method == "lora":
        cfg = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        encoder = peft.get_peft_model(encoder, cfg)
    head = torch.nn.Linear(encoder.config.hidden_size, len(labels))
    trained = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[args.method])

    def tensors(batch):
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt")
        return padded, torch.tensor([y for _, y in batch])

    def logits(padded, targets):
        hidden = encoder(**padded).last_hidden_state
        real = padded["attention_mask"].unsqueeze(2).float()
        return head((hidden * real).sum(1) / real.sum(1)), targets

    train, valid = ([tensors(batch) for batch in batches] for batches in (train, valid))

    times, rise = [], max(len(train) / 20, 1)
    for i, batch in enumerate(train):
        start = time.perf_counter()
        rate = min((i + 1) / rise, (len(train) - i) / max(len(train) - rise, 1), 1)
        optimizer.param_groups[0]["lr"] = RATES[args.method] * rate
        torch.nn.functional.cross_entropy(*logits(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter() - start) * 1e3)
    encoder.eval()
    with torch.no_grad():
        right = [(x.argmax(1) == y).sum().item() for x, y in (logits(*batch) for batch in valid)]
    print(json.dumps([statistics.median(times), 100 * sum(right) / sum(len(y) for _, y in valid)]))


def main():
    parser = argparse.ArgumentParser()
    for path in ["--model", "--train", "--valid"]:
        parser.add_argument(path, required=True)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--features", default="")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="false")
    print(f"{'':<8}{'this crate':>12}{'accuracy':>10}{'torch':>12}{'accuracy':>10}{'ratio':>8}")
    for i in range(args.rounds):
        (mine, a), (other, b) = ours(args, env), theirs(args, env)
        print(f"round {i + 1:<2}{mine:>9.1f} ms{a:>8.2f} %{other:>9.1f} ms{b:>8.2f} %{mine / other:>8.2f}")


if __name__ == "__main__":
    main()
