"""The text pipeline: saved with its tokenizer, prompts, ends, streams; and the commands around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acdit import ACDiTTextPipeline
from acdit.cli import main
from acdit.codecs import CharacterTokenizer, Tokenizer, load_tokenizer
from acdit.errors import ConfigError
from acdit.evaluation.perplexity import count_characters, text_bound
from tests.codecs.tokenizers import write_gpt2_files
from tests.texts import text_model

RUN = """
name: t
model: {grid: [12], block: [3], num_layers: 1, num_attention_heads: 1, attention_head_dim: 16}
data: {kind: text, root: ROOT, cache: CACHE, document: line, held_out: 1, sequence_length: 12}
corruption: {kind: masking}
optim: {batch_size: 2, lr: 1e-3}
ema: {decays: [0.9]}
train: {steps: 1}
"""


def characters(**options: object) -> ACDiTTextPipeline:
    """Of the letters a … d and EOS; 12 tokens in blocks of 3."""
    torch.manual_seed(0)
    return ACDiTTextPipeline(text_model(12, 3, vocab=5).float(), CharacterTokenizer("abcd"), **options)


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_gpt2_files(tmp_path_factory.mktemp("gpt2"))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the run's recipe beside it."""
    path = tmp_path_factory.mktemp("run")
    (path / "text.txt").write_text("abcd" * 20 + "\n" + "dcab" * 9 + "\n")
    recipe = RUN.replace("ROOT", str(path / "text.txt")).replace("CACHE", str(path / "cache"))
    (path / "recipe.yaml").write_text(recipe)
    characters().save_pretrained(path / "model")
    return path / "model"


def test_a_saved_pipeline_comes_back_with_its_tokenizer(model: Path) -> None:
    again, first = ACDiTTextPipeline.from_pretrained(model), characters()
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again("ab", generator=3).texts == first("ab", generator=3).texts
    assert again.config.begins_with_bos is False
    bare = ACDiTTextPipeline(first.transformer)
    assert bare([[0, 1]], generator=3).texts is None
    assert bare([[0, 1]], generator=3, eos_token=4).tokens == first("ab", generator=3).tokens
    for wrong in (lambda: bare("ab"), lambda: next(bare.stream()), lambda: first("ab", sampler="best")):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="3 tokens"):
        ACDiTTextPipeline(first.transformer, CharacterTokenizer("ab"))


def test_a_name_on_the_hub_brings_its_tokenizer_too(tmp_path: Path) -> None:
    """From the hub's cache, laid out as the library does; no network."""
    first, commit = characters(), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    first.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    again = ACDiTTextPipeline.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again("ab", generator=3).texts == first("ab", generator=3).texts


def test_bos_goes_before_texts_and_nothing_but_not_before_ids(tmp_path: Path) -> None:
    pipeline = characters(begins_with_bos=True)
    pipeline.save_pretrained(tmp_path)
    pipeline = ACDiTTextPipeline.from_pretrained(tmp_path)
    for prompts, begin in (("ab", [4, 0, 1]), (None, [4]), ([[0, 1]], [0, 1])):
        rows = pipeline(prompts, batch_size=2, generator=0, eos_token=-1).tokens
        assert [row[: len(begin)] for row in rows] == [begin, begin]
    assert pipeline("ab", generator=0).texts[0].startswith("ab")
    with pytest.raises(ConfigError, match="BOS"):
        ACDiTTextPipeline(pipeline.transformer, begins_with_bos=True)()


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_what_is_streamed_is_the_text(kind: str, byte_pairs: Tokenizer) -> None:
    """Of a byte-level tokenizer too, whose characters are spread over tokens."""
    tokenizer: Tokenizer = CharacterTokenizer("abcd") if kind == "characters" else byte_pairs
    torch.manual_seed(0)
    pipeline = ACDiTTextPipeline(text_model(12, 3, vocab=tokenizer.vocab_size), tokenizer)
    prompts = ["a", "dcba"]
    for options in ({}, {"max_new_tokens": 4}, {"eos_token": 1}):
        parts = list(pipeline.stream(prompts, generator=7, **options))
        assert len(parts) >= 2
        assert ["".join(row) for row in zip(*parts, strict=True)] == pipeline(prompts, generator=7, **options).texts


def test_sample_writes_what_the_pipeline_writes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("dc")
    options = "--max-new-tokens 7 --temperature 0.9 --top-p 0.95 --sampler ancestral --steps 6 --seed 4"
    command = ["sample", str(model), "--prompt-file", str(tmp_path / "prompt.txt"), *options.split()]
    assert main([*command, "--num-samples", "3", "--batch-size", "2", "--output", str(tmp_path / "out")]) == 0
    together = capsys.readouterr().out
    expected = ACDiTTextPipeline.from_pretrained(model)(
        "dc", 7, 4, batch_size=3, sampler="ancestral", num_inference_steps=6, temperature=0.9, top_p=0.95
    ).texts
    assert together == "\n\n----\n\n".join(expected) + "\n"
    for index, text in enumerate(expected):
        assert (tmp_path / f"out/{index:05d}-seed-{4 + index}.txt").read_text() == text
    assert json.loads((tmp_path / "out/settings.json").read_text())["top_p"] == 0.95
    assert main([*command, "--num-samples", "3", "--stream"]) == 0
    assert capsys.readouterr().out == together


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--labels", "1"], 2, "--labels"), (["--npz", "a.npz"], 2, "--npz"), (["--guidance-scale", "2"], 2, "scale"),
        (["--threshold", "0.5"], 2, "--sampler confidence"), (["--steps", "9"], 2, "--sampler ancestral"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "both"), (["--prompt-file", "missing"], 3, "missing"),
        (["--prompt", "abcdabcdabcd"], 2, "context"), (["--prompt", "xyz"], 3, "'x'"), (["--top-p", "2"], 2, "top_p"),
        (["--prompt", "a", "--max-new-tokens", "50"], 2, "max_new_tokens"), (["--futures", "2"], 2, "--num-samples"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, told: str
) -> None:
    assert main(["sample", str(model), *options]) == code
    assert told in capsys.readouterr().err


def test_evaluate_gives_the_bound_of_the_held_out_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(model), "data.split=held_out", "--output", str(tmp_path / "m.json"), "--draws", "5"]
    assert main([*command, "--batch-size", "2"]) == 0
    assert "perplexity ≤ " in capsys.readouterr().out
    found = json.loads((tmp_path / "m.json").read_text())
    pipeline = ACDiTTextPipeline.from_pretrained(model)
    ids = torch.tensor(pipeline.tokenizer.encode("dcab" * 9)).reshape(3, 12)
    bound = text_bound(pipeline.transformer, ids.split(2), num_draws=5)
    assert found["nats_per_token"] == bound.nats_per_token
    assert found["perplexity_95"] == list(bound.perplexity_interval)
    assert found["bits_per_character"] == pytest.approx(bound.bits_per_character(36))
    assert (found["tokens"], found["characters"], found["sequences"]) == (36, 36, 3)
    assert len(found["nats_per_token_by_block"]) == 4
    assert len(found["nats_per_token_by_place_in_block"]) == 3
    assert "first token counted" in found["protocol"]
    assert "joined by EOS" in found["protocol"]
    assert main([*command, "--data", str(model.parent / "recipe.yaml"), "data.wrap=bos", "--estimator", "rate"]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert "but for the cut" in found["protocol"]
    assert "BOS + 11 tokens" in found["protocol"]


def test_two_processes_evaluate_what_one_does(model: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(model), "data.split=held_out", "--draws", "3", "--batch-size", "2", "--output"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "acdit.cli",
         *command, str(tmp_path / "two.json")], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("perplexity") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert {key for key in one if one[key] != two[key]} <= {"command", "seconds", "processes"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "data.split=held_out"), (["--extractor", "pixels", "data.split=held_out"], "--extractor"),
        (["data.split=held_out", "data.sequence_length=8"], "data.sequence_length=12"), (["other"], "SAMPLES"),
        (["data.split=held_out", "data.held_out=100"], "held_out"), (["--data", "digits"], "data.kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["evaluate", str(model), *options, "--output", str(tmp_path / "m.json")]) in (2, 3)
    assert told in capsys.readouterr().err


def test_characters_are_counted_over_the_borders_of_sequences(byte_pairs: Tokenizer) -> None:
    tokenizer = byte_pairs
    ids = tokenizer.encode("naïve – 😀 text")
    cut = [torch.tensor([[one]]) for one in ids]
    assert count_characters(tokenizer, cut) == len("naïve – 😀 text")
    assert count_characters(tokenizer, [torch.tensor([[tokenizer.bos_token_id, *ids]])], first_token_given=True) == 14
