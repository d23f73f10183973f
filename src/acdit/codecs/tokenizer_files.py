"""Tokenizers from files: GPT-2's two, a tokenizer.json, a saved folder, a name on the hub. Only data are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acdit.codecs.text import CONFIG_FILE, END_OF_TEXT, TOKENIZER_FILE, CharacterTokenizer, SubwordTokenizer, Tokenizer
from acdit.errors import AcditError, ConfigError, DataError, first_line

EXPECTED = (
    "characters; a folder with tokenizer.json, with encoder.json and vocab.bpe, or with vocab.json and merges.txt; "
    "a tokenizer.json; or the name of a tokenizer on the hub, like gpt2"
)
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_GPT2 = "openai-community/gpt2"
# Names that stand for (end, begin) where no config says so: GPT-2's, SentencePiece's, BERT's.
_USUAL = ((END_OF_TEXT, END_OF_TEXT), ("</s>", "<s>"), ("[SEP]", "[CLS]"))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer a name stands for.

    Args:
        name: a folder, a tokenizer.json, or a name on the hub (its files are fetched, or found in the hub's cache).
            "characters" is none of them: it needs a text (see `CharacterTokenizer`).

    Raises:
        ConfigError: nothing of the kind; the library is not installed; no token that ends a document.
        DataError: a file that cannot be read.
    """
    place = Path(name)
    if name and place.is_dir():
        return _from_files({file.name: file for file in place.iterdir()}, f"tokenizer {name}")
    if place.is_file():
        beside = {CONFIG_FILE: place.with_name(CONFIG_FILE)} if place.with_name(CONFIG_FILE).is_file() else {}
        return _from_files({TOKENIZER_FILE: place, **beside}, f"tokenizer {name}")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return _from_files(_from_hub(_GPT2 if name == "gpt2" else name), f"tokenizer {name}")
    raise ConfigError("data.tokenizer", found=repr(name), expected=EXPECTED)


def _from_hub(name: str) -> dict[str, Path]:
    """Files of a tokenizer by their names."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def fetched(*files: str) -> dict[str, Path]:
        try:
            return {file: Path(huggingface_hub.hf_hub_download(name, file)) for file in files}
        except EntryNotFoundError:
            return {}

    try:
        found = fetched(TOKENIZER_FILE) or fetched(*_PAIRS[1])
        return found | fetched(CONFIG_FILE)
    except Exception as error:  # the hub's own, the network's
        raise ConfigError(
            f"data.tokenizer {name!r}", found=f"nothing that can be fetched ({first_line(error)})", expected=EXPECTED,
            fix="correct the name, or give a folder with the tokenizer's files",
        ) from error  # fmt: skip


def _from_files(files: Mapping[str, Path], where: str) -> Tokenizer:
    config = _json(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
    if TOKENIZER_FILE in files:
        form = _json(files[TOKENIZER_FILE])
        characters = CharacterTokenizer.from_form(form)
        if characters is not None:
            return characters
        return _subwords(_library(where).Tokenizer.from_str, (json.dumps(form),), config, where)
    for vocabulary, merges in _PAIRS:
        if vocabulary in files and merges in files:
            return _subwords(_gpt2, (files[vocabulary], files[merges], where), config, where)
    raise ConfigError(where, found=", ".join(sorted(files)[:8]) or "an empty folder", expected=EXPECTED)


def _gpt2(vocabulary: Path, merges: Path, where: str) -> Any:
    library = _library(where)
    tokenizer = library.Tokenizer(library.models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _subwords(make: Any, arguments: tuple[Any, ...], config: Any, where: str) -> Tokenizer:
    try:
        library = make(*arguments)
    except AcditError:
        raise
    except Exception as error:  # the library's own are plain Exceptions
        raise DataError(
            where, found=f"files that are no tokenizer ({first_line(error)})", expected="what `tokenizers` reads"
        ) from error
    end, begin = (_named(config, name) for name in ("eos_token", "bos_token"))
    usual = [pair for pair in _USUAL if all(library.token_to_id(name) is not None for name in pair)]
    end = end or (usual[0][0] if usual else None)
    begin = begin or (usual[0][1] if usual and usual[0][0] == end else end)
    if end is None or begin is None:
        raise ConfigError(
            where, found="no token that ends a document", expected="eos_token in tokenizer_config.json",
            fix=f'add {{"eos_token": "…"}} to {CONFIG_FILE} beside {TOKENIZER_FILE}',
        )  # fmt: skip
    return SubwordTokenizer(library, end, begin)


def _named(config: Any, name: str) -> str | None:
    """A special token of a config: a name, or a mapping with its content."""
    value = config.get(name) if isinstance(config, dict) else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _library(where: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            where, found=f"no library `tokenizers` ({error})", expected="the extra `text`",
            fix="pip install 'acdit[text]', or data.tokenizer=characters, which needs none",
        ) from None  # fmt: skip
    return tokenizers


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(file), found=f"no readable JSON ({first_line(error)})", expected="a tokenizer's") from None
