"""Decide where each storage of a layout lies in a device's allocations. Imports torch, not the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._model.layout import ALIGNMENT, PACKED_BELOW, Layout, align, storages_in_order

__all__ = ["Block", "Placement", "Span", "place_storages"]


# The alignment of large storages on a device; torch's allocations have the same.
DEVICE_ALIGNMENT = 512


class Span(NamedTuple):
    """Bytes to copy to a device.

    Attributes:
        place: Where they go.
        nbytes: How many bytes they take there.
        buffer: The number of the buffer that has them.
        offset: Where they begin in that buffer.
        cast: Their present dtype and the dtype on the device, or None if both are equal.
    """

    place: int
    nbytes: int
    buffer: int
    offset: int
    cast: tuple[torch.dtype, torch.dtype] | None


class Block(NamedTuple):
    """An allocation on a device for storages in a fixed order; `places` has the offset of each storage by number."""

    nbytes: int
    places: dict[int, int]


class Placement(NamedTuple):
    """Where the storages of a layout lie on a device. All allocations share one numbering of places.

    Attributes:
        nbytes: The length of the first allocation, the arena. It has the places from 0 to `nbytes`.
        storages: Place and length of each storage.
        spans: What to copy, ordered by place.
        blocks: The place at which each block begins; see `Block`.
    """

    nbytes: int
    storages: list[tuple[int, int]]
    spans: list[Span]
    blocks: list[int]


def place_storages(
    layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None, blocks: Sequence[Block] = ()
) -> Placement:
    """Give each storage of a layout a place: in its block, or else in the arena.

    Storages that overlap in the store overlap on the device too. Those in `changed` have the length that they have in
    `dtype`. A gap of `DEVICE_ALIGNMENT` lies between two allocations, so that no copy crosses from one to the other.
    """
    places = [(0, 0)] * len(layout.storages)
    spans: list[Span] = []

    def size_and_cast(number: int, nbytes: int) -> tuple[int, tuple[torch.dtype, torch.dtype] | None]:
        if number not in changed or dtype is None:
            return nbytes, None
        return nbytes // changed[number].itemsize * dtype.itemsize, (changed[number], dtype)

    in_blocks = {number for block in blocks for number in block.places}
    order = [(piece, number) for piece, number in storages_in_order(layout.storages) if number not in in_blocks]
    previous, reached = -1, 0  # the last storage's buffer, and the end of what is placed of that buffer
    first = end = start = 0  # the open span: its first place, its end, its offset in the buffer
    shift, cast = 0, None
    for i, ((buffer, offset, nbytes), number) in enumerate(order):
        size, this_cast = size_and_cast(number, nbytes)
        joins = buffer == previous and cast is this_cast is None
        if buffer != previous or offset >= reached:
            # Overlapping storages keep their distance from each other, and with it the alignment of their elements.
            overlapped = i + 1 < len(order) and order[i + 1][0][:2] < (buffer, offset + nbytes)
            alignment = DEVICE_ALIGNMENT if nbytes >= PACKED_BELOW else ALIGNMENT
            place = align(end, alignment) + (offset % 16 if overlapped else 0)
            joins = joins and place - offset == shift
            shift, reached = place - offset, offset
        place = offset + shift
        places[number] = (place, size)
        if not joins:
            if end > first:
                spans.append(Span(first, end - first, previous, start, cast))
            first, start, cast, previous = place, offset, this_cast, buffer
        end = max(end, place + size)
        reached = max(reached, offset + nbytes)
    if end > first:
        spans.append(Span(first, end - first, previous, start, cast))

    nbytes_of_arena, begins = end, []
    for block in blocks:
        begins.append(align(end, DEVICE_ALIGNMENT) + DEVICE_ALIGNMENT)
        end = begins[-1] + block.nbytes
        for number, place in sorted(block.places.items(), key=lambda item: item[1]):
            buffer, offset, nbytes = layout.storages[number]
            size, this_cast = size_and_cast(number, nbytes)
            places[number] = (begins[-1] + place, size)
            spans.append(Span(begins[-1] + place, size, buffer, offset, this_cast))
    return Placement(nbytes_of_arena, places, spans, begins)
