"""Generative perplexity: how likely a local GPT-2 finds texts that a model has written.

As SEDD, MDLM and BD3-LMs report it: the texts are tokenised anew by the judge's tokenizer, cut to its context, and
every token but the first of a piece is scored. Low perplexity alone proves little (a text that repeats itself is
likely), so the entropy of the tokens inside a text, averaged over texts, stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acdit.codecs import Tokenizer
from acdit.errors import DataError
from acdit.evaluation.gpt2 import GPT2


@dataclass(frozen=True)
class GeneratedText:
    """What a judge says of texts."""

    nats_per_token: float
    entropy: float
    """Nats: of the frequencies of tokens inside a text, averaged over texts."""
    tokens: int
    """Scored ones."""
    texts: int

    @property
    def perplexity(self) -> float:
        """exp of the nats."""
        return math.exp(min(700.0, self.nats_per_token))


@torch.no_grad()
def judge_texts(judge: GPT2, tokenizer: Tokenizer, texts: Iterable[str]) -> GeneratedText:
    """Score texts, one after the other.

    Args:
        judge: the language model.
        tokenizer: the judge's own.
        texts: longer ones than its context are scored in pieces that know nothing of each other.

    Raises:
        DataError: no text, or none of two tokens; a tokenizer that is not the judge's.
    """
    context, device = judge.config.n_positions, judge.wte.weight.device
    if tokenizer.vocab_size > judge.config.vocab_size:
        raise DataError(
            "--language-model", found=f"a tokenizer of {tokenizer.vocab_size} tokens", expected="the model's own, of "
            f"at most {judge.config.vocab_size}",
        )  # fmt: skip
    nats, tokens, entropies, count = 0.0, 0, 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64, device=device)
        if not len(ids):
            raise DataError(f"text {count}", found="nothing", expected="at least a token")
        count += 1
        frequencies = torch.unique(ids, return_counts=True)[1].double() / len(ids)
        entropies += float(torch.special.entr(frequencies).sum())
        for piece in ids.split(context):
            logits = judge(piece[None])[0, :-1].double()
            nats -= float(logits.log_softmax(-1).gather(-1, piece[1:, None]).sum())
            tokens += len(piece) - 1
    if not tokens:
        raise DataError("texts", found=f"{count} texts, none of two tokens", expected="text to judge")
    return GeneratedText(nats / tokens, entropies / count, tokens, count)


def read_texts(sources: Sequence[str | Path]) -> list[str]:
    """Texts from files, and of folders all their .txt files in order.

    Raises:
        DataError: no such file, none in a folder, bytes that are no text.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        found = sorted(source.glob("*.txt")) if source.is_dir() else [source]
        if not found or not all(file.is_file() for file in found):
            raise DataError(
                f"SAMPLES {source}", found="no .txt file in it" if source.is_dir() else "no such file",
                expected="texts, as acdit sample MODEL --output leaves them",
            )  # fmt: skip
        files += found
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"
            raise DataError(str(file), found=str(reason), expected="a text in UTF-8") from None
    return texts
