"""Writes expected_ids.json: small vocabularies as GGUF files hold them, and the ids of texts.

    pip install regex==2026.11.19 sentencepiece==0.2.3 tiktoken==0.14.0 tokenizers==0.23.3
    python expected_ids.py

The byte-level vocabulary is trained without splitting, so that its tokens cross every boundary: each
rule of a pre-tokenizer changes ids. Its ids come from tiktoken, with the models' published patterns;
SmolLM's from the steps of its own tokenizer.json. SentencePiece's ids come from sentencepiece.
"""

import io
import json
import unicodedata
from pathlib import Path

import regex
import sentencepiece
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = """It's 12 or 123, she'LL say.  Don't!
\tx == 1234;\r\n\r\nfoo/bar  baz//\n
caf\u00e9 cafe\u0301 HTMLParser 2024-01-01   end \u4f60\u597d \u00bd\n""" * 3
TEXTS = [
    "",
    " ",
    "   say",
    "end   ",
    "It's 1234567 or 12, she'LL say.  Don't!",
    "x  12 b   345",
    "\tx == 1234;\r\n\r\n  foo/bar//\n\n",
    "caf\u00e9 cafe\u0301 HTMLParser",
    "\u4f60\u597d \u00bd \U0001f600 \u00fe",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=354, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return alphabet, merges


def expected(alphabet, merges):
    spelled = {}  # the character of each byte
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled.update({chr(byte): byte for byte in printable})
    spelled.update({chr(256 + i): byte for i, byte in enumerate(others)})
    tokens = alphabet + ["".join(merge) for merge in merges]
    ranks = {bytes(spelled[c] for c in token): id for id, token in enumerate(tokens)}
    # tiktoken merges by rank, so the bytes go first; it looks up whole pieces before it merges
    encode = lambda pattern, text: tiktoken.Encoding(
        "x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    ).encode(text)

    smollm = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    smollm.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    def in_turn(text):
        pieces = [text]
        for pattern in DEFAULT:
            pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
        return [id for piece in pieces for id in encode(r"(?s).+", piece)]

    qwen2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    return {
        "gpt-2": [encode(GPT2, text) for text in TEXTS],
        "smollm": [smollm.encode(text).ids for text in TEXTS],
        "llama-bpe": [encode(LLAMA3, text) for text in TEXTS],
        "smaug-bpe": [encode(LLAMA3, text) for text in TEXTS],
        "qwen2": [encode(qwen2, unicodedata.normalize("NFC", text)) for text in TEXTS],
        "tekken": [encode(TEKKEN, text) for text in TEXTS],
        "default": [in_turn(text) for text in TEXTS],
    }


def sentencepiece_bpe(prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # ids 0 to 2 are <unk>, <s> and </s>, then come the bytes
    pieces = [(spm.id_to_piece(id), spm.get_score(id)) for id in range(259, spm.get_piece_size())]
    return {"prefix": prefix, "pieces": pieces, "ids": [spm.encode(text) for text in TEXTS]}


alphabet, merges = byte_level()
fixture = {
    "texts": TEXTS,
    "alphabet": "".join(alphabet),
    "merges": [" ".join(merge) for merge in merges],
    "byte_level": expected(alphabet, merges),
    "sentencepiece": [sentencepiece_bpe(True), sentencepiece_bpe(False)],
}
path = Path(__file__).with_name("expected_ids.json")
path.write_text(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
