"""`call_model`: call a shared model as a Ray task.

Note [A call]

    caller                                   any worker process of the cluster
    standin(data)  --- one Ray task --->     1. (Ray) resolve ObjectRefs among the arguments
                                             2. lend a model no call had before (Note [Warm views])
                                             3. call it under torch.inference_mode
    the result     <--- its skeleton,  ---   4. take the result apart as a model is, so that its
                        its bytes               bytes go into the store once and come back as views

Between the calls the process keeps the model mapped, and at most a small object over that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from .. import actor
from .._model.tensors import map_tensors
from .._store.ref import ModelRef, check
from .result import Result
from .warm_models import WarmModels

__all__ = ["RemoteCall", "call_model", "with_options"]


# ---------------------------------------------------------------- in the worker


_warm_models = WarmModels()


def _gpu_model_call(call: tuple[ModelRef, int | None, str], /, *args: Any, **kwargs: Any) -> Any:
    # On a device a model is not kept: Ray ends the worker of a GPU task after one call.
    loaded = actor.load(call[0], None)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(loaded.device))  # copy: to a device
    return Result(_call_method(loaded.model, call, args, kwargs))


def _model_call(call: tuple[ModelRef, int | None, str], /, *args: Any, **kwargs: Any) -> Any:
    lent = _warm_models.lend(call[0])
    try:
        return Result(_call_method(lent.model, call, args, kwargs))
    finally:
        _warm_models.give_back(lent)


def _call_method(
    model: Any, call: tuple[ModelRef, int | None, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    model_ref, part, method_name = call
    actor.check_one(model, model_ref)
    if part is not None:
        model = model[part]
    method = model if method_name == "__call__" else getattr(model, method_name)
    with torch.inference_mode():
        result = method(*args, **kwargs)
        return list(result) if inspect.isgenerator(result) else result  # its code is part of the call


# ---------------------------------------------------------------- the task


_task = ray.remote(_model_call)
# Ray ends a worker after one call (max_calls=1), and so frees its GPU and lets the next see another one, only if the
# function is declared with GPUs; .options(num_gpus=...) does not bring that.
_gpu_task = ray.remote(num_gpus=1)(_gpu_model_call)


def with_options(options: Mapping[str, Any]) -> Any:
    """Return the remote function for Ray's `options`; raises ValueError for one that Ray does not know."""
    function = _gpu_task if options.get("num_gpus") else _task
    return function.options(**{"name": "call_model", **options})


class RemoteCall:
    """`call_model`, a Ray remote function: `.remote(...)` starts a task, `.options(...)` takes Ray's options."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._function: Any = None

    def options(self, **options: Any) -> RemoteCall:
        """Return this function with options for its tasks: `num_cpus`, `num_gpus`, `resources`, `runtime_env`, ..."""
        changed = RemoteCall({**self._options, **options})
        with_options(changed._options)
        return changed

    def remote(
        self,
        model_ref: ModelRef,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        method_name: str = "__call__",
    ) -> Any:
        """Start a task that calls a shared model.

        Args:
            model_ref: What `prepare_model_for_actors` returned.
            args: The method's positional arguments, a tuple. An `ObjectRef` that is directly one of them, or of
                `kwargs`, is replaced by its value; the task starts when that is there.
            kwargs: The method's keyword arguments.
            method_name: Which method of the model to call.

        Returns:
            The `ObjectRef` of what the method returns, or several with `num_returns`. A generator runs to its end
            within the call, and its items are the result, a list.

        Raises:
            TypeError: `model_ref`, `args`, `kwargs` or `method_name` is of the wrong type.
            ModelLostError: The handle is from another Ray session.
        """
        if not isinstance(args, (tuple, list)):
            raise TypeError(
                f"call_model takes the model's positional arguments as a tuple, not as one "
                f"{type(args).__qualname__}: call_model.remote(model_ref, (data,))."
            )
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(
                f"call_model takes the model's keyword arguments as a dict, not as a {type(kwargs).__qualname__}: "
                f'call_model.remote(model_ref, (), {{"name": value}}).'
            )
        if not isinstance(method_name, str):
            raise TypeError(f"call_model takes the name of a method of the model, not {method_name!r}.")
        check(model_ref)
        if self._function is None:
            self._function = with_options(self._options)
        return self._function.remote((model_ref, None, method_name), *args, **(kwargs or {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError, as any remote function."""
        raise TypeError("call_model runs as a Ray task: call_model.remote(model_ref, args, kwargs).")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def __repr__(self) -> str:
        return f"call_model.options({', '.join(f'{k}={v!r}' for k, v in self._options.items())})"


call_model = RemoteCall({})


"""Call a shared model in a Ray task: `call_model.remote(model_ref, args=(), kwargs=None, method_name="__call__")`.

The model runs in eval mode under `torch.inference_mode()`, on the GPU that Ray assigned to the task, else on the CPU.
Tensors among the arguments, also in lists, tuples, mappings and dataclasses, go there.

The result's tensors are on the CPU, require no gradient, and are the reader's own: writable, over the store's pages
copy-on-write where the result is large.
"""
