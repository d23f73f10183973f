"""Tables and streams of text: the same tokens however they are read, exact resumption, the last documents held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acdit.codecs import CharacterTokenizer
from acdit.data import TextDataset, TextStream, hf_text
from acdit.data.bad_files import BadFiles
from acdit.data.build import build_dataset, length
from acdit.data.hf_text import TableText
from acdit.data.text_stream import TailOfStream, _SequencesOfPart
from acdit.errors import AcditError, ConfigError, DataError
from acdit.recipe import DataRecipe

datasets = pytest.importorskip("datasets", reason="the library `datasets` is in the extra train")
TOKENIZER = CharacterTokenizer("abcdefghij ")


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's caches in the test's own folder, and no network."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class Rows:
    """A part of a stream, as `datasets` has it."""

    def __init__(self, texts: list[Any]) -> None:
        self._texts, self._at = texts, 0

    def __iter__(self) -> Any:
        while self._at < len(self._texts):
            self._at += 1
            yield {"text": self._texts[self._at - 1]}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at = state_dict["at"]


def part(texts: list[Any], chunk: int, limit: int | None = None) -> _SequencesOfPart:
    return _SequencesOfPart(Rows(texts), "text", TOKENIZER, chunk, BadFiles(99), "here", limit)


def brute_force(texts: list[Any], chunk: int) -> list[list[int]]:
    row = [index for text in texts if text for index in [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]]
    return [row[start : start + chunk] for start in range(0, len(row) - chunk + 1, chunk)]


@given(
    st.lists(st.one_of(st.text("abc", max_size=9), st.none()), max_size=9), st.integers(1, 7),
    st.one_of(st.none(), st.integers(0, 9)), st.data(),
)  # fmt: skip
def test_a_part_goes_on_inside_a_document(texts: list[Any], chunk: int, limit: int | None, data: st.DataObject) -> None:
    whole = part(texts, chunk, limit)
    sequences, states = [], [whole.state_dict()]
    for sequence in whole:
        sequences.append(sequence.tolist())
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert sequences == brute_force(texts[:limit], chunk)
    place = data.draw(st.integers(0, len(sequences)))
    resumed = part(texts, chunk, limit)
    resumed.load_state_dict(states[place])
    rest = []
    for sequence in resumed:
        rest.append(sequence.tolist())
        assert resumed.state_dict() == states[place + len(rest)]
    assert rest == sequences[place:]


TEXTS = ["abc def", "", "ghij " * 5, "a", None, "bcd efg " * 3, "hh", "ij" * 9, "f", "cab", "dd ee", "gg"]


def parquet(folder: Path, texts: list[Any] = TEXTS, files: int = 3) -> str:
    folder.mkdir()
    made = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    for number in range(files):
        made.shard(files, number, contiguous=True).to_parquet(str(folder / f"{number}.parquet"))
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> DataRecipe:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return DataRecipe(
        kind="hf_text", root=parquet(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer"), sequence_length=6,
        max_bad_files=1, cache=str(tmp_path / "tokens"),
    )  # fmt: skip


def changed(recipe: DataRecipe, **settings: Any) -> Any:
    return build_dataset(DataRecipe(**{**vars(recipe), **settings}))


def streamed(stream: TextStream, count: int, start: int = 0) -> list[list[int]]:
    return [
        tokens.tolist() for tokens, _ in stream.samples([(position, None) for position in range(start, start + count)])
    ]


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_table_is_tokenised_as_its_rows_say(recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(hf_text, "_READ_AT_ONCE", rows)
    dataset = changed(recipe)
    assert isinstance(dataset, TextDataset)
    assert [dataset[index][0].tolist() for index in range(len(dataset))] == brute_force(TEXTS, 6)
    assert list(dataset.bad_files.reasons.values()) == ["nothing instead of text"]
    assert "row 4" in next(iter(dataset.bad_files.reasons))
    characters = changed(recipe, tokenizer="characters")
    assert characters.tokenizer.alphabet == sorted(set("".join(filter(None, TEXTS))))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_reading_a_table_goes_on_from_any_place(recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(hf_text, "_READ_AT_ONCE", rows)
    assert recipe.root is not None
    for source in (TableText(recipe.root, "train", "text"), TailOfStream(recipe.root, "train", "text", 7)):
        pieces = list(source.pieces(len, BadFiles(9)))
        assert len(pieces) > 5
        for number, piece in enumerate(pieces):
            assert list(source.pieces(len, BadFiles(9), piece.place)) == pieces[number + 1 :]


def test_the_last_rows_are_held_out(recipe: DataRecipe) -> None:
    for held_out, number in ((3, 3), (0.25, 3)):
        train, last = changed(recipe, held_out=held_out), changed(recipe, held_out=held_out, split="held_out")
        assert [train[index][0].tolist() for index in range(len(train))] == brute_force(TEXTS[:-number], 6)
        assert [last[index][0].tolist() for index in range(len(last))] == brute_force(TEXTS[-number:], 6)
    with pytest.raises(DataError, match="found 12 documents; expected more than the 12"):
        changed(recipe, held_out=12)


def test_a_stream_has_the_sequences_of_its_files(recipe: DataRecipe) -> None:
    stream = changed(recipe, streaming=True, shuffle_buffer=1)
    assert isinstance(stream, TextStream)
    assert (length(stream), stream.shape, stream.vocab_size, stream.num_classes) == (None, (6,), 12, 1)
    stream.start(seed=1, history=0)
    expected = sorted(sequence for at in range(0, 12, 4) for sequence in brute_force(TEXTS[at : at + 4], 6))
    assert sorted(streamed(stream, len(expected))) == expected  # one epoch
    assert sorted(streamed(stream, len(expected), len(expected))) == expected
    wrapped = changed(recipe, streaming=True, wrap="bos_eos", sequence_length=8)
    wrapped.start(seed=1, history=0)
    assert all(row[0] == row[-1] == TOKENIZER.eos_token_id and len(row) == 8 for row in streamed(wrapped, 9))


@pytest.mark.parametrize("shuffle_buffer", [1, 4])
def test_a_stream_resumes_exactly(recipe: DataRecipe, shuffle_buffer: int) -> None:
    options = {"streaming": True, "shuffle_buffer": shuffle_buffer}
    whole = changed(recipe, **options)
    whole.start(seed=3, history=0)
    expected = streamed(whole, 60)
    for stop in (1, 7, 16, 33, 50):
        first = changed(recipe, **options)
        first.start(seed=3, history=8)
        assert streamed(first, stop) == expected[:stop]
        state = json.loads(json.dumps(first.state(stop)))
        second = changed(recipe, **options)
        second.load_state(state)
        second.start(seed=3, history=8)
        assert streamed(second, 60 - stop, stop) == expected[stop:]


@pytest.mark.parametrize("held_out", [1, 3, 4, 6, 11])
def test_the_end_of_a_stream_is_held_out(recipe: DataRecipe, held_out: int) -> None:
    stream = changed(recipe, streaming=True, held_out=held_out, shuffle_buffer=1)
    stream.start(seed=1, history=0)
    rest = TEXTS[: 12 - held_out]
    expected = sorted(sequence for at in range(0, len(rest), 4) for sequence in brute_force(rest[at : at + 4], 6))
    if expected:
        assert sorted(streamed(stream, len(expected))) == expected
    last = changed(recipe, streaming=True, held_out=held_out, split="held_out", sequence_length=2)
    assert isinstance(last, TextDataset)
    assert [last[index][0].tolist() for index in range(len(last))] == brute_force(TEXTS[-held_out:], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "body"}, r"data\.text_column; found no column 'body' among text, id"),
        ({"text_column": "id"}, r"column 'id'; found int64; expected text"),
        ({"streaming": True, "held_out": 0.1}, r"data\.held_out; found 0\.1, of a stream; expected a number"),
        ({"streaming": True, "held_out": 12}, r"found 12 documents; expected more than the 12"),
        ({"streaming": True, "held_out": 2.5}, "expected a share below 1, or a whole number"),
        ({"max_bad_files": 0}, r"row 4; found a bad text \(nothing instead of text\)"),
        ({"sequence_length": 1000}, "expected at least 1,000, for one sequence"),
        ({"split": "test"}, "split 'test'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(recipe: DataRecipe, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        changed(recipe, **settings)


def test_a_bad_row_of_a_stream_is_named(recipe: DataRecipe) -> None:
    stream = changed(recipe, streaming=True, max_bad_files=0)
    stream.start(seed=1, history=0)
    with pytest.raises(DataError, match=r"file 1 of the stream, row 0; found a bad row \(nothing instead of text\)"):
        streamed(stream, 20)


def test_a_stream_with_too_little_text_says_so(recipe: DataRecipe) -> None:
    stream = changed(recipe, streaming=True, sequence_length=500)
    stream.start(seed=1, history=0)
    with pytest.raises(AcditError, match="for one sequence"):
        streamed(stream, 1)


def test_a_configuration_is_asked_for(recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = datasets.load_dataset

    def load(path: str, name: Any = None, **options: Any) -> Any:
        asked.append((path, name))
        return real("parquet", data_dir=recipe.root, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    changed(recipe, root="Salesforce/wikitext", subset="wikitext-2-raw-v1")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
