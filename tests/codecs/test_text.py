"""Tokenizers: round trips over all of Unicode, GPT-2's ids against the definition, streams, files, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acdit.codecs import CharacterTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer, require_vocabulary
from acdit.data.documents import BuiltInText
from acdit.errors import ConfigError, DataError
from tests.codecs.tokenizers import PlainBPE, write_gpt2_files

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
# Where GPT-2's rules have their corners: contractions, runs of spaces, letters beside digits and signs.
CORNERS = st.text("aB'sltre 1.\n\t\u00a0\u3000é日👍\u0301", max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers", reason="the library `tokenizers` is in the extra text")
    return write_gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> SubwordTokenizer:
    made = load_tokenizer(str(folder))
    assert isinstance(made, SubwordTokenizer)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainBPE:
    return PlainBPE(folder / "encoder.json", folder / "vocab.bpe")


@given(TEXT.filter(bool), st.data())
def test_characters_go_there_and_back(text: str, data: st.DataObject) -> None:
    tokenizer = CharacterTokenizer(text)
    assert tokenizer.vocab_size == len(set(text)) + 1
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text
    place = data.draw(st.integers(0, len(text)))
    joined = tokenizer.encode_batch([text[:place], text[place:]])
    assert np.concatenate(joined).tolist() == ids


@settings(deadline=None)
@given(st.one_of(TEXT, CORNERS))
def test_subwords_are_those_of_the_definition_and_go_there_and_back(
    gpt2: SubwordTokenizer, plain: PlainBPE, text: str
) -> None:
    ids = gpt2.encode(text)
    assert ids == plain.encode(text)
    assert gpt2.decode(ids) == text


@settings(deadline=None)
@given(st.one_of(TEXT, CORNERS))
def test_a_cut_changes_no_ids(gpt2: SubwordTokenizer, text: str) -> None:
    place = gpt2.last_cut(text)
    left, right = gpt2.encode_batch([text[:place], text[place:]])
    assert [*left, *right] == gpt2.encode(text)


def test_long_text_can_be_cut(gpt2: SubwordTokenizer) -> None:
    assert gpt2.last_cut("one two three") == 7
    assert gpt2.last_cut("one two  three") == 3
    assert gpt2.last_cut("one two ") == 3
    assert gpt2.last_cut("one") == 0
    assert gpt2.last_cut("") == 0


@settings(deadline=None)
@given(st.data())
def test_a_stream_shows_what_decoding_all_at_once_shows(gpt2: SubwordTokenizer, data: st.DataObject) -> None:
    # Any ids: a model that has learned nothing yet writes bytes that are no UTF-8.
    ids = data.draw(st.lists(st.integers(0, gpt2.vocab_size - 1), max_size=20))
    ids += gpt2.encode(data.draw(TEXT))
    assert "".join(shown(gpt2, ids, data.draw(st.integers(1, 4)))) == gpt2.decode(ids)


def shown(tokenizer: Tokenizer, ids: list[int], step: int = 1) -> Iterator[str]:
    stream = tokenizer.stream()
    for start in range(0, len(ids), step):
        yield stream.add(ids[start : start + step])
    yield stream.finish()


def test_a_character_is_shown_when_it_is_whole(gpt2: SubwordTokenizer) -> None:
    ids = gpt2.encode("a𝄞b")
    assert len(ids) > 3
    assert [part for part in shown(gpt2, ids) if part] == ["a", "𝄞", "b"]
    cut = list(shown(gpt2, ids[:-2]))
    assert (cut[0], cut[-1]) == ("a", "\ufffd")
    never = next(index for index in range(gpt2.vocab_size) if gpt2.token_bytes(index) == b"\xff")
    assert gpt2.stream().add([never]) == "\ufffd"  # nothing that follows can make it whole
    assert list(shown(CharacterTokenizer("ab𝄞"), [0, 2, 3])) == ["a", "𝄞", "", ""]


def test_other_decoders_stream_too(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="the library `tokenizers` is in the extra text")
    vocabulary = {
        "<unk>": 0,
        "</s>": 1,
        "<s>": 2,
        "▁the": 3,
        "▁cat": 4,
        "s": 5,
        **{f"<0x{b:02X}>": 6 + b for b in range(256)},
    }
    made = library.Tokenizer(library.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = library.decoders.Sequence(
        [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse(),
         library.decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1)
    ids = [3, 4, 5, *(6 + byte for byte in "é".encode()), 3]
    assert tokenizer.decode(ids) == "the catsé the"
    assert [part for part in shown(tokenizer, ids) if part] == ["the", " cat", "s", "é", " the"]
    assert tokenizer.last_cut("the cat sat") == 0  # nothing is known about its rules


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_both_pairs_of_files_and_a_saved_folder_are_the_same_tokenizer(
    tmp_path: Path, gpt2: SubwordTokenizer, names: tuple[str, str]
) -> None:
    other = load_tokenizer(str(write_gpt2_files(tmp_path / "files", names)))
    assert other.fingerprint == gpt2.fingerprint
    other.save_pretrained(tmp_path / "saved")
    for saved in (
        Tokenizer.from_pretrained(tmp_path / "saved"),
        load_tokenizer(str(tmp_path / "saved/tokenizer.json")),
    ):
        assert saved.fingerprint == gpt2.fingerprint
        assert saved.vocab_size == gpt2.vocab_size
        assert saved.eos_token_id == saved.bos_token_id == gpt2.vocab_size - 1
        assert saved.encode("<|endoftext|>") == gpt2.encode("<|endoftext|>")
        assert saved.eos_token_id not in saved.encode("a<|endoftext|>b")  # text is text


def test_saved_characters_are_a_tokenizer_of_the_library_too(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="the library `tokenizers` is in the extra text")
    text = "To be,\n\r\t or\u2028 not: ‘ïé日👍 \u00ad"
    tokenizer = CharacterTokenizer(text)
    tokenizer.save_pretrained(tmp_path)
    saved = Tokenizer.from_pretrained(tmp_path)
    assert isinstance(saved, CharacterTokenizer)
    assert saved.fingerprint == tokenizer.fingerprint
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.token_to_id("<|endoftext|>") == tokenizer.eos_token_id


def test_characters_need_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    CharacterTokenizer("abc").save_pretrained(tmp_path / "characters")
    assert load_tokenizer(str(tmp_path / "characters")).vocab_size == 4
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("")
    with pytest.raises(ConfigError, match=r"acdit\[text\]"):
        load_tokenizer(str(tmp_path))


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match=r"'ß' \(U\+00DF\) in 'abcßa'; expected one of the 3 char"):
        CharacterTokenizer("abc").encode("abcßa")
    with pytest.raises(DataError, match="without characters"):
        CharacterTokenizer("")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "an empty folder"),
        ({"encoder.json": "{}"}, "encoder.json; expected characters; a folder"),
        ({"tokenizer.json": "{"}, "no readable JSON"),
        ({"tokenizer.json": "[]"}, "files that are no tokenizer"),
        ({"tokenizer.json": "\ud800"}, "no readable JSON"),
        ({"encoder.json": '{"a": 0}', "vocab.bpe": "#version: 0.2\nb c\n"}, "files that are no tokenizer"),
        ({"encoder.json": '{"a": 0}', "vocab.bpe": "#version: 0.2\n"}, "no token that ends a document"),
        (
            {"encoder.json": '{"a": 0}', "vocab.bpe": "", "tokenizer_config.json": '{"eos_token": "b"}'},
            "no token 'b'",
        ),
        (
            {"encoder.json": '{"a": 0}', "vocab.bpe": "", "tokenizer_config.json": "[" * 100_000},
            "no readable JSON",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    pytest.importorskip("tokenizers", reason="the library `tokenizers` is in the extra text")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises((ConfigError, DataError), match=message):
        load_tokenizer(str(tmp_path))


def test_special_tokens_are_the_configs(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the library `tokenizers` is in the extra text")
    (tmp_path / "encoder.json").write_text('{"a": 0, "end": 1, "begin": 2}')
    (tmp_path / "vocab.bpe").write_text("")
    config = {"eos_token": {"content": "end"}, "bos_token": "begin", "auto_map": {"AutoTokenizer": "evil.py"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, 2)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "a b", "no/such/thing", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer; found .* expected characters; a folder"):
        load_tokenizer(name)


def test_a_name_on_the_hub_is_looked_for_there(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    write_gpt2_files(tmp_path, ("vocab.json", "merges.txt"))
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if name == "broken/one":
            raise OSError("no network")
        if not (tmp_path / file).exists():
            raise errors.EntryNotFoundError("404")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert load_tokenizer("gpt2").fingerprint == load_tokenizer(str(folder)).fingerprint
    assert asked[0] == ("openai-community/gpt2", "tokenizer.json")
    with pytest.raises(ConfigError, match=r"'broken/one'; found nothing that can be fetched \(no network\)"):
        load_tokenizer("broken/one")


def test_a_vocabulary_that_is_not_the_models_is_refused(gpt2: SubwordTokenizer) -> None:
    one, other = CharacterTokenizer("abc"), CharacterTokenizer("abd")
    require_vocabulary(one, 4)
    require_vocabulary(one, 4, CharacterTokenizer("cba"))
    with pytest.raises(ConfigError, match=r"found 4 tokens; expected 5, as the model has.*MODEL/tokenizer"):
        require_vocabulary(one, 5)
    with pytest.raises(ConfigError, match="found 'c' as token 2; expected 'd'"):
        require_vocabulary(one, 4, other)
    with pytest.raises(DataError, match=r"found 4; expected 0 … 3"):
        one.decode([4])
    with pytest.raises(DataError, match="expected 0"):
        gpt2.decode([gpt2.vocab_size])


def test_tokens_have_names_for_people(gpt2: SubwordTokenizer) -> None:
    assert gpt2.token(gpt2.encode(" t")[0]) == " t"
    assert gpt2.token(gpt2.eos_token_id) == "<|endoftext|>"
    assert CharacterTokenizer("ab").token(2) == "<|endoftext|>"


def test_every_character_of_the_held_out_text_is_known() -> None:
    train, held_out = BuiltInText("train").text, BuiltInText("held_out").text
    assert CharacterTokenizer(train).decode(CharacterTokenizer(train).encode(held_out)) == held_out
