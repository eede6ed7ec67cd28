"""What transformers, PEFT and sentence-transformers measure of an encoder's adapter that `lora train` made.

    pip install torch transformers peft sentence-transformers
    lora train MODEL TRAIN --valid VALID --out ADAPTER
    python encoders.py MODEL ADAPTER VALID [--batch N]

VALID is JSON Lines with "text" and "label", or "anchor" and "positive". Printed are the lines of `lora train` for step 0
(embeddings alone: a new head is random) and for the adapter, in the same batches.
"""

import argparse
import json
import pathlib

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

args = argparse.ArgumentParser()
args.add_argument("model")
args.add_argument("adapter")
args.add_argument("valid")
args.add_argument("--batch", type=int, default=4)
args.add_argument("--length", type=int, default=256)
args = args.parse_args()
entries = [json.loads(line) for line in open(args.valid)]


def batches_without_twins(entries, keys, read):
    """As the program's: no sentence twice in a batch, by what the model reads of it."""
    batches, after = [], {}
    for entry in entries:
        texts = [read(entry[key]) for key in keys]
        at = max(after.get(text, 0) for text in texts)
        while at < len(batches) and len(batches[at]) == args.batch:
            at += 1
        if at == len(batches):
            batches.append([])
        batches[at].append(entry)
        after |= {text: at + 1 for text in texts}
    return batches


def classification(labels):
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels), dtype=torch.float32,
                                                               ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loss, right = 0.0, 0
    for i in range(0, len(entries), args.batch):
        some = entries[i:i + args.batch]
        inputs = tokenizer([entry["text"] for entry in some], return_tensors="pt", padding=True, truncation=True,
                           max_length=args.length)
        answers = torch.tensor([labels.index(str(entry["label"])) for entry in some])
        with torch.no_grad():
            logits = model(**inputs).logits
        loss += torch.nn.functional.cross_entropy(logits, answers, reduction="sum").item()
        right += (logits.argmax(-1) == answers).sum().item()
    print(f"with the adapter: validation loss {loss / len(entries):.4f}, accuracy {right / len(entries):.3f}")


def embeddings():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(args.model, device="cpu").eval()
    model.max_seq_length = args.length

    def measured(what):
        loss, counted = MultipleNegativesRankingLoss(model), 0
        total = 0.0
        read = lambda text: tuple(model.tokenizer(text, truncation=True, max_length=args.length).input_ids)
        for some in batches_without_twins(entries, ["anchor", "positive"], read):
            if len(some) < 2:
                continue
            features = [model.tokenize([entry[key] for entry in some]) for key in ("anchor", "positive")]
            with torch.no_grad():
                total += loss(features, None).item() * len(some)
            counted += len(some)
        print(f"{what}: validation loss {total / counted:.4f}")

    measured("without the adapter")
    model.load_adapter(args.adapter)
    measured("with the adapter")


path = pathlib.Path(args.adapter, "labels.json")
if path.exists():
    names = json.loads(path.read_text())["id2label"]
    classification([names[str(i)] for i in range(len(names))])
else:
    embeddings()
