"""Text as sequences: the wrap against its definition, the recipe's settings, what a person is shown."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acdit.cli import main
from acdit.codecs import CharacterTokenizer
from acdit.data import TextDataset
from acdit.data.bad_files import BadFiles
from acdit.data.build import build_dataset, length
from acdit.data.documents import BuiltInText
from acdit.data.text import ADDED, Wrap
from acdit.data.token_cache import Tokens
from acdit.errors import AcditError, ConfigError, DataError
from acdit.recipe import DataRecipe

BUILT_IN = DataRecipe(kind="builtin_text", sequence_length=64)


def brute_force(documents: list[str], tokenizer: CharacterTokenizer, kind: str, size: int) -> list[list[int]]:
    """Spec section 7, token by token."""
    sequences, now = [], []
    for text in documents:
        for token in [*tokenizer.encode(text), tokenizer.eos_token_id]:
            now.append(token)
            whole = {
                "joined": now,
                "bos": [tokenizer.bos_token_id, *now],
                "bos_eos": [tokenizer.bos_token_id, *now, tokenizer.eos_token_id],
            }[kind]
            if len(whole) == size:
                sequences.append(whole)
                now = []
    return sequences


@given(
    st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=9), st.sampled_from(list(ADDED)),
    st.integers(1, 12),
)  # fmt: skip
def test_sequences_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], kind: str, size: int
) -> None:
    folder = tmp_path_factory.mktemp("t")
    (folder / "t.txt").write_text("\n".join(documents))
    recipe = DataRecipe(
        kind="text", root=str(folder / "t.txt"), document="line", wrap=kind, sequence_length=size, cache=str(folder)
    )
    tokenizer = CharacterTokenizer("".join(documents))
    expected = brute_force(documents, tokenizer, kind, size)
    if not expected:
        with pytest.raises(AcditError, match=r"for one sequence|data\.sequence_length"):
            build_dataset(recipe)
        return
    dataset = build_dataset(recipe)
    assert [dataset[index][0].tolist() for index in range(len(dataset))] == expected
    assert dataset[0][0].dtype == torch.int64
    assert (dataset.shape, dataset.num_classes, dataset.class_names) == ((size,), 1, ["text"])
    assert {dataset[index][1] for index in range(len(dataset))} == {0}


def test_the_built_in_text_needs_nothing() -> None:
    train, held_out = build_dataset(BUILT_IN), build_dataset(replace(BUILT_IN, split="held_out"))
    assert isinstance(train, TextDataset)
    assert isinstance(held_out, TextDataset)
    assert train.vocab_size == held_out.vocab_size == train.tokenizer.vocab_size == 63
    assert train.tokenizer.decode(train[0][0].tolist()) == BuiltInText().text[:64]
    assert held_out.tokenizer.decode(held_out[1][0].tolist()) == BuiltInText("held_out").text[64:128]
    assert length(train) == len(train) == (len(BuiltInText().text) + 1) // 64
    with pytest.raises(IndexError):
        train[len(train)]
    assert torch.equal(train[-1][0], train[len(train) - 1][0])


def test_protocols_are_named() -> None:
    protocols = [build_dataset(replace(BUILT_IN, wrap=kind)).protocol for kind in ADDED]  # type: ignore[union-attr]
    assert protocols[0] == "documents joined by EOS, disjoint sequences of 64 tokens (wrap joined)"
    assert protocols[1].endswith("BOS + 63 tokens (wrap bos)")
    assert protocols[2].endswith("BOS + 62 tokens + EOS (wrap bos_eos)")


def test_random_crops_begin_anywhere_in_a_chunk() -> None:
    dataset = build_dataset(replace(BUILT_IN, crop="random"))
    assert isinstance(dataset, TextDataset)
    text = BuiltInText().text
    for index, draw in ((0, 0.0), (3, 0.5), (7, 0.999)):
        start = 64 * index + int(draw * 64)
        tokens, _ = dataset.cropped(index, (draw, 0.3, 0.3))
        assert dataset.tokenizer.decode(tokens.tolist()) == text[start : start + 64]
    last = dataset.cropped(len(dataset) - 1, (0.999,))[0]
    assert last.tolist() == dataset.row[-64:].tolist()


def test_a_mapped_text_travels_to_workers_without_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(BuiltInText().text[:50_000])
    dataset = build_dataset(DataRecipe(kind="text", root=str(tmp_path), cache=str(tmp_path / "c"), sequence_length=50))
    first = dataset[0][0]
    assert isinstance(dataset.row, np.memmap)  # type: ignore[union-attr]
    packed = pickle.dumps(dataset)
    assert len(packed) < 20_000
    assert torch.equal(pickle.loads(packed)[0][0], first)


def test_a_models_own_tokenizer_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    own = CharacterTokenizer(BuiltInText().text + "~")
    assert build_dataset(BUILT_IN, tokenizer=own).vocab_size == own.vocab_size  # type: ignore[union-attr]
    own.save_pretrained(tmp_path)
    named = build_dataset(replace(BUILT_IN, tokenizer=str(tmp_path)))
    assert named.vocab_size == own.vocab_size  # type: ignore[union-attr]


def test_held_out_text_has_the_alphabet_of_the_rest(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcabcabcabcabcaaaaa")
    recipe = DataRecipe(
        kind="text", root=str(tmp_path), held_out=0.25, split="held_out", sequence_length=5, cache=str(tmp_path / "c")
    )
    assert build_dataset(recipe).vocab_size == 4  # type: ignore[union-attr]
    (tmp_path / "t.txt").write_text("abcabcabcabcabcabcad")
    with pytest.raises(DataError, match=r"found the character 'd' \(U\+0064\) in 'abcad'"):
        build_dataset(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text"}, r"data\.root; found nothing; expected where the text lies"),
        ({"kind": "builtin_text", "root": "x"}, r"data\.root; found 'x'; expected None"),
        ({"kind": "builtin_text", "channels": 1}, r"data\.channels; found 1"),
        ({"kind": "builtin_text", "flip": True}, r"data\.flip; found True"),
        ({"kind": "builtin_text", "held_out": 0.1}, r"data\.held_out; found 0\.1"),
        ({"kind": "digits", "channels": 1, "tokenizer": "gpt2"}, r"data\.tokenizer; found 'gpt2'"),
        ({"kind": "hf_text", "root": "x", "document": "line"}, r"data\.document; found 'line'"),
        ({"kind": "hf_text", "root": "x", "shuffle_buffer": 2}, r"without data\.streaming=true"),
        ({"kind": "hf_text", "root": "x", "streaming": True}, r"data\.tokenizer; found characters, of a stream"),
        ({"kind": "hf_text", "root": "x", "streaming": True, "crop": "random"}, r"data\.crop; found random, of a str"),
        ({"kind": "builtin_text", "sequence_length": 2, "wrap": "bos_eos"}, r"found 2; expected at least 3 for"),
        ({"kind": "builtin_text", "sequence_length": 10**7}, r"found 26\d,\d+ tokens in 1 documents; expected"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        build_dataset(DataRecipe(**settings))


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    tokenizer = CharacterTokenizer("ab")
    row = np.array([0, 1, 3], dtype=np.uint16)
    dataset = TextDataset(row, Tokens(tokens=3), tokenizer, Wrap("joined", 3, tokenizer), BadFiles(0), "here")
    with pytest.raises(DataError, match=r"found the id 3; expected 0 … 2"):
        dataset[0]


RECIPE = """
name: text
model: {grid: [8], block: [4], num_layers: 1, num_attention_heads: 1, attention_head_dim: 8}
data: {kind: text, sequence_length: 8}
optim: {batch_size: 1}
train: {steps: 1}
"""


def test_the_command_shows_what_text_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "a.txt").write_text("aab\n" * 10)
    (tmp_path / "b.txt").write_text("ü" * 4)
    command = ["data", f"{tmp_path}/recipe.yaml", f"data.root={tmp_path}", f"data.cache={tmp_path}/cache"]
    assert main([*command, "--all"]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["documents"] == "2"
    assert shown["characters"] == "44 (48 bytes)"
    assert shown["tokens"] == "46 (0.96 characters each)"
    assert shown["sequences"] == "5"
    assert shown["begins"].startswith(repr("aab\n" * 10 + "ü" * 4))
    assert "'a' 43.5%, '\\n' 21.7%, 'b' 21.7%, 'ü' 8.7%, '<|endoftext|>' 4.3%" in shown["most"]
    (tmp_path / "c.txt").write_bytes(b"\0")
    assert main(command) == 3
    shown_now = capsys.readouterr()
    assert "bad files        1" in shown_now.out
    assert "c.txt; found a bad text (a NUL byte at byte 0: no text), the first of 1" in shown_now.err


def test_text_that_is_all_bad_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    recipe = DataRecipe(
        kind="text", root=str(tmp_path), tokenizer=str(tmp_path / "t"), cache=str(tmp_path / "c"), max_bad_files=1
    )
    CharacterTokenizer("a").save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match=r"0 tokens in 0 documents, 1 bad ones left out, the first .*a\.txt \(no UTF-8"):
        build_dataset(recipe)
