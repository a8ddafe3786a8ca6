"""Types that a model registers as pytree nodes: the arguments and outputs of exported programs have them."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

__all__ = ["pytree_registrations", "register_pytree_types"]


def pytree_registrations(specs: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return how the types in some TreeSpecs are registered as pytree nodes, for `register_pytree_types`."""
    kinds: dict[type, None] = {}
    pending = list(specs)
    while pending:
        spec = pending.pop()
        pending += spec.children()
        # A namedtuple has the type `namedtuple`, and its class as context.
        kind = spec.context if spec.type is collections.namedtuple else spec.type
        if isinstance(kind, type) and kind not in _pytree.BUILTIN_TYPES:
            kinds[kind] = None
    return [
        (*_pytree.SUPPORTED_NODES[kind], *_pytree.SUPPORTED_SERIALIZED_TYPES[kind][1:])
        for kind in kinds
        if kind in _pytree.SUPPORTED_NODES and not (kind.__module__ or "").startswith(("torch.", "collections"))
    ]


def register_pytree_types(nodes: Iterable[tuple[Any, ...]]) -> None:
    """Register pytree nodes that this process does not have."""
    for kind, flatten, unflatten, flatten_with_keys, serialized_name, to_dumpable, from_dumpable in nodes:
        if kind in _pytree.SUPPORTED_NODES:
            continue
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            _pytree._register_namedtuple(kind, serialized_type_name=serialized_name)
        else:
            _pytree.register_pytree_node(
                kind,
                flatten,
                unflatten,
                serialized_type_name=serialized_name,
                to_dumpable_context=to_dumpable,
                from_dumpable_context=from_dumpable,
                flatten_with_keys_fn=flatten_with_keys,
            )
