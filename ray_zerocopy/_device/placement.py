"""Where each storage of a layout lies in a device's allocations. Knows torch, no store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._model.layout import ALIGNMENT, PACKED_BELOW, Layout, align, storages_in_order

__all__ = ["Block", "Placement", "Span", "place_storages"]


# A storage that would be a buffer by itself begins at a multiple of this on a device, as torch's own allocations do.
DEVICE_ALIGNMENT = 512


class Span(NamedTuple):
    """Bytes to bring to a device: where they go and how many there, and the buffer and offset that they come from.

    `cast` has the dtype that they have and the one that they get, where these differ.
    """

    place: int
    nbytes: int
    buffer: int
    offset: int
    cast: tuple[torch.dtype, torch.dtype] | None


class Block(NamedTuple):
    """An allocation on a device for storages whose order there is given: the place of each in it, by its number."""

    nbytes: int
    places: dict[int, int]


class Placement(NamedTuple):
    """Where the storages of a layout lie on a device, on one line of places.

    The first `nbytes` places are one allocation, the arena; each block is another, and begins at the place that
    `blocks` has for it. `storages` has place and bytes of each storage, `spans` what to copy, by place.
    """

    nbytes: int
    storages: list[tuple[int, int]]
    spans: list[Span]
    blocks: list[int]


def place_storages(
    layout: Layout, changed: dict[int, torch.dtype], dtype: torch.dtype | None, blocks: Sequence[Block] = ()
) -> Placement:
    """Place the storages of a layout, those of `changed` as `dtype`; what overlaps stays together.

    The storages of `blocks` go there, all others into one arena. No place within `DEVICE_ALIGNMENT` of a block's
    first or last one is another's, so that no copy reaches over.
    """
    places = [(0, 0)] * len(layout.storages)
    spans: list[Span] = []

    def as_copied(number: int, nbytes: int) -> tuple[int, tuple[torch.dtype, torch.dtype] | None]:
        if number not in changed or dtype is None:
            return nbytes, None
        return nbytes // changed[number].itemsize * dtype.itemsize, (changed[number], dtype)

    elsewhere = {number for block in blocks for number in block.places}
    order = [(piece, number) for piece, number in storages_in_order(layout.storages) if number not in elsewhere]
    known, reached = -1, 0  # the buffer that was met last, and how far
    first = end = start = 0  # a span that others may still join: place, place of its end, offset in the buffer
    shift, cast = 0, None
    for i, ((buffer, offset, nbytes), number) in enumerate(order):
        size, own_cast = as_copied(number, nbytes)
        joins = buffer == known and cast is own_cast is None
        if buffer != known or offset >= reached:
            # Elements of what overlaps stay aligned together, as in the store.
            overlapped = i + 1 < len(order) and order[i + 1][0][:2] < (buffer, offset + nbytes)
            alignment = DEVICE_ALIGNMENT if nbytes >= PACKED_BELOW else ALIGNMENT
            place = align(end, alignment) + (offset % 16 if overlapped else 0)
            joins = joins and place - offset == shift
            shift, reached = place - offset, offset
        place = offset + shift
        places[number] = (place, size)
        if not joins:
            if end > first:
                spans.append(Span(first, end - first, known, start, cast))
            first, start, cast, known = place, offset, own_cast, buffer
        end = max(end, place + size)
        reached = max(reached, offset + nbytes)
    if end > first:
        spans.append(Span(first, end - first, known, start, cast))

    nbytes_of_arena, begins = end, []
    for block in blocks:
        begins.append(align(end, DEVICE_ALIGNMENT) + DEVICE_ALIGNMENT)
        end = begins[-1] + block.nbytes
        for number, place in sorted(block.places.items(), key=lambda item: item[1]):
            buffer, offset, nbytes = layout.storages[number]
            size, own_cast = as_copied(number, nbytes)
            places[number] = (begins[-1] + place, size)
            spans.append(Span(begins[-1] + place, size, buffer, offset, own_cast))
    return Placement(nbytes_of_arena, places, spans, begins)
