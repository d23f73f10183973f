"""Tokenizers: text ↔ token ids, saved as transformers saves them (tokenizer.json, tokenizer_config.json).

`CharacterTokenizer` needs no library; `SubwordTokenizer` is one of the library `tokenizers` (extra `text`). Both read
text as plain text: a document in which the characters "<|endoftext|>" stand is not cut there.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acdit.errors import ConfigError, DataError, first_line

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_EACH_CHARACTER = r"[\s\S]"


class Tokenizer(ABC):
    """Text ↔ ids 0 … `vocab_size` − 1.

    The mask token of masked diffusion is none of them: the model has it one beyond the vocabulary.
    """

    vocab_size: int
    eos_token_id: int
    """What ends a document."""
    bos_token_id: int
    """What begins a sequence, where one is asked for; GPT-2 has one token for both."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int64) of each text, nothing added.

        Raises:
            DataError: a character that the tokenizer does not know.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; BOS, EOS and their like are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """

    @abstractmethod
    def token(self, index: int) -> str:
        """One token as text, special ones by their names: for people."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The tokenizer as a tokenizer.json of the library `tokenizers`."""

    @abstractmethod
    def last_cut(self, text: str) -> int:
        """The last place where the text can be cut without a change of ids: those of both sides, joined, are those of
        the whole, whatever follows. 0: nowhere."""

    @abstractmethod
    def stream(self) -> TokenStream:
        """What turns ids into text as they come, one row of a batch each."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added; raises as `encode_batch`."""
        return list(map(int, self.encode_batch([text])[0]))

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what the ids mean: equal for tokenizers that can stand for each other."""
        known = [json.loads(self.tokenizer_json()), self.eos_token_id, self.bos_token_id]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `transformers` reads them too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self.tokenizer_json(), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.token(self.eos_token_id),
            "bos_token": self.token(self.bos_token_id), "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """A saved tokenizer, of whichever kind; no code is executed.

        Raises:
            ConfigError, DataError: see `acdit.codecs.tokenizer_files.load_tokenizer`.
        """
        from acdit.codecs.tokenizer_files import load_tokenizer

        return load_tokenizer(str(folder))

    def _require_ids(self, ids: Sequence[int]) -> None:
        wrong = next((index for index in ids if not 0 <= index < self.vocab_size), None)
        if wrong is not None:
            raise DataError("token ids", found=str(wrong), expected=f"0 … {self.vocab_size - 1}")


class TokenStream(ABC):
    """Ids → text while they come: a character whose bytes are spread over tokens waits until it is whole."""

    @abstractmethod
    def add(self, ids: Sequence[int]) -> str:
        """What is new to show; all that was shown, joined, is `decode` of all ids."""

    @abstractmethod
    def finish(self) -> str:
        """What still waited."""


class CharacterTokenizer(Tokenizer):
    """One token a character, in the order of code points; EOS (and BOS) behind them.

    Args:
        alphabet: the characters, in any order and number.

    Raises:
        DataError: there is none.
    """

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = sorted(set(alphabet))
        if not self.alphabet:
            raise DataError("data.tokenizer=characters", found="a text without characters", expected="some")
        self._points = np.array([ord(character) for character in self.alphabet], dtype=np.int64)
        self.eos_token_id = self.bos_token_id = len(self.alphabet)
        self.vocab_size = len(self.alphabet) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
        ids = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if len(unknown):
            place = int(unknown[0])
            raise DataError(
                "text", found=f"the character {text[place]!r} (U+{ord(text[place]):04X}) in "
                f"{text[max(0, place - 20) : place + 10]!r}",
                expected=f"one of the {len(self.alphabet)} characters of the training text",
                fix="remove it, or train with a tokenizer that knows all text (data.tokenizer=gpt2)",
            )  # fmt: skip
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self._require_ids(ids)
        return "".join(self.alphabet[index] for index in ids if index != self.eos_token_id)

    def token(self, index: int) -> str:
        self._require_ids([index])
        return END_OF_TEXT if index == self.eos_token_id else self.alphabet[index]

    def last_cut(self, text: str) -> int:
        return len(text)

    def stream(self) -> TokenStream:
        return _Direct(self)

    def tokenizer_json(self) -> str:
        special = {
            "id": self.eos_token_id, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }  # fmt: skip
        vocabulary = {character: index for index, character in enumerate(self.alphabet)}
        form: dict[str, Any] = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": _EACH_CHARACTER}, "behavior": "Isolated", "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": {**vocabulary, END_OF_TEXT: self.eos_token_id}, "unk_token": ""},
        }  # fmt: skip
        return json.dumps(form, indent=1) + "\n"  # escaped: a line separator is a character too

    @classmethod
    def from_form(cls, form: Any) -> CharacterTokenizer | None:
        """From the content of a tokenizer.json; None: it is of another kind."""
        try:
            vocabulary = form["model"]["vocab"]
            if form["model"]["type"] != "WordLevel" or form["pre_tokenizer"]["pattern"]["Regex"] != _EACH_CHARACTER:
                return None
            made = cls(character for character in vocabulary if len(character) == 1)
            return made if json.loads(made.tokenizer_json()) == form else None
        except (KeyError, TypeError, AttributeError, DataError):
            return None


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`: GPT-2's BPE, or any tokenizer.json.

    Args:
        library: a `tokenizers.Tokenizer`.
        eos_token, bos_token: by name.

    Raises:
        ConfigError: no such token.
    """

    def __init__(self, library: Any, eos_token: str, bos_token: str) -> None:
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # in a document, their names are text like any other
        self._library = library
        for name in (eos_token, bos_token):
            if library.token_to_id(name) is None:
                raise ConfigError("the tokenizer", found=f"no token {name!r}", expected="one, as its config says")
        self.eos_token_id, self.bos_token_id = library.token_to_id(eos_token), library.token_to_id(bos_token)
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        form = json.loads(library.to_str())
        self._special = frozenset(token["id"] for token in form["added_tokens"] if token["special"])
        self._added = frozenset(token["id"] for token in form["added_tokens"])
        before = form["pre_tokenizer"] or {}
        self.byte_level = (form["decoder"] or {}).get("type") == "ByteLevel"
        """Whether a token is a run of bytes, as GPT-2's are."""
        self._cut_at_spaces = (
            before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
            and form["normalizer"] is None and self._added <= self._special
        )  # fmt: skip

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library's own are plain Exceptions
            raise DataError("text", found=f"what the tokenizer refuses ({first_line(error)})") from error
        return [np.array(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        self._require_ids(ids)
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token(self, index: int) -> str:
        self._require_ids([index])
        if self.byte_level and index not in self._added:
            return self.token_bytes(index).decode("utf-8", "replace")
        return str(self._library.id_to_token(index))

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer; none of a special one."""
        name = self._library.id_to_token(index)
        if name is None or index in self._special:
            return b""
        if index in self._added:
            return str(name).encode()
        return bytes(_byte_alphabet()[character] for character in name)

    def last_cut(self, text: str) -> int:
        # GPT-2 splits before a lone space whatever stands around it, and looks past no such place.
        place = text.rfind(" ", 1, -1) if self._cut_at_spaces else -1
        while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
            place = text.rfind(" ", 1, place)
        return max(place, 0)

    def stream(self) -> TokenStream:
        return _Bytes(self) if self.byte_level else _Decoded(self)

    def tokenizer_json(self) -> str:
        return str(self._library.to_str(pretty=True))


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Characters that stand for bytes in byte-level vocabularies: printable Latin-1 for itself, the rest from U+0100 on
    in order (GPT-2, Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


class _Direct(TokenStream):
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def add(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def finish(self) -> str:
        return ""


class _Bytes(TokenStream):
    """Byte-level tokens are bytes: an incremental UTF-8 decoder is exact, broken sequences included."""

    def __init__(self, tokenizer: SubwordTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Decoded(TokenStream):
    """Decodes behind the last tokens that were shown, so that what a token looks like after others is seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        self._waiting += ids
        before = self._tokenizer.decode(self._shown)
        now = self._tokenizer.decode(self._shown + self._waiting)
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._shown, self._waiting = self._waiting, []
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._tokenizer.decode(self._shown), self._tokenizer.decode(self._shown + self._waiting)
        self._shown, self._waiting = self._shown + self._waiting, []
        return now[len(before) :]


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int, saved: Tokenizer | None = None) -> None:
    """Refuse a tokenizer whose ids mean something else to a model than those it was trained on.

    Args:
        tokenizer: about to be used.
        vocab_size: of the model.
        saved: the tokenizer that lies beside the model, if one does.

    Raises:
        ConfigError: another number of tokens, or another token behind an id: the first is named.
    """
    fix = "use the tokenizer that was saved with the model (data.tokenizer=MODEL/tokenizer)"
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            "the tokenizer", found=f"{tokenizer.vocab_size} tokens", expected=f"{vocab_size}, as the model has", fix=fix
        )
    if saved is None or saved.fingerprint == tokenizer.fingerprint:
        return
    for index in range(min(saved.vocab_size, vocab_size)):
        ours, theirs = tokenizer.token(index), saved.token(index)
        if ours != theirs:
            raise ConfigError("the tokenizer", found=f"{ours!r} as token {index}", expected=repr(theirs), fix=fix)
    raise ConfigError(
        "the tokenizer", found="the same tokens with other rules, EOS or BOS", expected="the model's own", fix=fix
    )
