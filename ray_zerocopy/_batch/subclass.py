"""A subclass of `ZeroCopyPredictor`: its name, whether it is complete, how a model and options are bound to it."""

from __future__ import annotations

import inspect
import itertools
import types
from typing import Any

from .defaults import check_options

__all__ = ["OPTIONS", "bind", "check_complete", "class_name", "no_model_message", "overridden_methods"]

_bindings = itertools.count(1)
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

OPTIONS = (
    "input_columns",
    "output_column",
    "keep_columns",
    "dtype",
    "compile",
    "micro_batch_size",
    "on_error",
)


def written_class(cls: type) -> type:
    """Return the class that the user wrote: Ray Data runs a subclass of its own."""
    return next((c for c in cls.__mro__ if not c.__module__.startswith("ray.")), cls)


def class_name(cls: type) -> str:
    return written_class(cls).__name__


def overridden_methods(cls: type, base: type) -> list[str]:
    """Return which of `preprocess` and `postprocess` a subclass defines."""
    return [method for method in ("preprocess", "postprocess") if getattr(cls, method) is not getattr(base, method)]


def check_complete(options: Any, cls: type, base: type) -> None:
    """Raise TypeError unless `options`, an instance or a class, says all that `cls` needs."""
    name = class_name(cls)
    for method, signature, option in (
        ("preprocess", "(self, batch)", "input_columns=['x']"),
        ("postprocess", "(self, outputs, batch)", "output_column='prediction'"),
    ):
        if method not in overridden_methods(cls, base) and getattr(options, option.split("=")[0]) is None:
            raise TypeError(
                f"{name}.{method} is not written. A subclass of ZeroCopyPredictor defines {method}{signature}, or "
                f"an option takes its place: {option}."
            )


def no_model_message(cls: type) -> str:
    name, module = class_name(cls), written_class(cls).__module__
    lost = (
        f" A class attribute {name}.model_ref that was set at run time does not reach the workers if {name} is in an "
        f"importable module ({module}): Ray sends such a class by name only."
    )
    return (
        f"{name} got no model. Give ds.map_batches either {name}.using(model_ref), or {name} with "
        f'fn_constructor_kwargs={{"model_ref": model_ref}}.{lost if module != "__main__" else ""}'
    )


def bind(cls: Any, base: type, model_ref: Any, options: dict[str, Any]) -> Any:
    """Return a subclass of `cls` with a model and options bound to it; see `ZeroCopyPredictor.using`."""
    signature = inspect.signature(cls)
    accepts = signature.parameters.values()
    # A constructor that takes the model gets it; one that does not finds it as the class attribute.
    named = "model_ref" in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in accepts)
    attributes = {option: options[option] for option in OPTIONS if option in options}
    options = {o: v for o, v in options.items() if o not in attributes or o in signature.parameters}
    bound = {"model_ref": model_ref, **options} if named else options
    try:
        signature.bind(**bound)
    except TypeError as error:
        raise TypeError(
            f"{class_name(cls)}.using: the constructor of {class_name(cls)} {error}. It takes "
            f"{', '.join(map(str, signature.parameters))}: the model as model_ref, any other from using. What is "
            f"Ray Data's (batch_size, compute, num_gpus) goes to ds.map_batches."
        ) from None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(*args).arguments  # fn_constructor_args count more than what is bound
        cls.__init__(self, *args, **{k: v for k, v in bound.items() if k not in given} | kwargs)

    # For the next `using`, of this class or of a subclass: what it may give, and what is given.
    own = [p.replace(default=bound[p.name]) if p.name in bound and p.kind not in _SEVERAL else p for p in accepts]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = signature.replace(parameters=[itself, *own])  # type: ignore[attr-defined]

    members: dict[str, Any] = {
        "model_ref": model_ref,
        **attributes,
        "__init__": __init__,
        "_bound": True,
        "__module__": cls.__module__,
        # Not the class's own: Ray Data tells the instances on an actor apart by it, and a chain may use one
        # class with two models. The operator shows __name__.
        "__qualname__": f"{cls.__qualname__}.using_{next(_bindings)}",
        "__doc__": cls.__doc__,
    }
    made = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))
    if all("__init__" not in c.__dict__ or "_bound" in c.__dict__ for c in cls.__mro__[: cls.__mro__.index(base)]):
        check_complete(made, cls, base)  # a constructor of the class's own may add what is missing
    check_options(made, class_name(cls))
    return made
