"""The order of a stream: every row once an epoch, the same whoever asks, and the same after a resumption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acdit.data.stream_order import StreamOrder
from acdit.errors import DataError, StorageError


class Part:
    """Numbers of one part; counts what was read."""

    def __init__(self, rows: list[int], read: list[int]) -> None:
        self._all, self._read, self._at = rows, read, 0

    def __iter__(self) -> Iterator[int]:
        while self._at < len(self._all):
            self._at += 1
            self._read.append(self._all[self._at - 1])
            yield self._all[self._at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at = state_dict["at"]


def order(sizes: list[int], window: int, seed: int = 1, **options: Any) -> tuple[StreamOrder, list[int]]:
    read: list[int] = []

    def open_part(number: int) -> Part:
        first = sum(sizes[:number])
        return Part(list(range(first, first + sizes[number])), read)

    return StreamOrder(open_part, len(sizes), window, seed, **options), read


def values(one: StreamOrder, start: int, count: int) -> list[int]:
    return [row.value for row in one.rows(start, count)]


def test_every_row_comes_once_an_epoch_and_epochs_differ() -> None:
    one, _ = order([5, 0, 4, 3], window=6)  # two windows an epoch
    epochs = [values(one, start, 12) for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert values(order([5, 0, 4, 3], window=6, seed=2)[0], 0, 12) != epochs[0]


def test_a_window_of_one_keeps_the_streams_order_inside_a_part() -> None:
    found = values(order([4, 4], window=1)[0], 0, 8)
    assert found in ([*range(8)], [4, 5, 6, 7, 0, 1, 2, 3])


def test_rows_know_where_they_stand() -> None:
    one, _ = order([3, 2], window=4)
    found = {row.value: (row.part, row.number) for row in one.rows(0, 10)}
    assert found == {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1)}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    window=st.integers(1, 9), batch=st.integers(1, 7), step=st.integers(0, 6),
)  # fmt: skip
def test_a_resumed_order_is_the_uninterrupted_one(sizes: list[int], window: int, batch: int, step: int) -> None:
    whole, _ = order(sizes, window)
    expected = values(whole, 0, batch * 10)
    first, _ = order(sizes, window, history=batch)
    for done in range(step):
        assert values(first, done * batch, batch) == expected[done * batch : (done + 1) * batch]
    state = json.loads(json.dumps(first.state(step * batch)))
    resumed, _ = order(sizes, window, state=state)
    for done in range(step, 10):
        assert values(resumed, done * batch, batch) == expected[done * batch : (done + 1) * batch]


def test_a_resumption_reads_no_more_than_the_window_again() -> None:
    first, read = order([1000], window=8)
    values(first, 0, 500)
    assert len(read) <= 500 + 2 * 8
    resumed, read = order([1000], window=8, state=first.state(500))
    values(resumed, 500, 1)
    assert min(read) == 496
    assert len(read) <= 16


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_read_only_their_part_agree_with_one(world: int) -> None:
    whole, _ = order([5, 6], window=4)
    expected = [values(whole, start, 8) for start in range(0, 80, 8)]
    share = 8 // world
    for rank in range(world):
        own, _ = order([5, 6], window=4)
        for step in range(10):
            assert values(own, step * 8 + rank * share, share) == expected[step][rank * share : (rank + 1) * share]


def test_a_state_may_be_asked_before_and_after_what_was_read() -> None:
    """A loader is a batch ahead of training; the first process of many has not read the others' part of the batch."""
    one, _ = order([7, 6], window=2, history=16)
    expected = values(order([7, 6], window=2)[0], 0, 80)
    values(one, 40, 8)
    for position in (32, 48, 64):
        resumed, _ = order([7, 6], window=2, state=one.state(position))
        assert values(resumed, position, 8) == expected[position : position + 8]
    assert values(one, 72, 8) == expected[72:]


def test_looking_ahead_takes_nothing_away() -> None:
    one, _ = order([9], window=4)
    expected = values(order([9], window=4)[0], 0, 20)
    values(one, 0, 2)
    assert one.peek(13).value == expected[13]
    assert values(one, 2, 18) == expected[2:]


def test_an_empty_stream_is_refused_instead_of_read_for_ever() -> None:
    with pytest.raises(DataError, match="a stream without rows"):
        values(order([0, 0], window=4)[0], 0, 1)


def test_the_place_in_another_stream_is_refused() -> None:
    state = order([3, 3], window=4)[0].state(0)
    with pytest.raises(StorageError, match=r"2 parts and a window of 4; expected 3 and 4"):
        order([3, 3, 3], window=4, state=state)
