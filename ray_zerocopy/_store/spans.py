"""The ranges of a node's object store that processes have mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from .._pages.markers import StoredObject, parse_mark
from .._pages.regions import Region, regions
from .host import object_locations
from .ref import ModelRef

__all__ = ["Span", "count_processes", "covers", "model_spans", "span_of"]

# Bytes [begin, end) of the file (device, inode) behind an object store.
Span = tuple[int, int, int, int]


def covers(span: Span, others: Iterable[Span]) -> bool:
    """Tell whether a span contains another one. Overlap is not enough: a view of whole pages touches others."""
    return any(span[:2] == o[:2] and span[2] <= o[2] and o[3] <= span[3] for o in others)


def span_of(stored: StoredObject) -> Span:
    device, inode, offset = stored.location
    if not inode:  # the process could not tell: use a separate place for each object
        device, inode = 0, int(stored.object_id or "0", 16)
    return device, inode, offset, offset + stored.nbytes


def model_spans(everything: Iterable[Region], known: Mapping[str, Span]) -> tuple[list[Span], list[Span]]:
    """Return the parts of the store that a process has as private views, and those that it has without isolation.

    Args:
        everything: The regions of the process.
        known: The places of objects by id, for marks that do not give a place.
    """
    everything = list(everything)
    stores = {(r.device, r.inode) for r in everything if r.shared and "plasma" in os.path.basename(r.name)}
    views = {
        (r.device, r.inode, r.offset, r.offset + r.end - r.start)
        for r in everything
        if not r.shared and (r.device, r.inode) in stores
    }
    marks = [mark for mark in (parse_mark(r.name) for r in everything) if mark is not None]
    return sorted(views), sorted({known.get(mark.object_id) or span_of(mark) for mark in marks})


def count_processes(handles: list[ModelRef]) -> list[int]:
    """Return how many processes of this node have each model mapped."""
    wanted = [{stored.object_id: span_of(stored) for stored in object_locations(handle)} for handle in handles]
    counts = [0] * len(handles)
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not entry.isdigit():
            continue
        try:
            found = list(regions(entry))
        except OSError:  # the process ended, or is another user's
            continue
        for number, places in enumerate(wanted):
            counts[number] += any(
                covers(span, places.values()) for part in model_spans(found, places) for span in part
            )
    return counts
