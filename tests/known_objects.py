"""The objects that Ray knows in this process, for tests of what is left in the store."""

from __future__ import annotations

import ray


def known_objects() -> set[str]:
    """Return the objects that this process holds references to, as Ray counts them."""
    worker = ray._private.worker.global_worker
    return {key.decode() if isinstance(key, bytes) else key for key in worker.core_worker.get_all_reference_counts()}
