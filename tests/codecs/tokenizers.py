"""A small byte-level BPE for tests, as GPT-2's is made, and an independent reading of its files."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import regex

from acdit.data.documents import BuiltInText

PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def write_gpt2_files(folder: Path, names: tuple[str, str] = ("encoder.json", "vocab.bpe"), size: int = 400) -> Path:
    """Vocabulary and merges of a byte-level BPE trained on the built-in text; EOS has the last id, as in GPT-2."""
    import tokenizers

    library: Any = tokenizers
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([BuiltInText().text[:30_000], "naïve café — ‘日本語’ 👍🏽 " * 20], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = (Path(file) for file in made.model.save(str(folder)))
    entries = json.loads(vocabulary.read_text(encoding="utf-8"))
    entries["<|endoftext|>"] = len(entries)
    vocabulary.write_text(json.dumps(entries), encoding="utf-8")
    vocabulary.rename(folder / names[0])
    merges.rename(folder / names[1])
    return folder


class PlainBPE:
    """The definition of byte-pair encoding, slowly: of all neighbours the pair that was merged first is joined."""

    def __init__(self, vocabulary: Path, merges: Path) -> None:
        self.ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        self.letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}
        self.word = functools.cache(self._word)

    def encode(self, text: str) -> list[int]:
        return [index for word in PATTERN.findall(text) for index in self.word(word)]

    def _word(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            joined, at = [], 0
            while at < len(parts):
                if tuple(parts[at : at + 2]) == best:
                    joined.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    joined.append(parts[at])
                    at += 1
            parts = joined
        return [self.ids[part] for part in parts]
