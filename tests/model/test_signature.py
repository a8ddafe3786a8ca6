"""The signature of an exported program: arguments are bound and checked, outputs are put together."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ray_zerocopy._model.signature import BoundSignature, signature_of

ROWS = torch.export.Dim("rows", max=64)
ONE, X = torch.ones(1), torch.ones(5, 3)


class Model(nn.Module):
    def forward(self, x: Any, y: Any = None, flag: bool = True, *, more: Any) -> Any:
        return {"sum": x * 2 + more["k"][0], "count": x.shape[0] * 2, "none": None, "pair": (more["twice"], 5)}


@pytest.fixture(scope="module")
def bound() -> BoundSignature:
    """The signature of a program, as a worker has it."""
    more = {"k": [ONE], "twice": torch.ones(8, 2).T}
    shapes = {"x": {0: ROWS}, "y": None, "flag": None, "more": {"k": [None], "twice": {1: 2 * ROWS}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        program = torch.export.export(Model(), (X[:4], None), {"flag": True, "more": more}, dynamic_shapes=shapes)
    return BoundSignature(pickle.loads(pickle.dumps(signature_of(program))), torch.device("cpu"))


def more(**changes: Any) -> dict[str, Any]:
    return {"k": [ONE], "twice": torch.ones(2, 10), **changes}


def test_tensors_in_the_order_of_the_export(bound: BoundSignature) -> None:
    """Arguments come by position or by name, constants may be left out, mappings in any order."""
    for args, kwargs in (((X, None), {"flag": True}), ((X,), {}), ((), {"x": X, "y": None})):
        flat = bound.flatten(args, {**kwargs, "more": dict(reversed(more().items()))})
        assert [tuple(tensor.shape) for tensor in flat] == [(5, 3), (1,), (2, 10)]
        assert [tensor.is_contiguous() for tensor in flat] == [True, True, False]
        assert flat[2].stride() == (1, 2)
        assert flat[0] is X


@pytest.mark.parametrize(
    ("error", "facts", "args", "kwargs"),
    [
        (ValueError, "y is a tensor.*exported with None", (X, ONE), {"more": more()}),
        (ValueError, "flag is 0.*exported with True", (X,), {"more": more(), "flag": 0}),
        (ValueError, r"x has the size \(65, 3\).* to 64", (torch.ones(65, 3),), {"more": more()}),
        (ValueError, r"x has the size \(5,\)", (X[:, 0],), {"more": more()}),
        (ValueError, r"more\['k'\]\[0\] has the size \(2,\)", (X,), {"more": more(k=[torch.ones(2)])}),
        (ValueError, r"more\['twice'\] has the size \(2, 11\).*2\*s", (X,), {"more": more(twice=torch.ones(2, 11))}),
        (ValueError, "x is of torch.float64", (X.double(),), {"more": more()}),
        (ValueError, "x is on meta", (X.to("meta"),), {"more": more()}),
        (TypeError, "another structure.*'k'", (X,), {"more": {"z": [ONE], "twice": ONE}}),
        (TypeError, "no argument x", (), {"more": more()}),
        (TypeError, "argument x twice", (X,), {"x": X, "more": more()}),
        (TypeError, "argument z too", (X,), {"z": X, "more": more()}),
        (TypeError, "3 positional arguments and takes 2", (X, None, True), {"more": more()}),
    ],
)
def test_other_arguments(
    bound: BoundSignature, error: type[Exception], facts: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """What the compiled code would misread is an error that names the argument."""
    with pytest.raises(error, match=facts):
        bound.flatten(args, kwargs)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, -1, 3).sum(0)


def test_a_size_that_is_twice_another() -> None:
    """A derived size is checked though no input has the size that it is derived from."""
    half = torch.export.Dim("half", min=2, max=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Halves(), (torch.ones(8, 3),), dynamic_shapes={"x": {0: 2 * half}})
    bound = BoundSignature(pickle.loads(pickle.dumps(signature_of(program))), torch.device("cpu"))
    assert bound.flatten((torch.ones(16, 3),), {})[0].shape == (16, 3)
    for rows in (13, 2, 18):
        with pytest.raises(ValueError, match=rf"x has the size \({rows}, 3\).*from 2 to 8"):
            bound.flatten((torch.ones(rows, 3),), {})


def test_outputs(bound: BoundSignature) -> None:
    """Tensors, sizes and constants come back in the structure of the program."""
    for constants in ([None, torch.tensor(5)], [None, None]):
        result = bound.unflatten([X, torch.tensor(10), constants[0], ONE, constants[1]])
        assert result["sum"] is X
        assert (result["count"], result["none"], result["pair"][1]) == (10, None, 5)
