"""`call_model`: call a shared model as a Ray task.

Note [A call]

    caller                                   any worker process of the cluster
    standin(data)  --- one Ray task --->     1. (Ray) replace ObjectRefs among the arguments by their values
                                             2. lend a model that no call had before (Note [Warm views])
                                             3. call it under torch.inference_mode
    the result     <--- its skeleton,  ---   4. take the result apart like a model, so that its bytes
                        its bytes               go into the store once and come back as views

Between calls the process keeps the model mapped, with at most a small object over the mapping.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray

from .. import actor
from .._model.gradients import inference_context, without_gradients
from .._model.tensors import map_tensors
from .._store.ref import ModelRef, WithoutIsolation, check
from .._store.waits import check_timeout
from .result import Result
from .warm_models import WarmModels

__all__ = ["Call", "CallOptions", "RemoteCall", "call_model", "check_pipeline_options", "split_options"]


# ---------------------------------------------------------------- in the worker


class Call(NamedTuple):
    """Which method of which model a task calls, and how.

    Attributes:
        model_ref: The handle.
        part: The number of the model, if several are behind the handle.
        method_name: The method.
        inference_mode: Whether the method runs under `torch.inference_mode()`.
        require_isolation: Whether the task fails where its process cannot have a private view of the model.
        timeout: Seconds that the task waits for the model; None waits without end.
    """

    model_ref: ModelRef
    part: int | None
    method_name: str
    inference_mode: bool = True
    require_isolation: bool = False
    timeout: float | None = None


_GRADIENTS = (
    "A call runs under torch.inference_mode(). To compute gradients: call_model.options(inference_mode=False), or "
    "rewrite_pipeline(pipeline, inference_mode=False)."
)
_warm_models = WarmModels()


def _model_call(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    lent = _warm_models.lend(call.model_ref, _without_isolation(call), call.timeout)
    try:
        return Result(_call_method(lent.model, call, args, kwargs))
    finally:
        _warm_models.give_back(lent)


def _model_stream(call: Call, /, *args: Any, **kwargs: Any) -> Iterator[Result]:
    lent = _warm_models.lend(call.model_ref, _without_isolation(call), call.timeout)
    try:
        yield from _results(lent.model, call, args, kwargs)
    finally:
        _warm_models.give_back(lent)


def _gpu_model_call(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    return Result(_call_method(*_on_device(call, args, kwargs)))


def _gpu_model_stream(call: Call, /, *args: Any, **kwargs: Any) -> Iterator[Result]:
    yield from _results(*_on_device(call, args, kwargs))


def _on_device(call: Call, args: Any, kwargs: Any) -> tuple[Any, Call, Any, Any]:
    """Load the model. On a device it is not kept: Ray ends the worker of a GPU task after one call."""
    loaded = actor.load(call.model_ref, None, without_isolation=_without_isolation(call), timeout=call.timeout)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(loaded.device))  # copy: to a device
    return loaded.model, call, args, kwargs


def _without_isolation(call: Call) -> WithoutIsolation:
    return WithoutIsolation.RAISE if call.require_isolation else WithoutIsolation.COPY


def _call_method(model: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    method = _method(model, call)
    with inference_context(call.inference_mode, _GRADIENTS):
        result = method(*args, **kwargs)
        result = list(result) if inspect.isgenerator(result) else result  # its code is part of the call
        _check_not_async(result, call)
        return result if call.inference_mode else without_gradients(result)


def _results(model: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Result]:
    """Yield what a generator method yields, one item at a time."""
    method, items, end = _method(model, call), iter(()), object()
    with inference_context(call.inference_mode, _GRADIENTS):
        result = method(*args, **kwargs)
        _check_not_async(result, call)
        if not isinstance(result, Iterator):
            raise TypeError(
                f"num_returns='streaming' is for methods that are generators, and {type(model).__name__}."
                f"{call.method_name} returned a {type(result).__qualname__}. Leave num_returns out."
            )
        items = result
    while True:
        with inference_context(call.inference_mode, _GRADIENTS):  # not around the yield: it is a state of the thread
            item = next(items, end)
        if item is end:
            return
        yield Result(item if call.inference_mode else without_gradients(item))


def _method(model: Any, call: Call) -> Any:
    actor.check_one(model, call.model_ref)
    if call.part is not None:
        model = model[call.part]
    return model if call.method_name == "__call__" else getattr(model, call.method_name)


def _check_not_async(result: Any, call: Call) -> None:
    if inspect.iscoroutine(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(
            f"{call.model_ref.class_name}.{call.method_name} is async, and a task does not await it. Call a method "
            f"that is an ordinary function or a generator; it may run the coroutine: asyncio.run(...)."
        )


# ---------------------------------------------------------------- the task


# Ray ends a worker after one call (max_calls=1), and so frees its GPU and lets the next see another one, only if the
# function is declared with GPUs. An option of .options(num_gpus=...) does not do that.
_functions = {
    (False, False): ray.remote(_model_call),
    (False, True): ray.remote(_model_stream),
    (True, False): ray.remote(num_gpus=1)(_gpu_model_call),
    (True, True): ray.remote(num_gpus=1)(_gpu_model_stream),
}
_OPTIONS_OF_CALLS = ("inference_mode", "require_isolation", "timeout")


class CallOptions(NamedTuple):
    """The options of a call: those of this package, as fields of `Call`, and those of Ray."""

    of_call: dict[str, Any]
    of_ray: dict[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the task returns items one by one, as the method yields them."""
        return bool(self.of_ray.get("num_returns") == "streaming")

    def function(self) -> Any:
        """Return the remote function for Ray's options. Raise ValueError for an option that Ray does not know."""
        function = _functions[bool(self.of_ray.get("num_gpus")), self.streams]
        return function.options(**{"name": "call_model", **self.of_ray})


def split_options(options: Mapping[str, Any]) -> CallOptions:
    """Check the options of a call. Raise TypeError or ValueError for a wrong one, with its name."""
    of_call = {name: options[name] for name in _OPTIONS_OF_CALLS if name in options}
    for name, value in of_call.items():
        if name == "timeout":
            check_timeout(value)
        elif not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}. Give True or False.")
    returns = options.get("num_returns")
    if returns not in (None, "streaming") and (not isinstance(returns, int) or returns < 0):
        raise ValueError(
            f"num_returns is {returns!r}. Give a number, or 'streaming' for a method that is a generator."
        )
    split = CallOptions(of_call, {name: value for name, value in options.items() if name not in of_call})
    split.function()
    return split


def check_pipeline_options(options: Mapping[str, Any]) -> None:
    """Check options for all calls of a pipeline's models, as `split_options` does for one call."""
    if split_options(options).streams:
        raise ValueError(
            "rewrite_pipeline: num_returns='streaming' would make every call a stream. Stream single calls: "
            'call_model.options(num_returns="streaming").remote(standin.model_ref, args, method_name="generate").'
        )


class RemoteCall:
    """The type of `call_model`, a Ray remote function: `.remote(...)` starts a task, `.options(...)` sets options."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._split = split_options(options) if options else CallOptions({}, {})
        self._function: Any = None

    def options(self, **options: Any) -> RemoteCall:
        """Return this function with options for its tasks.

        Args:
            options: Those of Ray (`num_cpus`, `num_gpus`, `resources`, `runtime_env`, `num_returns`, ...), and three
                more. `timeout` is the number of seconds that a task waits for the model. `inference_mode=False` lets
                the method compute gradients; the result has none. With `require_isolation=True` a task raises
                `ZeroCopyError` where its process cannot have a private view of the model, instead of copying the
                model for each call.

        Raises:
            ValueError: Ray does not know an option, or does not take it for single calls.
            TypeError: An option has the wrong type.
        """
        return RemoteCall({**self._options, **options})

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
            args: The method's positional arguments, as a tuple. If an argument in `args` or `kwargs` is an
                `ObjectRef`, the task starts when its value is there, and the method gets the value.
            kwargs: The method's keyword arguments.
            method_name: Which method of the model to call.

        Returns:
            The `ObjectRef` of the method's result, or several with `num_returns`. A generator runs to its end
            within the call, and its items are the result, a list. With `num_returns="streaming"` the result is Ray's
            `ObjectRefGenerator`, which has each item as soon as the method yields it.

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
            self._function = self._split.function()
        call = Call(model_ref, None, method_name, **self._split.of_call)
        return self._function.remote(call, *args, **(kwargs or {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError, as every remote function does."""
        raise TypeError("call_model runs as a Ray task: call_model.remote(model_ref, args, kwargs).")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def __repr__(self) -> str:
        return f"call_model.options({', '.join(f'{k}={v!r}' for k, v in self._options.items())})"


call_model = RemoteCall({})


"""Call a shared model in a Ray task: `call_model.remote(model_ref, args=(), kwargs=None, method_name="__call__")`.

The model runs in eval mode under `torch.inference_mode()`, on the GPU that Ray assigned to the task, else on the CPU.
Tensors among the arguments, also in lists, tuples, mappings and dataclasses, are copied to that device.

The tensors of the result are on the CPU, require no gradient, and are private to the reader: the reader can write to
them. A large result is a copy-on-write view of the store's pages.
"""
