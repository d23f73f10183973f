"""Generative perplexity: GPT-2 against the usual implementation's recorded numbers, the measure by its formula."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from acdit.cli import main
from acdit.codecs.text import CharacterTokenizer
from acdit.errors import DataError
from acdit.evaluation.generated_text import judge_texts, read_texts
from acdit.evaluation.gpt2 import load_gpt2

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"
"""A random GPT-2 of two layers as `transformers` 5.24.0 saved it, and its fp64 logits."""
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "gpt2"))
    CharacterTokenizer(set(LETTERS)).save_pretrained(folder)
    return folder


def changed(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def test_logits_are_those_of_the_usual_implementation() -> None:
    recorded = np.load(FIXTURE / "recorded.npz")
    with torch.no_grad():
        logits = load_gpt2(FIXTURE).double()(torch.from_numpy(recorded["ids"]).long())
    torch.testing.assert_close(logits, torch.from_numpy(recorded["logits"]), rtol=0, atol=1e-12)


def test_every_form_of_the_files_is_the_same_model(judge_folder: Path) -> None:
    """With the head, with old files' masks, without a prefix, pickled."""
    expected = load_gpt2(judge_folder).state_dict()
    state = load_file(judge_folder / "model.safetensors")
    table = state["transformer.wte.weight"]
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24), "transformer.h.1.attn.masked_bias": torch.ones(1)}
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    for form in ({**state, "lm_head.weight": table.clone()}, {**state, **masks}, bare):
        save_file(form, judge_folder / "model.safetensors")
        made = load_gpt2(judge_folder).state_dict()
        assert all(torch.equal(made[name], value) for name, value in expected.items())
    (judge_folder / "model.safetensors").unlink()
    torch.save(bare, judge_folder / "pytorch_model.bin")
    assert torch.equal(load_gpt2(judge_folder).state_dict()["wte.weight"], expected["wte.weight"])


def test_perplexity_and_entropy_are_those_of_their_formulas(judge_folder: Path) -> None:
    judge, tokenizer = load_gpt2(judge_folder).double(), CharacterTokenizer(set(LETTERS))
    texts = ["a cat sat.", "b" * 30]  # the second is longer than the context of 24
    found = judge_texts(judge, tokenizer, texts)
    nats, count = 0.0, 0
    for text in (texts[0], texts[1][:24], texts[1][24:]):
        ids = tokenizer.encode(text)
        for place in range(1, len(ids)):
            logits = judge(torch.tensor([ids[:place]]))[0, -1]
            nats -= float(logits.log_softmax(-1)[ids[place]])
            count += 1
    assert found.tokens == count == 9 + 23 + 5
    assert found.nats_per_token == pytest.approx(nats / count, abs=1e-12)
    assert found.perplexity == pytest.approx(math.exp(nats / count))
    letters = {letter: texts[0].count(letter) / 10 for letter in set(texts[0])}
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in letters.values()) / 2)  # the other has none


def test_the_command_judges_what_sample_leaves(
    judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index, text in enumerate(("the cat", "a dog, a cat.")):
        (texts / f"{index:05d}-seed-{index}.txt").write_text(text)
    (texts / "settings.json").write_text("{}")
    output = tmp_path / "metrics.json"
    assert main(["evaluate", str(texts), "--language-model", str(judge_folder), "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert (figures["texts"], figures["tokens"]) == (2, 6 + 12)
    expected = judge_texts(load_gpt2(judge_folder), CharacterTokenizer(set(LETTERS)), ["the cat", "a dog, a cat."])
    assert figures["generative_perplexity"] == pytest.approx(expected.perplexity)
    assert figures["protocol"].startswith("tokenised anew")
    assert "generative perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "config.json, recorded.npz"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "no readable config"),
        (lambda folder: changed(folder, model_type="llama"), "llama"),
        (lambda folder: changed(folder, activation_function="relu"), "relu"),
        (lambda folder: changed(folder, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda folder: changed(folder, n_layer=3), "missing"),
        (lambda folder: changed(folder, n_head=5), "multiple of n_head"),
        (lambda folder: changed(folder, vocab_size=9), "misshaped"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "unreadable"),
    ],
)
def test_what_is_no_gpt2_is_named(judge_folder: Path, break_it: object, named: str) -> None:
    break_it(judge_folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=named) as caught:
        load_gpt2(judge_folder)
    assert caught.value.exit_code == 3


def test_an_untied_head_is_another_model(judge_folder: Path) -> None:
    state = load_file(judge_folder / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.ones(64, 16)}, judge_folder / "model.safetensors")
    with pytest.raises(DataError, match="share a table"):
        load_gpt2(judge_folder)


def test_what_is_no_text_is_named(judge_folder: Path, tmp_path: Path) -> None:
    judge, tokenizer = load_gpt2(judge_folder), CharacterTokenizer(set(LETTERS))
    for texts, named in (([], "0 texts"), (["a"], "none of two"), (["a cat", ""], "text 1")):
        with pytest.raises(DataError, match=named):
            judge_texts(judge, tokenizer, texts)
    with pytest.raises(DataError, match="tokens"):
        judge_texts(judge, CharacterTokenizer({chr(200 + index) for index in range(90)}), ["a"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00")
    for source, named in (("empty", "no .txt file"), ("nowhere.txt", "no such file"), ("binary.txt", "byte 0")):
        with pytest.raises(DataError, match=named):
            read_texts([tmp_path / source])


def test_settings_of_other_measures_are_refused(
    judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("a cat")
    command = ["evaluate", str(tmp_path / "one.txt"), "--language-model", str(judge_folder)]
    for extra in (["--draws", "4"], ["--extractor", "pixels"], ["--reference", "x"]):
        assert main([*command, *extra]) == 2
        assert extra[0] in capsys.readouterr().err
    assert main(["evaluate", "--language-model", str(judge_folder)]) == 2
    assert "SAMPLES" in capsys.readouterr().err
