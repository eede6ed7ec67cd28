"""TRL's DPO beside that of `lora train`: the same pairs in the same order, rates and initial factors.

    pip install torch transformers peft trl
    lora train MODEL PAIRS --valid VALID --loss dpo --lr 0 --steps 1 --out START
    lora train MODEL PAIRS --valid VALID --loss dpo --lr 5e-5 --steps 50 --validate-every 10 --out RUN --json > run.json
    python preference.py MODEL PAIRS VALID START run.json [--loss dpo] [--lr 5e-5] [--beta 0.1] [--batch 4]

Printed are the validation losses, accuracies and rewards of both, how far apart they are, the time of a step and TRL's
peak of memory. `lora train` prints its own.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

args = argparse.ArgumentParser()
for name in ("model", "pairs", "valid", "start", "run"):
    args.add_argument(name)
args.add_argument("--loss", default="dpo")
args.add_argument("--lr", type=float, default=5e-5)
args.add_argument("--beta", type=float, default=0.1)
args.add_argument("--batch", type=int, default=4)
args.add_argument("--length", type=int, default=256)
args.add_argument("--seed", type=int, default=0)
args = args.parse_args()
ours = [json.loads(line) for line in open(args.run) if line.startswith("{")]
ours = [event for event in ours if event["event"] == "validation"]
steps, every = ours[-1]["step"], ours[1]["step"]


class SplitMix64:
    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        mask = 2**64 - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) % n


def read(path):
    return [json.loads(line) for line in open(path)]


pairs, rng, order = read(args.pairs), SplitMix64(args.seed), []
while len(order) < steps * args.batch:
    some = list(pairs)
    for i in range(len(some) - 1, 0, -1):
        j = rng.below(i + 1)
        some[i], some[j] = some[j], some[i]
    order += some


class InOrder(DPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


class Times(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps.append(time.perf_counter() - self.begin)


model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
config = PeftConfig.from_pretrained(args.start)
config.inference_mode = False
options = DPOConfig(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
    eval_strategy="steps", eval_steps=every, eval_on_start=True, max_steps=steps, seed=args.seed,
    per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, max_length=args.length,
    learning_rate=args.lr, lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.01, max_grad_norm=1.0,
    beta=args.beta, loss_type=[{"dpo": "sigmoid"}.get(args.loss, args.loss)], gradient_checkpointing=False,
)  # fmt: skip
times = Times()
trainer = InOrder(
    model, args=options, train_dataset=Dataset.from_list(order[: steps * args.batch]),
    eval_dataset=Dataset.from_list(read(args.valid)), processing_class=tokenizer, peft_config=config, callbacks=[times],
)  # fmt: skip
set_peft_model_state_dict(trainer.model, load_file(args.start + "/adapter_model.safetensors"))
trainer.train()
theirs = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
names = {
    "loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins",
    "chosen reward": "eval_rewards/chosen", "rejected reward": "eval_rewards/rejected",
}  # fmt: skip
apart = dict.fromkeys(names, 0.0)
for event in ours:
    found = {name: theirs[event["step"]][key] for name, key in names.items()}
    print(f"step {event['step']}:", ", ".join(f"{name} {event[name]:.6f} TRL {found[name]:.6f}" for name in names))
    apart = {name: max(apart[name], abs(event[name] - found[name])) for name in names}
print("at most apart:", ", ".join(f"{name} {by:.1e}" for name, by in apart.items()))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"TRL: a step {statistics.median(times.steps) * 1e3:.0f} ms (median), peak {peak:.0f} MiB")
