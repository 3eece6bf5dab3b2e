"""A batch's draws lie in one piece of memory, and reach a card in one copy.

Without a card the order of what is asked of it is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.small_files import settings_for, write_file
from vitds.batch import CropBatch, Draws, Masks, Mixing, Targets, each_tensor
from vitds.data import executor
from vitds.data.loader import TrainLoader
from vitds.data.sheet import ALIGNMENT, HostMemory, copied_ahead, from_copy, on_sheet

CPU = torch.device("cpu")


def draws(first: int = 0, rows: int = 5) -> Draws:
    """Every number another one, and a size that no alignment divides."""
    number = torch.arange(first, first + rows)
    half = number / 2
    return Draws(
        Mixing("cutmix", number, number + 10 * torch.arange(4)[:, None], half),
        Targets(number + 1, number + 2, half, half + 1, number + 3, groups=2),
        Masks((half + 2, half + 3), (torch.arange(first, first + 3 * rows).view(rows, 3),)),
    )


def tensors(record: Draws) -> list[Tensor]:
    found = []
    each_tensor(record, lambda tensor: found.append(tensor) or tensor)
    return found


def assert_same(ours: Draws, theirs: Draws) -> None:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert len(pairs) == 3 + 5 + 3
    for one, other in pairs:
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert (ours.mixing.kind, ours.targets.groups) == (theirs.mixing.kind, theirs.targets.groups)


def test_a_sheet_holds_all_draws_one_after_the_other() -> None:
    packed, sheet = on_sheet(draws(), HostMemory(is_pinned=False))
    assert_same(packed, draws())
    first, last = sheet.data_ptr(), sheet.data_ptr() + len(sheet)
    places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors(packed)]
    assert all(first <= start < stop <= last and start % ALIGNMENT == 0 for start, stop in places)
    assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:], strict=False))


def test_a_copy_of_the_sheet_is_a_copy_of_the_draws() -> None:
    packed, sheet = on_sheet(draws(), HostMemory(is_pinned=False))
    copy = sheet.clone()
    there = from_copy(packed, copy)
    sheet.zero_()  # as the next batch's
    assert_same(there, draws())
    assert all(tensor.untyped_storage().data_ptr() == copy.data_ptr() for tensor in tensors(there))


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_for_sheets_that_cannot_be_pinned_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(is_pinned=True)
    with caplog.at_level(logging.WARNING):
        assert [len(memory(size)) for size in (100, 200)] == [100, 200]
    (line,) = caplog.messages
    assert line.startswith("memory for a batch's draws, or a step's numbers, could not be pinned, so")


class Card:
    """Streams and events that note what is asked of them; copies happen at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.events = 0
        self.on = self.current = Stream(self, "current")
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.switched)
        copy = Tensor.copy_
        monkeypatch.setattr(
            Tensor, "copy_", lambda *args, **kwargs: self.note_copy() or copy(*args, **kwargs)
        )

    def note_copy(self) -> None:
        self.asked.append(("copy", self.on.name))

    @contextmanager
    def switched(self, stream: Stream) -> Iterator[None]:
        self.on = stream
        yield
        self.on = self.current


class Stream:
    __class__ = torch.cuda.Stream  # for the check of types; a real one needs a card

    def __init__(self, card: Card, name: str) -> None:
        self.card, self.name = card, name

    def wait_event(self, event: Event) -> None:
        self.card.asked.append(("wait", self.name, event.name))

    def wait_stream(self, other: Stream) -> None:
        self.card.asked.append(("wait", self.name, other.name))


class Event:
    def __init__(self, card: Card) -> None:
        self.card, self.name = card, f"done {card.events}"
        card.events += 1

    def record(self) -> None:
        self.card.asked.append(("record", self.card.on.name, self.name))


def batches(count: int) -> Iterator[CropBatch]:
    for number in range(count):
        packed, sheet = on_sheet(draws(number), HostMemory(is_pinned=False))
        crops = torch.full((2, 1, 3, 4, 4), number, dtype=torch.uint8)
        index = torch.arange(2)
        yield CropBatch(crops, index, index, index >= 0, 0, number, 0, 2, packed, sheet)


def test_batches_are_copied_into_two_pieces_of_memory_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list(batches(5))
    card = Card(monkeypatch)
    places = []
    for number, batch in enumerate(copied_ahead(iter(made), CPU, Stream(card, "copies"))):
        with monkeypatch.context() as plain:  # the copies of the comparison are not the card's
            plain.setattr(card, "note_copy", lambda: None)
            assert_same(batch.draws, draws(number))
            assert torch.all(batch.crops == number)
        places.append((batch.crops.data_ptr(), batch.sheet.data_ptr()))
        # Nothing of it lies where the loader's own batch does.
        assert batch.crops.data_ptr() != made[number].crops.data_ptr()
        card.asked.append(("step", number))
    assert places == [places[0], places[1]] * 2 + [places[0]] and not set(places[0]) & set(places[1])
    expected = []
    for number in range(5):
        own = f"done {number % 2}"
        # New memory may have been another tensor's.
        expected += [("record", "current", own)] if number < 2 else []
        expected += [("wait", "copies", own), ("copy", "copies"), ("copy", "copies")]
        expected += [("wait", "current", "copies"), ("step", number), ("record", "current", own)]
    assert card.asked == expected


def test_a_slot_of_the_ring_is_written_again_when_the_stream_that_copies_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, waited_for = [], []

    class OfSlot:
        def record(self, stream: object) -> None:
            recorded.append((self, stream))

        def synchronize(self) -> None:
            waited_for.append(self)

    loader = TrainLoader(
        write_file(tmp_path / "x.beton", images=4), settings_for(), rank=0, ranks=1, micro_images=2
    )
    loader._loader.copied_on = "copies"
    monkeypatch.setattr(executor, "IS_CUDA", True)  # there is no card here
    monkeypatch.setattr(executor, "on_device_of_this_thread", lambda: lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", OfSlot)
    assert len(list(loader.batches(0, 6))) == 12
    # Every batch is followed by an event on that stream, and the ring's four slots are written anew eight
    # times.
    assert len(recorded) == 12 and {stream for _, stream in recorded} == {"copies"}
    assert waited_for == [event for event, _ in recorded[:8]]
