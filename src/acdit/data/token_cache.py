"""Tokenised text, made once: all documents, each with EOS behind it, as one row of ids in a file that is mapped.

    <cache>/<name>-<key>/tokens.bin     uint16, or uint32 where the vocabulary needs it
                         info.json      whose text by whose tokenizer, how many documents, tokens, characters, bytes
                         manifest.json  sha256 of both: the commit marker

The key is of the tokenizer and of what the documents are; lengths of sequences and how they are wrapped are no part of
it: one file serves all. It is made in a folder beside (<…>.making) that tells after every part what is safe on disk;
after a kill the same work goes on from there and ends with the same bytes. Processes that want it at the same time wait
for the one that makes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acdit.codecs.text import Tokenizer
from acdit.data.bad_files import BadFiles
from acdit.data.documents import Cut, Documents
from acdit.errors import DataError, StorageError
from acdit.storage import RunLock, atomic_directory, explained, is_committed, verify, write_json_atomic

logger = logging.getLogger(__name__)

FORMAT = 1
TOKENS, INFO, _PROGRESS = "tokens.bin", "info.json", "progress.json"
VERIFIED_UP_TO = 1 << 28
"""Bytes up to which a file is checked against its sha256 whenever it is opened; larger ones only in size."""
_AT_ONCE = 1 << 20  # characters that are tokenised together
_PIECE = 1 << 16  # characters of a long document that a thread of the library takes
_COMMIT_EVERY = 1 << 24  # characters between two parts that are safe on disk


@dataclass
class Tokens:
    """What was made of the documents."""

    documents: int = 0
    tokens: int = 0
    """EOS of every document included."""
    characters: int = 0
    bytes: int = 0
    """Of the text in UTF-8."""
    bad_files: dict[str, str] = field(default_factory=dict)


def default_cache() -> Path:
    """Where tokenised text lies if the recipe does not say (data.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "acdit" / "tokens"


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def tokenize(
    documents: Documents, tokenizer: Tokenizer, bad: BadFiles, place: Any = None
) -> Iterator[tuple[np.ndarray, Tokens, Any]]:
    """Ids of all documents with EOS behind each, in runs of about a million characters.

    Yields:
        (ids, what was counted in them, the place behind them).
    """
    texts: list[str] = []
    ends: list[int] = []  # after how many texts a document ends
    waiting = 0
    for piece in documents.pieces(tokenizer.last_cut, bad, place):
        texts += _cut_small(piece.text, tokenizer.last_cut)
        waiting += len(piece.text)
        place = piece.place
        if piece.ends:
            ends.append(len(texts))
        if waiting >= _AT_ONCE:
            yield _encoded(documents, tokenizer, texts, ends), _counted(texts, ends), place
            texts, ends, waiting = [], [], 0
    if ends or texts:
        yield _encoded(documents, tokenizer, texts, ends), _counted(texts, ends), place


def _encoded(documents: Documents, tokenizer: Tokenizer, texts: list[str], ends: list[int]) -> np.ndarray:
    try:
        found = tokenizer.encode_batch(texts)
    except DataError as error:
        raise DataError(documents.where, found=error.found, expected=error.expected, fix=error.fix) from None
    end = np.array([tokenizer.eos_token_id])
    for count in reversed(ends):
        found.insert(count, end)
    return np.concatenate(found or [end[:0]]).astype(token_dtype(tokenizer))


def _counted(texts: list[str], ends: list[int]) -> Tokens:
    return Tokens(
        documents=len(ends), characters=sum(map(len, texts)),
        bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
    )  # fmt: skip


def _cut_small(text: str, cut: Cut) -> list[str]:
    parts, start = [], 0
    while len(text) - start > _PIECE and (place := cut(text[start : start + _PIECE])):
        parts.append(text[start : start + place])
        start += place
    return [*parts, text[start:]]


def in_memory(documents: Documents, tokenizer: Tokenizer, bad: BadFiles) -> tuple[np.ndarray, Tokens]:
    """Tokenise a small text without a file."""
    total, runs = Tokens(), []
    for ids, counted, _ in tokenize(documents, tokenizer, bad):
        _add(total, counted, ids)
        runs.append(ids)
    return np.concatenate(runs or [np.empty(0, token_dtype(tokenizer))]), total


def cached(documents: Documents, tokenizer: Tokenizer, cache: Path, bad: BadFiles) -> tuple[Path, Tokens]:
    """The file of tokens, made if it is not there yet.

    Args:
        documents: of one split.
        tokenizer: whose ids.
        cache: the folder in which all such files lie, each in its own.
        bad: counts what could not be read, now or when the file was made.

    Returns:
        Its path, and what it holds.

    Raises:
        DataError: more bad files than allowed, an unknown character, documents that change meanwhile.
        StorageError: no room, or no place to write.
    """
    identity = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "documents": documents.identity()}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", documents.where.rpartition("/")[2])[:40].strip("-.")
    folder = cache / f"{name}-{key[:16]}"
    found = _opened(folder, tokenizer)
    if found is None:
        making = folder.with_name(f"{folder.name}.making")
        try:
            with RunLock(making, wait=True):
                found = _opened(folder, tokenizer)  # another process made it
                if found is None:
                    found = _make(documents, tokenizer, folder, making, identity, bad)
            shutil.rmtree(making, ignore_errors=True)
        except OSError as error:
            raise explained(error) from error
    for file, reason in found.bad_files.items():
        bad.add(file, reason)
    return folder / TOKENS, found


def _opened(folder: Path, tokenizer: Tokenizer) -> Tokens | None:
    """What a finished file holds; None: there is none, or a damaged one, which is made anew."""
    if not is_committed(folder):
        return None
    try:
        size = (folder / TOKENS).stat().st_size
        if size <= VERIFIED_UP_TO:
            verify(folder)
        found = Tokens(**json.loads((folder / INFO).read_text(encoding="utf-8"))["tokens"])
        if size != found.tokens * token_dtype(tokenizer).itemsize:
            raise StorageError(str(folder / TOKENS), found=f"{size:,} bytes", expected=f"{found.tokens:,} tokens")
    except (StorageError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("tokenised text is damaged and made anew: %s", error)
        return None
    return found


def _make(
    documents: Documents, tokenizer: Tokenizer, folder: Path, making: Path, identity: Any, bad: BadFiles
) -> Tokens:
    total, place, segments = _resumed(making, identity, bad)
    logger.info("tokenizing %s%s", documents.where, f", from token {total.tokens:,} on" if total.tokens else "")
    with (making / TOKENS).open("ab") as file:
        digest, size, characters = hashlib.sha256(), 0, 0

        def commit(place: Any) -> None:
            file.flush()
            os.fsync(file.fileno())
            segments.append([size, digest.hexdigest()])
            total.bad_files = dict(bad.reasons)
            progress = {"identity": identity, "place": place, "segments": segments, "tokens": asdict(total)}
            write_json_atomic(making / _PROGRESS, progress)

        for ids, counted, behind in tokenize(documents, tokenizer, bad, place):
            data = ids.tobytes()
            file.write(data)
            digest.update(data)
            size += len(data)
            _add(total, counted, ids)
            characters += counted.characters
            if characters >= _COMMIT_EVERY:
                commit(behind)
                digest, size, characters = hashlib.sha256(), 0, 0
    if documents.identity() != identity["documents"]:
        (making / _PROGRESS).unlink(missing_ok=True)  # nothing of it can be used
        (making / TOKENS).unlink()
        raise DataError(documents.where, found="files that changed while they were read", expected="files at rest")
    total.bad_files = dict(bad.reasons)
    with atomic_directory(folder) as temporary:
        _link(making / TOKENS, temporary / TOKENS)
        info = {"identity": identity, "tokens": asdict(total)}
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return total


def _resumed(making: Path, identity: Any, bad: BadFiles) -> tuple[Tokens, Any, list[list[Any]]]:
    """(what is safe on disk, the place behind it, its segments); everything behind it is cut off."""
    file = making / TOKENS
    try:
        progress = json.loads((making / _PROGRESS).read_text(encoding="utf-8"))
        if progress["identity"] != identity:
            raise ValueError("of other text")
        with file.open("r+b") as stream:
            for size, digest in progress["segments"]:
                if _digest(stream, size) != digest:
                    raise ValueError("changed tokens")
            stream.truncate(sum(size for size, _ in progress["segments"]))
        total = Tokens(**progress["tokens"])
        for name, reason in total.bad_files.items():
            bad.add(name, reason)
        return total, progress["place"], progress["segments"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        file.unlink(missing_ok=True)
        return Tokens(), None, []


def _digest(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size and (chunk := stream.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _link(made: Path, place: Path) -> None:
    try:
        os.link(made, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(made, place)


def _add(total: Tokens, counted: Tokens, ids: np.ndarray) -> None:
    total.documents += counted.documents
    total.characters += counted.characters
    total.bytes += counted.bytes
    total.tokens += len(ids)
