"""Subclasses of `ZeroCopyPredictor`: their names, the check that they are complete, and `using`."""

from __future__ import annotations

import inspect
import itertools
import types
from typing import Any

from .constructor import suggest, unknown_keywords
from .options import OPTIONS, check_combinations, check_options
from .warmup import is_constructed_by

__all__ = ["bind", "check_complete", "class_name", "no_model_message", "overridden_methods"]

_bindings = itertools.count(1)
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def written_class(cls: type) -> type:
    """Return the class that the user wrote. Ray Data runs a subclass of it."""
    return next((c for c in cls.__mro__ if not c.__module__.startswith("ray.")), cls)


def class_name(cls: type) -> str:
    return written_class(cls).__name__


def overridden_methods(cls: type, base: type) -> list[str]:
    """Return which of `preprocess` and `postprocess` a subclass defines."""
    return [method for method in ("preprocess", "postprocess") if getattr(cls, method) is not getattr(base, method)]


def check_methods(options: Any, base: type, name: str) -> None:
    """Raise TypeError if a method of `options`, an instance or a class, is async or yields what nothing reads."""
    for method in ("preprocess", "predict", "postprocess", "__call__", "sort_by", "warmup"):
        for code in _functions_of(options, method):
            if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
                kind = "an async generator" if inspect.isasyncgenfunction(code) else "an async function"
                raise TypeError(
                    f"{name}.{method} is {kind}, and nothing awaits it: each method of a ZeroCopyPredictor is an "
                    f"ordinary function. Write def {method}(...), and run coroutines in it: asyncio.run(main())."
                )
    for method, next_method in (("preprocess", "predict"), ("predict", "postprocess")):
        follows = getattr(options, next_method)
        is_default = getattr(follows, "__func__", follows) is getattr(base, next_method)
        if is_default and any(inspect.isgeneratorfunction(code) for code in _functions_of(options, method)):
            raise TypeError(
                f"{name}.{method} is a generator, and {next_method} cannot use one. Return one value for the batch. "
                f"Only postprocess may yield: each table that it yields becomes rows."
            )


def _functions_of(options: Any, method: str) -> tuple[Any, Any, Any]:
    """Return a method, what a partialmethod in its place calls, and what an object in its place calls."""
    held = getattr(options, method, None)
    partial = getattr(inspect.getattr_static(options, method, None), "func", None)
    return held, partial, vars(type(held)).get("__call__")


def check_complete(options: Any, cls: type, base: type) -> None:
    """Raise TypeError unless each method of `cls` is written or replaced by an option.

    `options` is an instance or a class. Raises ValueError if two options contradict each other.
    """
    name = class_name(cls)
    check_methods(options, base, name)
    for method, signature, option in (
        ("preprocess", "(self, batch)", "input_columns=['x']"),
        ("postprocess", "(self, outputs, batch)", "output_column='prediction'"),
    ):
        if method not in overridden_methods(cls, base) and getattr(options, option.split("=")[0]) is None:
            raise TypeError(
                f"{name}.{method} is not written. Define {method}{signature} in the subclass, or pass an option "
                f"in its place: {option}."
            )
    check_combinations(options, name)


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


def _refused_options(
    cls: type, signature: inspect.Signature, bound: dict[str, Any], options: dict[str, Any]
) -> str | None:
    """Return what the constructor of `cls` raises for `bound`, as the end of a sentence; None if it accepts them."""
    if unknown := unknown_keywords(cls, options):
        known = suggest(unknown[0], (*OPTIONS, *signature.parameters))
        return f"got an unexpected keyword argument '{unknown[0]}'.{known}"
    try:
        signature.bind(**bound)
    except TypeError as error:
        return f"{error}."
    return None


def bind(cls: Any, base: type, model_ref: Any, options: dict[str, Any]) -> Any:
    """Return a subclass of `cls` with a model and options bound to it; see `ZeroCopyPredictor.using`."""
    check_methods(cls, base, class_name(cls))
    signature = inspect.signature(cls)
    accepts = signature.parameters.values()
    # A constructor that takes model_ref gets the model. Any other reads the class attribute.
    named = "model_ref" in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in accepts)
    attributes = {option: options[option] for option in OPTIONS if option in options}
    for option in ("sort_by", "warmup"):
        if inspect.isfunction(attributes.get(option)):
            attributes[option] = staticmethod(attributes[option])  # a class attribute would be a method
    options = {o: v for o, v in options.items() if o not in attributes or o in signature.parameters}
    bound = {"model_ref": model_ref, **options} if named else options
    if problem := _refused_options(cls, signature, bound, options):
        parameters = [name for name, parameter in signature.parameters.items() if parameter.kind not in _SEVERAL]
        raise TypeError(
            f"{class_name(cls)}.using: the constructor of {class_name(cls)} {problem} It takes "
            f"{', '.join(parameters)}; every predictor takes {', '.join(OPTIONS)}. Options of Ray Data (batch_size, "
            f"compute, num_gpus) go to ds.map_batches."
        )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(*args).arguments  # fn_constructor_args override what is bound
        cls.__init__(self, *args, **{k: v for k, v in bound.items() if k not in given} | kwargs)
        if is_constructed_by(type(self), made):
            self.warm_up()

    # The signature tells the next `using`, of this class or of a subclass, which options exist and which are bound.
    own = [p.replace(default=bound[p.name]) if p.name in bound and p.kind not in _SEVERAL else p for p in accepts]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = signature.replace(parameters=[itself, *own])  # type: ignore[attr-defined]

    members: dict[str, Any] = {
        "model_ref": model_ref,
        **attributes,
        "__init__": __init__,
        "_bound": True,
        "__module__": cls.__module__,
        # Each binding needs another qualified name, because Ray Data uses it to tell instances on an actor apart, and
        # a chain may use one class with two models. The operator shows __name__.
        "__qualname__": f"{cls.__qualname__}.using_{next(_bindings)}",
        "__doc__": cls.__doc__,
    }
    made = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))
    if all("__init__" not in c.__dict__ or "_bound" in c.__dict__ for c in cls.__mro__[: cls.__mro__.index(base)]):
        check_complete(made, cls, base)  # a constructor of the user's may add what is missing
    check_options(made, class_name(cls))
    return made
