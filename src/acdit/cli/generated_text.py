"""acdit evaluate, of texts that a model has written: their perplexity under a local GPT-2."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from acdit.cli.evaluate_text import OTHERS
from acdit.cli.parser import refuse_given


def evaluate_generated(options: argparse.Namespace) -> None:
    """Generative perplexity and the texts' entropy, into the result file."""
    from acdit import provenance, storage
    from acdit.codecs import load_tokenizer
    from acdit.errors import ConfigError
    from acdit.evaluation.generated_text import judge_texts, read_texts
    from acdit.evaluation.gpt2 import load_gpt2

    started = time.perf_counter()
    others = (*OTHERS, "reference", "estimator", "draws")
    refuse_given(options, others, found="--language-model", expected="texts and a GPT-2 to judge them by")
    if not options.samples:
        raise ConfigError(
            "SAMPLES", found="nothing", expected="texts: .txt files, or folders of them",
            fix="acdit sample MODEL --num-samples 64 --output texts/",
        )  # fmt: skip
    texts = read_texts(options.samples)[: options.num_samples]
    judge = load_gpt2(options.language_model)
    tokenizer = load_tokenizer(options.language_model)
    found = judge_texts(judge, tokenizer, texts)
    figures = {
        "generative_perplexity": found.perplexity,
        "nats_per_token": found.nats_per_token,
        "entropy": found.entropy,
        "tokens": found.tokens,
        "texts": found.texts,
        "language_model": options.language_model,
        "language_model_parameters": sum(parameter.numel() for parameter in judge.parameters()),
        "protocol": f"tokenised anew by the judge, pieces of {judge.config.n_positions} tokens, the first of each not "
        "scored; entropy in nats of the tokens' frequencies inside a text, averaged over texts",
        "samples": list(map(str, options.samples)),
        **provenance.facts(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    output = Path(options.output)
    storage.write_json_atomic(output, figures)
    print(
        f"generative perplexity {found.perplexity:.4g} under {options.language_model}, entropy {found.entropy:.3f} "
        f"nats ({found.tokens:,} tokens of {found.texts:,} texts); see {output}"
    )
