"""The sizes of micro-batches: a number of rows, a budget of tokens, or the fastest of several.

Note [Size of a micro-batch]

The size is counted in tokens: rows times the longest length among them. Without `sort_by` each row has length 1, so
that tokens are rows. One rule then covers all options, and the size that fits into a device's memory as well::

    rows = min(micro_batch_size, micro_batch_tokens / longest, tokens that fit / longest), at least 1

A part of a sorted batch also ends where more rows would make padding more than `MOST_PADDING` of its tokens, but not
before `SMALLEST_PART` rows, because the model is slow with fewer. So a batch of a thousand rows needs little padding
with any budget.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import log
from .lengths import Lengths

__all__ = ["PartSizes", "SizeTrial"]

SMALLEST_TRIAL, LARGEST_TRIAL = 8, 256  # rows of the median length
LARGEST_TRIAL_CUDA = 1024
# A batch with fewer rows does not start a trial: the parts of a trial would all be small.
ROWS_OF_A_TRIAL, ROWS_WITHOUT_A_TRIAL = 64, 32
# A batch whose median length is this many times that of the trial's batch starts another trial.
MUCH_LONGER = 4
MOST_PADDING, SMALLEST_PART = 0.08, 8
CLEARLY_FASTER = 1.02  # a larger size must be this much faster, since it needs more memory


class PartSizes:
    """Cuts batches into micro-batches. Remembers what fitted into the device's memory, and which size was fastest.

    Args:
        name: How log lines call the predictor.
        cuda: Whether the model is on a CUDA device.
        few_shapes: Whether budgets give numbers of rows that are powers of two, for compiled models and GPUs.
    """

    def __init__(self, name: str, *, cuda: bool, few_shapes: bool) -> None:
        self._name = name
        self._cuda = cuda
        self._few_shapes = few_shapes
        self._trial: SizeTrial | None = None
        self._warned_of_longer = False
        self._tokens_done = 0.0
        # How many tokens fit into the device's memory, once a part did not fit.
        self.tokens_that_fit = np.inf

    def is_trying(self, methods: Any) -> bool:
        """Say whether the sizes of "auto" are being measured, so that parts run one after the other."""
        return _is_auto(methods) and self._trial is not None and self._trial.chosen is None

    def start_batch(self, methods: Any, lengths: Lengths) -> None:
        """Start the trial of "auto" with the first large batch, and another if rows become much longer."""
        if not _is_auto(methods) or len(lengths) < ROWS_OF_A_TRIAL:
            return
        if self._trial is None or _median(lengths) >= MUCH_LONGER * self._trial.median:
            self._trial = SizeTrial(lengths, cuda=self._cuda)

    def parts(self, methods: Any, lengths: Lengths, begin: int, limit: float) -> Iterator[range]:
        """Yield the micro-batches of a batch from row `begin` on, none of more than `limit` tokens.

        Args:
            methods: Has the options.
            lengths: The length of each row; if they differ, longest first.
            begin: The first row.
            limit: The largest number of tokens.
        """
        end = len(lengths)
        if not end:
            yield range(0)
            return
        budget = methods.micro_batch_tokens
        rows = methods.micro_batch_size
        if _is_auto(methods):
            rows = None if self._trial is not None else ROWS_WITHOUT_A_TRIAL
        rows = end if rows is None else int(rows)
        while begin < end:
            longest = max(float(lengths[begin]), 1.0)
            if _is_auto(methods) and self._trial is not None:
                budget = self._trial.size()
            if budget is not None and longest > budget and not _is_auto(methods):
                self._warn_of_longer(longest, budget)
            tokens = min(np.inf if budget is None else budget, limit, self.tokens_that_fit)
            count = int(max(1, min(rows, tokens // longest, end - begin)))
            if budget is not None:
                count = _rows_of_similar_length(lengths[begin : begin + count])
                if count < end - begin:
                    count = _rounded(count, self._few_shapes)
            yield range(begin, begin + count)
            begin += count

    def done(self, methods: Any, lengths: Lengths, part: range, seconds: float) -> None:
        """Note that a part went through, and how long it took."""
        if not len(part):
            return
        self._tokens_done = max(self._tokens_done, tokens_of(lengths, part))
        if self._trial is not None and self.is_trying(methods):
            self._trial.note(float(np.maximum(lengths[part.start : part.stop], 1).sum()), seconds)
            if self._trial.chosen is not None:
                option = "micro_batch_size" if methods.sort_by is None else "micro_batch_tokens"
                log(f"{self._name}: micro_batch_size='auto' chose {option}={self._trial}")

    def did_not_fit(self, lengths: Lengths, part: range) -> tuple[float, bool]:
        """Return the largest number of tokens to try next, and whether later batches start with it too.

        They do not if the part was smaller than one that has fitted.
        """
        tried = tokens_of(lengths, part)
        limit = (len(part) // 2) * max(float(lengths[part.start]), 1.0)
        if remembered := 2 * tried > self._tokens_done:
            self.tokens_that_fit, self._tokens_done = limit, 0.0
        return limit, remembered

    def _warn_of_longer(self, longest: float, budget: int) -> None:
        if not self._warned_of_longer:
            self._warned_of_longer = True
            log(
                f"{self._name}: a row of length {longest:g} is longer than micro_batch_tokens={budget}, so it goes "
                f"through the model alone. Other such rows do too.",
                logging.WARNING,
            )


class SizeTrial:
    """Measures several sizes of micro-batches on the first batches, and chooses one.

    The sizes take turns upwards and downwards, so that each gets long and short rows. The first turn is not counted,
    because a first call is slow. The best of the other turns counts, because other work on the machine slows some.

    Args:
        lengths: The lengths of the rows of the batch that starts the trial.
        cuda: Whether the model is on a CUDA device, where larger sizes are worth trying.

    Attributes:
        median: The median length of these rows.
        sizes: The sizes, in tokens.
        chosen: The fastest, once all were measured.
    """

    TURNS = 5

    def __init__(self, lengths: Lengths, *, cuda: bool) -> None:
        self.median = _median(lengths)
        largest = LARGEST_TRIAL_CUDA if cuda else LARGEST_TRIAL
        rows = [SMALLEST_TRIAL]
        while rows[-1] < min(largest, len(lengths)):
            rows.append(2 * rows[-1])
        self.sizes = [int(count * self.median) for count in rows]
        self.chosen: int | None = None
        up, down = range(len(rows)), reversed(range(len(rows)))
        turns = itertools.islice(itertools.cycle([list(up), list(down)]), self.TURNS)
        self._schedule = list(itertools.chain.from_iterable(turns))
        self._turn = 0
        self._rates = np.zeros(len(rows))

    def size(self) -> int:
        """Return the size of the next part: the chosen one, or the one whose turn it is."""
        if self.chosen is not None:
            return self.chosen
        return self.sizes[self._schedule[min(self._turn, len(self._schedule) - 1)]]

    def note(self, tokens: float, seconds: float) -> None:
        """Add the measurement of the part whose turn it was; the last one makes the choice."""
        if self.chosen is not None:  # another thread was faster
            return
        number = self._schedule[self._turn]
        if self._turn >= len(self.sizes):
            self._rates[number] = max(self._rates[number], tokens / max(seconds, 1e-9))
        self._turn += 1
        if self._turn == len(self._schedule):
            best = 0
            for other in range(1, len(self.sizes)):
                if self._rates[other] > CLEARLY_FASTER * self._rates[best]:
                    best = other
            self.chosen = self.sizes[best]

    def __str__(self) -> str:
        rates = ", ".join(f"{size}: {rate:.0f}" for size, rate in zip(self.sizes, self._rates, strict=True))
        return f"{self.chosen} (rows or tokens per second with each size: {rates})"


def _median(lengths: Lengths) -> float:
    return max(float(np.median(lengths)), 1.0)


def tokens_of(lengths: Lengths, part: range) -> float:
    """Return the rows of a part times its longest length."""
    return len(part) * max(float(lengths[part.start]), 1.0)


def _is_auto(methods: Any) -> bool:
    """Say whether the size is found by trial: on request, or because `sort_by` came without a size."""
    size = methods.micro_batch_size
    return size == "auto" or (size is None and methods.sort_by is not None and methods.micro_batch_tokens is None)


def _rows_of_similar_length(lengths: Lengths) -> int:
    """Return how many of these rows, longest first, to take together."""
    there = np.cumsum(np.maximum(lengths, 1))
    computed = np.arange(1, len(lengths) + 1) * max(float(lengths[0]), 1.0)
    fits = np.flatnonzero(there >= (1 - MOST_PADDING) * computed)
    return max(int(fits[-1]) + 1, min(SMALLEST_PART, len(lengths)))


def _rounded(rows: int, few_shapes: bool) -> int:
    """Return a number of rows that kernels like: a multiple of 8, or a power of two."""
    if few_shapes:
        return 1 << (rows.bit_length() - 1)
    return rows - rows % 8 if rows >= 8 else rows
