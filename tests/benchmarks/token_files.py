"""Make token files (uint16) of any folder of texts: small enough to carry, and nothing left to tokenize.

    python tests/benchmarks/token_files.py --texts FOLDER --out FOLDER --tokenizer MODEL --tokens 25000000 \\
        --held-out 20 --also TEXT [TEXT2 ...]

writes into `--out`: `train.bin`, `held_out.bin` (texts that the training file has nothing of), one `.bin` for each file
of `--also`, the tokenizer, and `about.json`. Texts are the `.md` and `.txt` files of the folder, at any depth. Those
held out are spread evenly over their sorted names; the others are read in an order of the seed until there are
`--tokens`.
`--vocabulary N` trains a byte-level BPE of N tokens on the training texts in place of `--tokenizer`. 25 million tokens
are 50 MB.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LARGEST = 2**16
END = "<|endoftext|>"


def texts_of(folder: Path) -> list[Path]:
    """All texts of a folder, sorted by name."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".md", ".txt"))
    if not found:
        raise SystemExit(f"{folder} holds no .md and no .txt file")
    return found


def split(texts: list[Path], held_out: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Texts to train on, in an order of the seed, and those held out, spread evenly."""
    if held_out >= len(texts):
        raise SystemExit(f"--held-out {held_out}, but the folder has {len(texts)} texts: ask for fewer")
    held = [texts[i * len(texts) // held_out] for i in range(held_out)]
    rest = [p for p in texts if p not in held]
    random.Random(seed).shuffle(rest)
    return rest, held


def read(path: Path, characters: int | None) -> str:
    """The text of a file, or its first characters; `<unk>` is read as `unk`."""
    return path.read_text(encoding="utf-8", errors="replace")[:characters].replace("<unk>", "unk")


def trained(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on texts."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END)


def tokens_of(texts: Iterable[str], encode: Callable[[str], list[int]], end: int, limit: int | None) -> np.ndarray:
    """Tokens of texts one after another, each ended by a token; no more than `limit`."""
    parts, count = [], 0
    for text in texts:
        parts.append(np.array([*encode(text), end], dtype=np.uint16))
        count += parts[-1].size
        if limit is not None and count >= limit:
            break
    return np.concatenate(parts)[:limit]


def load(path: Path) -> Tensor:
    """The tokens of a file, int64."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--texts", type=Path, required=True, help="folder of .md and .txt files")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", help="folder or name of a tokenizer")
    which.add_argument("--vocabulary", type=int, help="train a tokenizer of so many tokens")
    p.add_argument("--gguf-file", help="file name inside the tokenizer's folder, for GGUF weights")
    p.add_argument("--tokens", type=int, default=25_000_000, help="of the training file, at most (default 25 million)")
    p.add_argument("--held-out", type=int, default=20, help="texts to hold out (default 20)")
    p.add_argument("--held-out-tokens", type=int, help="at most so many tokens of them")
    p.add_argument("--characters", type=int, help="no more than the first so many characters of each text")
    p.add_argument("--also", nargs="*", type=Path, default=[], help="other texts to evaluate on")
    p.add_argument("--seed", type=int, default=0, help="of the order of the training texts")
    args = p.parse_args()

    training, held = split(texts_of(args.texts), args.held_out, args.seed)
    if args.vocabulary:
        tokenizer = trained((read(path, args.characters or 100_000) for path in training), args.vocabulary)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer, **({"gguf_file": args.gguf_file} if args.gguf_file else {})
        )
    if len(tokenizer) > LARGEST:
        raise SystemExit(f"the tokenizer has {len(tokenizer):,} tokens, and a uint16 tells {LARGEST:,} apart")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    args.out.mkdir(parents=True, exist_ok=True)
    sources = {"train": (training, args.tokens), "held_out": (held, args.held_out_tokens)}
    sources |= {path.stem: ([path], None) for path in args.also}
    about = {"vocabulary": len(tokenizer), "held_out": [path.stem for path in held]}
    for name, (paths, limit) in sources.items():
        characters = None if name not in ("train", "held_out") else args.characters
        values = tokens_of((read(path, characters) for path in paths), encode, tokenizer.eos_token_id, limit)
        values.tofile(args.out / f"{name}.bin")
        about[f"{name}_tokens"] = values.size
        print(f"{name}: {values.size:,} tokens", flush=True)
    tokenizer.save_pretrained(args.out)
    (args.out / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
