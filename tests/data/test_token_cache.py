"""Tokenised text: made once, the same after any interruption, and made anew when it is damaged."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acdit.codecs import CharacterTokenizer, Tokenizer
from acdit.data import token_cache as module
from acdit.data.bad_files import BadFiles
from acdit.data.text_files import TextFiles
from acdit.data.token_cache import Tokens, cached, default_cache, in_memory
from acdit.errors import DataError, StorageError

LINES = [f"{number} " + "bee " * (number % 7) + "é" for number in range(60)]
TOKENIZER = CharacterTokenizer("\n".join(LINES))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextFiles:
    """Documents a line; tokenised in runs of some 40 characters, safe on disk after every 100."""
    monkeypatch.setattr(module, "_AT_ONCE", 40)
    monkeypatch.setattr(module, "_PIECE", 7)
    monkeypatch.setattr(module, "_COMMIT_EVERY", 100)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    return TextFiles(str(tmp_path / "text.txt"), document="line")


def brute_force(tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return [index for line in LINES for index in [*tokenizer.encode(line), tokenizer.eos_token_id]]


def make(source: TextFiles, cache: Path, limit: int = 0, tokenizer: Tokenizer = TOKENIZER) -> tuple[Path, Tokens]:
    return cached(source, tokenizer, cache, BadFiles(limit, what="text"))


def test_the_row_is_every_document_and_eos(source: TextFiles, tmp_path: Path) -> None:
    file, counted = make(source, tmp_path / "cache")
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()
    text = "".join(LINES)
    assert counted == Tokens(len(LINES), len(brute_force()), len(text), len(text.encode()))
    row, in_memory_counted = in_memory(source, TOKENIZER, BadFiles(0))
    assert (row.tolist(), in_memory_counted) == (brute_force(), counted)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.parent.name]  # nothing else is left


def test_a_large_vocabulary_takes_four_bytes(source: TextFiles, tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer([chr(point) for point in range(32, 0x12000) if not 0xD800 <= point < 0xE000])
    assert tokenizer.vocab_size > 1 << 16
    file, _ = make(source, tmp_path / "cache", tokenizer=tokenizer)
    assert np.fromfile(file, dtype="<u4").tolist() == brute_force(tokenizer)


def test_it_is_made_once(source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(source, tmp_path / "cache")
    monkeypatch.setattr(module, "tokenize", None)
    assert make(source, tmp_path / "cache") == first


def test_other_text_or_another_tokenizer_has_a_file_of_its_own(source: TextFiles, tmp_path: Path) -> None:
    first, _ = make(source, tmp_path / "cache")
    other, _ = make(source, tmp_path / "cache", tokenizer=CharacterTokenizer("\n".join(LINES) + "ü"))
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n")
    changed, _ = make(source, tmp_path / "cache")
    assert len({first, other, changed}) == 3


class Stopped(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, act: Any) -> list[int]:
    """Act before the so-many-th run of ids is written; how many characters each call of `tokenize` made."""
    made: list[int] = []
    tokenize = module.tokenize

    def watched(*arguments: Any) -> Iterator[Any]:
        made.append(0)
        for number, run in enumerate(tokenize(*arguments)):
            if number == after and len(made) == 1:
                act()
            made[-1] += run[1].characters
            yield run

    monkeypatch.setattr(module, "tokenize", watched)
    return made


@pytest.mark.parametrize("after", range(0, 16, 3))
def test_after_an_interruption_the_work_goes_on_and_ends_with_the_same_bytes(
    source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    def stop() -> None:
        raise Stopped

    made = interrupt(monkeypatch, after, stop)
    with pytest.raises(Stopped):
        make(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/info.json"))
    file, counted = make(source, tmp_path / "cache")
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()
    assert (counted.tokens, counted.documents) == (len(brute_force()), len(LINES))
    safe = counted.characters - made[1]
    assert made[0] - 200 < safe <= made[0]  # at most a part is made again
    assert safe > 0 or after < 3


def test_after_a_kill_too(source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        interrupt(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        make(source, tmp_path / "cache")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    made = interrupt(monkeypatch, 99, None)
    file, counted = make(source, tmp_path / "cache")
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()
    assert made[0] < counted.characters / 2 + 100


@pytest.mark.parametrize("damage", ["flipped", "short", "no journal", "journal cut off", "no tokens"])
def test_a_damaged_half_is_not_gone_on_from(
    source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def spoil() -> None:
        (tokens,), (progress,) = (tmp_path.glob(f"cache/*.making/{name}") for name in ("tokens.bin", "progress.json"))
        content = bytearray(tokens.read_bytes())
        if damage == "flipped":
            content[5] ^= 1
            tokens.write_bytes(content)
        elif damage == "short":
            tokens.write_bytes(content[:9])
        elif damage == "no tokens":
            tokens.unlink()
        elif damage == "no journal":
            progress.unlink()
        else:
            progress.write_text(progress.read_text()[:50])
        raise Stopped

    made = interrupt(monkeypatch, 12, spoil)
    with pytest.raises(Stopped):
        make(source, tmp_path / "cache")
    file, counted = make(source, tmp_path / "cache")
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()
    assert made[1] == counted.characters


@pytest.mark.parametrize("name", ["tokens.bin", "info.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone"])
def test_a_damaged_file_is_made_anew_with_a_warning(
    source: TextFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    file, counted = make(source, tmp_path / "cache")
    damaged = file.with_name(name)
    content = bytearray(damaged.read_bytes())
    if damage == "gone":
        damaged.unlink()
    else:
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content if damage == "flipped" else content[:-3])
    if (name, damage) == ("manifest.json", "gone"):  # then it is nothing of ours
        with pytest.raises(StorageError, match="a directory with other things in it"):
            make(source, tmp_path / "cache")
        return
    assert make(source, tmp_path / "cache") == (file, counted)
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()
    assert "tokenised text is damaged and made anew" in caplog.text


def test_a_large_file_is_checked_in_size(
    source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "VERIFIED_UP_TO", 10)
    file, _ = make(source, tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:-2])
    make(source, tmp_path / "cache")
    assert "damaged" in caplog.text
    assert np.fromfile(file, dtype="<u2").tolist() == brute_force()


def test_two_at_a_time_make_it_once(source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go = threading.Event(), threading.Event()

    def pause() -> None:
        entered.set()
        assert go.wait(10)

    made = interrupt(monkeypatch, 3, pause)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(make(source, tmp_path / "cache"))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()  # it waits
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert found[0] == found[1]


def test_files_that_change_meanwhile_are_noticed(
    source: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3, lambda: (tmp_path / "text.txt").write_text("\n".join(LINES) + "\nbee"))
    with pytest.raises(DataError, match="files that changed while they were read"):
        make(source, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]


def test_bad_lines_are_remembered(source: TextFiles, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("\n".join(LINES).encode() + b"\n\xff\n\xfe")
    with pytest.raises(DataError, match="line 61; found a bad text"):
        make(source, tmp_path / "cache")
    _, counted = make(source, tmp_path / "cache", limit=2)
    assert list(counted.bad_files.values()) == [f"no UTF-8: byte 0x{byte} at byte {at}" for byte, at in bad_places()]
    assert make(source, tmp_path / "cache", limit=2)[1] == counted
    with pytest.raises(DataError, match=r"line 62; found a bad text .* number 2 of this run"):
        make(source, tmp_path / "cache", limit=1)


def bad_places() -> list[tuple[str, int]]:
    start = len("\n".join(LINES).encode()) + 1
    return [("ff", start), ("fe", start + 2)]


def test_an_unknown_character_is_named_with_the_data(source: TextFiles, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root .*text\.txt; found the character 'b' \(U\+0062\)"):
        make(source, tmp_path / "cache", tokenizer=CharacterTokenizer("0123456789 é"))


def test_a_place_that_cannot_be_written_is_named(source: TextFiles, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="cache"):
        make(source, tmp_path / "cache")


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/acdit/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/acdit/tokens"
