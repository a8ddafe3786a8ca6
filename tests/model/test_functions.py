"""Functions, descriptors and objects of a process in a script's model: what travels, and what is refused."""

from __future__ import annotations

import functools
import os
import re
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
from models import quietly
from torch import nn

from ray_zerocopy import ZeroCopyError, ZeroCopyWarning, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy._model import deep
from ray_zerocopy._model.compiled import options_of


def run_as_script(source: str) -> dict[str, Any]:
    """Run source as `__main__`, which no worker can import, and return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    quietly(lambda: exec("import torch\nfrom torch import nn\n" + textwrap.dedent(source), names))
    return names


def evaluate(model_ref: Any, expression: str) -> Any:
    """Load the model and return the value of an expression about `m`."""
    return eval(expression, {"m": load_model_in_actor(model_ref), "torch": torch, "options": options_of})


def evaluate_in_worker(actor: Any, model: object, expression: str) -> Any:
    """Share a model, and return the value of an expression about it in a worker."""
    return ray.get(actor.run.remote(evaluate, prepare_model_for_actors(model), expression))


class Travels(NamedTuple):
    """A script that makes `model`, an expression about it as `m`, and what the expression is in a worker."""

    source: str
    expression: str
    expected: Any


TRAVELS = {
    "states_of_reduce": Travels(
        """
        class Pair:
            __slots__ = ("a", "b")
            def __reduce__(self): return Pair, (), (None, {"a": 1, "b": 2})
        class Sets:
            def __reduce__(self): return Sets, (), ("a", 5)
            def __setstate__(self, state): setattr(self, *state)
        class Function:
            def __reduce__(self): return Function, (), [7], None, None, lambda obj, state: setattr(obj, "a", state[0])
        model = nn.Linear(2, 2)
        model.parts = [Pair(), Sets(), Function()]
        """,
        "[part.a for part in m.parts]",
        [1, 5, 7],
    ),
    "registry_of_init_subclass": Travels(
        """
        class Block(nn.Module):
            kinds = {}
            def __init_subclass__(cls, **options):
                super().__init_subclass__(**options)
                Block.kinds[cls.__name__] = cls
        class Twice(Block):
            def forward(self, x): return x * 2
        class Thrice(Block):
            def forward(self, x): return x * 3
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Twice()
            def forward(self, x): return [Block.kinds[name]()(x) for name in sorted(Block.kinds)]
            def same(self): return Block.kinds["Twice"] is type(self.block)
        model = Net()
        """,
        "([y.item() for y in m(torch.ones(1))], m.same())",
        ([3.0, 2.0], True),
    ),
    "init_subclass_with_keywords": Travels(
        """
        class Block(nn.Module):
            kinds = {}
            def __init_subclass__(cls, /, key, **options):
                super().__init_subclass__(**options)
                cls.key, cls.kinds[key] = key, cls
                cls.size = cls.settings["size"]
        class Twice(Block, key="twice"):
            settings = {"size": 2}
            def again(self):
                class Thrice(Twice, key="thrice"):
                    settings = {"size": 3}
                return Thrice
        model = Twice()
        """,
        "(m.key, list(m.kinds), m.size, m.again().size, list(m.kinds))",
        ("twice", ["twice"], 2, 3, ["twice", "thrice"]),
    ),
    "metaclass_with_keywords": Travels(
        """
        class Meta(type):
            classes = {}
            def __new__(meta, name, bases, namespace, *, tag):
                made = super().__new__(meta, name, bases, namespace)
                made.scale = namespace["default"] * 2
                Meta.classes[tag] = made
                return made
            def __init__(cls, name, bases, namespace, *, tag): cls.tag = tag
        class Net(nn.Module, metaclass=Meta, tag="net"):
            default = 3
            def found(self): return Meta.classes["net"] is type(self)
        model = Net()
        """,
        "(m.tag, m.scale, m.found(), type(m).__mro__[1] is torch.nn.Module)",
        ("net", 6, True, True),
    ),
    "abstract_metaclass_and_generic_base": Travels(
        """
        import abc, typing
        T = typing.TypeVar("T")
        class Meta(abc.ABCMeta):
            names = []
            def __init__(cls, name, bases, namespace, **options):
                super().__init__(name, bases, namespace)
                Meta.names.append((name, namespace["__qualname__"]))
        class Base(nn.Module, typing.Generic[T], metaclass=Meta):
            @abc.abstractmethod
            def run(self): ...
        class Net(Base[int]):
            def run(self): return 1
        model = Net()
        """,
        "(m.run(), [name for name, _ in type(type(m)).names], len(type(m).__mro__[1].__abstractmethods__), "
        "type(m).__orig_bases__[0].__args__)",
        (1, ["Base", "Net"], 1, (int,)),
    ),
    "enum_with_a_constructor": Travels(
        """
        import enum
        class Planet(enum.Enum):
            EARTH = (5.9, 6.3)
            MARS = (6.4, 3.4)
            RED = (6.4, 3.4)
            def __init__(self, mass, radius): self.mass, self.radius = mass, radius
        model = nn.Linear(2, 2)
        model.planet, model.planets = Planet.MARS, Planet
        """,
        "(m.planet.mass, m.planets.EARTH.radius, m.planets['RED'] is m.planet, m.planets.RED.name, "
        "list(m.planets.__members__), len(m.planets))",
        (6.4, 6.3, True, "MARS", ["EARTH", "MARS", "RED"], 2),
    ),
    "enum_with_new": Travels(
        """
        import enum
        class Size(int, enum.Enum):
            def __new__(cls, number, label):
                member = int.__new__(cls, number)
                member._value_, member.label = number, label
                return member
            SMALL = (1, "small")
            LARGE = (2, "large")
        model = nn.Linear(2, 2)
        model.size = Size.LARGE
        """,
        "(m.size.label, m.size.value, m.size + 1, type(m.size)(1).label)",
        ("large", 2, 3, "small"),
    ),
    "flags_together": Travels(
        """
        import enum
        class Mode(enum.Flag):
            R = 1
            W = 2
            RW = R | W
        model = nn.Linear(2, 2)
        model.mode = Mode.RW
        """,
        "(m.mode is type(m.mode)['RW'], m.mode.name, m.mode is type(m.mode)(3), type(m.mode).R in m.mode)",
        (True, "RW", True, True),
    ),
    "private_slots": Travels(
        """
        class Config:
            __slots__ = ("__size", "kind")
            def __init__(self): self.__size, self.kind = 3, "k"
            def size(self): return self.__size
        model = nn.Linear(2, 2)
        model.config = Config()
        """,
        "(m.config.size(), m.config.kind)",
        (3, "k"),
    ),
    "cache_of_a_partial": Travels(
        """
        import functools, operator
        model = nn.Linear(2, 2)
        model.pick = functools.lru_cache(operator.itemgetter(1))
        model.power = functools.cache(functools.partial(pow, 2))
        """,
        "(m.pick((5, 6)), m.power(3))",
        (6, 8),
    ),
    "context_manager_as_decorator": Travels(
        """
        import contextlib
        seen = []
        @contextlib.contextmanager
        def counting(name):
            seen.append(name)
            yield
        class Model(nn.Linear):
            @counting("run")
            def run(self): return len(seen)
        model = Model(2, 2)
        """,
        "(m.run(), m.run())",
        (1, 2),
    ),
    "library_with_signatures": Travels(
        """
        import ctypes
        model = nn.Linear(2, 2)
        model.libm = ctypes.CDLL("libm.so.6")
        model.libm.floor.restype = ctypes.c_double
        model.libm.floor.argtypes = [ctypes.c_double]
        """,
        "(m.libm.floor(5.7), m.libm.ceil.restype.__name__)",
        (5.0, "c_int"),
    ),
    "weak_containers_of_a_script": Travels(
        """
        import weakref
        class Named(weakref.WeakValueDictionary):
            def __init__(self, name):
                super().__init__()
                self.name = name
        class Listeners(weakref.WeakSet):
            limit = 3
        model = nn.Sequential(nn.Linear(2, 2))
        model.named = Named("layers")
        model.named["first"] = model[0]
        model.listeners = Listeners([model[0]])
        model.listeners.limit = 5
        """,
        "(m.named.name, m.named['first'] is m[0], m.listeners.limit, m[0] in m.listeners)",
        ("layers", True, 5, True),
    ),
    "bounded_semaphore": Travels(
        """
        import threading
        model = nn.Linear(2, 2)
        model.slots = threading.BoundedSemaphore(2)
        model.slots.acquire()
        """,
        "(m.slots.acquire(blocking=False), m.slots.acquire(blocking=False), m.slots.acquire(blocking=False))",
        (True, True, False),
    ),
    "lru_cache_on_a_method": Travels(
        """
        import functools
        class Model(nn.Linear):
            @functools.lru_cache(maxsize=7)
            def mask(self, n): return [n] * n
        model = Model(2, 2)
        model.mask(3)
        """,
        "(m.mask(2), m.mask(2), tuple(type(m).mask.cache_info()), type(m).mask.__name__)",
        ([2, 2], [2, 2], (1, 1, 7, 1), "mask"),
    ),
    "cache_that_calls_itself": Travels(
        """
        import functools
        @functools.cache
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        class Model(nn.Linear):
            def answer(self): return fib(30)
        model = Model(2, 2)
        """,
        "(m.answer(), m.answer.__func__.__globals__['fib'].cache_info().hits)",
        (832040, 28),
    ),
    "cache_of_a_bound_method": Travels(
        """
        import functools
        class Model(nn.Linear):
            def __init__(self):
                super().__init__(2, 2)
                self.widths = functools.lru_cache(None)(self._widths)
            def _widths(self, n): return n * self.in_features
        model = Model()
        """,
        "(m.widths(4), m.widths.__wrapped__.__self__ is m, m.widths.cache_parameters()['maxsize'])",
        (8, True, None),
    ),
    "cache_on_static_and_class_methods": Travels(
        """
        import functools
        class Model(nn.Linear):
            @staticmethod
            @functools.lru_cache
            def twice(n): return 2 * n
            @classmethod
            @functools.cache
            def name(cls, n): return cls.__name__ * n
        model = Model(2, 2)
        """,
        "(m.twice(4), m.name(2), type(m).twice.cache_info().currsize)",
        (8, "ModelModel", 1),
    ),
    "cached_properties": Travels(
        """
        import functools
        class Named(functools.cached_property):
            '''A subclass.'''
        class Model(nn.Linear):
            @functools.cached_property
            def scale(self): return self.weight.detach().abs().sum() * 0 + 3
            @Named
            def offset(self): return [1]
        model = Model(2, 2)
        """,
        "(float(m.scale), m.scale is m.scale, m.offset is m.offset, type(vars(type(m))['offset']).__name__)",
        (3.0, True, True, "Named"),
    ),
    "single_dispatch": Travels(
        """
        import functools
        @functools.singledispatch
        def show(x): return "object"
        @show.register
        def _(x: int): return f"int {x}"
        @show.register(list)
        def _(x): return [show(item) for item in x]
        class Own: pass
        show.register(Own, lambda x: "own")
        class Model(nn.Linear):
            def show(self, x): return show(x)
        show([1, "a"])
        model = Model(2, 2)
        model.own = Own()
        """,
        "(m.show([1, 'a']), m.show(m.own), m.show.__func__.__globals__['show'].__name__)",
        (["int 1", "object"], "own", "show"),
    ),
    "single_dispatch_method": Travels(
        """
        import functools
        class Model(nn.Linear):
            @functools.singledispatchmethod
            def size(self, x): return -1
            @size.register
            def _(self, x: str): return len(x) * self.in_features
            @functools.singledispatchmethod
            @classmethod
            def kind(cls, x): return cls.__name__
            @kind.register
            @classmethod
            def _(cls, x: int): return x
        model = Model(2, 2)
        """,
        "(m.size(None), m.size('abc'), m.kind('a'), m.kind(4))",
        (-1, 6, "Model", 4),
    ),
    "partial_methods_and_wraps": Travels(
        """
        import functools
        def logged(function):
            @functools.wraps(function)
            def call(*args): return [function.__name__, function(*args)]
            return call
        class Model(nn.Linear):
            def power(self, base, exponent): return base ** exponent
            square = functools.partialmethod(power, exponent=2)
            @logged
            def half(self, x): return x / 2
        model = Model(2, 2)
        """,
        "(m.square(5), m.half(3), type(m).half.__wrapped__(m, 4))",
        (25, ["half", 1.5], 2.0),
    ),
    "context_managers": Travels(
        """
        import contextlib
        class Model(nn.Linear):
            @contextlib.contextmanager
            def swapped(self, value):
                before, self.value = self.value, value
                try: yield self
                finally: self.value = before
        @contextlib.contextmanager
        def entered(log):
            log.append("in")
            yield
            log.append("out")
        class Second(Model):
            def run(self):
                log = []
                with entered(log), self.swapped(4): log.append(self.value)
                return [*log, self.value]
        model = Second(2, 2)
        model.value = 1
        """,
        "m.run()",
        ["in", 4, "out", 1],
    ),
    "decorators_of_torch": Travels(
        """
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x
            @staticmethod
            def backward(ctx, grad): return 2 * ctx.saved_tensors[0] * grad
        class Model(nn.Linear):
            @torch.no_grad()
            def plain(self): return self.weight.requires_grad_().sum().requires_grad
            @torch.inference_mode()
            def infer(self): return self.weight.sum().is_inference()
            @torch.autocast("cpu", dtype=torch.bfloat16)
            def cast(self): return str((self.weight @ self.weight).dtype)
            @torch.compiler.disable
            def eager(self): return 1
            def slope(self):
                x = torch.tensor(3.0, requires_grad=True)
                return float(torch.autograd.grad(Square.apply(x), x)[0])
        model = Model(2, 2)
        """,
        "(m.plain(), m.infer(), m.cast(), m.eager(), m.slope())",
        (False, True, "torch.bfloat16", 1, 6.0),
    ),
    "locks": Travels(
        """
        import threading
        class Model(nn.Linear):
            guard = threading.RLock()
            def __init__(self):
                super().__init__(2, 2)
                self.lock, self.same = (lock := threading.Lock()), lock
                self.ready, self.semaphore = threading.Event(), threading.BoundedSemaphore(2)
                self.changed = threading.Condition(self.lock)
        model = Model()
        model.ready.set()
        model.lock.acquire()
        """,
        "(m.lock is m.same, m.lock.acquire(False), m.changed._lock is m.lock, m.ready.is_set(), "
        "m.semaphore.acquire() and m.semaphore.acquire() and not m.semaphore.acquire(False), "
        "type(m).guard.acquire())",
        (True, True, True, True, True, True),
    ),
    "queues_and_pools": Travels(
        """
        import concurrent.futures, logging, queue, sys
        class Model(nn.Linear):
            def __init__(self):
                super().__init__(2, 2)
                self.jobs, self.simple = queue.Queue(3), queue.SimpleQueue()
                self.pool = concurrent.futures.ThreadPoolExecutor(2, "own")
                self.handler, self.out = logging.StreamHandler(), sys.stderr
                self.result = self.pool.submit(int, "4")
        model = Model()
        model.jobs.put("first")
        model.result.result()
        """,
        "(m.jobs.get(), m.jobs.maxsize, m.simple.empty(), m.pool.submit(abs, -3).result(), "
        "m.pool._max_workers, m.handler.level, m.out.writable(), m.result.result())",
        ("first", 3, True, 3, 2, 0, True, 4),
    ),
    "shared_library": Travels(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        class Model(nn.Linear):
            def absolute(self, n): return libc.abs(n)
        model = Model(2, 2)
        model.libc = libc
        """,
        "(m.absolute(-3), m.libc.abs(-4))",
        (3, 4),
    ),
    "weak_references": Travels(
        """
        import weakref
        class Model(nn.Sequential):
            def parent(self): return self.owner()
        model = nn.Sequential(Model(nn.Linear(2, 2)), nn.Linear(2, 2))
        model[0].owner = weakref.ref(model)
        model[0].names = weakref.WeakValueDictionary(own=model[1], other=model[0][0])
        model[0].notes = weakref.WeakKeyDictionary({model[1]: "note"})
        model[0].all = weakref.WeakSet([model, model[1]])
        model[0].method = weakref.WeakMethod(model.extend)
        model[0].gone = weakref.ref(nn.Linear(1, 1))
        """,
        "(m[0].parent() is m, m[0].names['own'] is m[1], m[0].notes[m[1]], set(m[0].all) == {m, m[1]}, "
        "m[0].method().__self__ is m, m[0].gone())",
        (True, True, "note", True, True, None),
    ),
    "weak_containers_forget_what_is_not_shared": Travels(
        """
        import weakref
        outside = nn.Linear(1000, 1000)
        model = nn.Linear(2, 2)
        model.values = weakref.WeakValueDictionary(outside=outside)
        model.all = weakref.WeakSet([outside, model])
        """,
        "(len(m.values), len(m.all))",
        (0, 1),
    ),
    "names_of_types": Travels(
        """
        import typing
        P, T = typing.ParamSpec("P"), typing.TypeVar("T")
        Id = typing.NewType("Id", int)
        def logged(function: typing.Callable[P, T]) -> typing.Callable[P, T]:
            def call(*args: P.args, **kwargs: P.kwargs) -> T: return function(*args, **kwargs)
            return call
        class Box(typing.Generic[T]): pass
        class Model(nn.Linear):
            @logged
            def find(self, number: Id) -> Id: return Id(number)
            box = Box[Id]
        model = Model(2, 2)
        model.kind = Id
        """,
        "(m.find(3), m.kind(4), m.kind.__name__, m.kind.__supertype__)",
        (3, 4, "Id", int),
    ),
    "compiled_functions": Travels(
        """
        @torch.compile(backend="eager", dynamic=True)
        def double(x): return x * 2
        class Model(nn.Linear):
            @torch.compile(backend="eager", fullgraph=True)
            def forward(self, x): return double(super().forward(x))
        model = Model(2, 2)
        """,
        "(m(torch.ones(1, 2)).equal(2 * torch.nn.functional.linear(torch.ones(1, 2), m.weight, m.bias)), "
        "options(type(m).forward), options(type(m).forward._torchdynamo_orig_callable.__globals__['double']))",
        (
            True,
            {"backend": "eager", "fullgraph": True, "dynamic": None},
            {"backend": "eager", "fullgraph": False, "dynamic": True},
        ),
    ),
    "compiled_bound_methods": Travels(
        """
        def backend(graph, inputs): return graph.forward
        class Model(nn.Linear):
            def __init__(self):
                super().__init__(2, 2)
                self.forward = torch.compile(self.forward, backend=backend)
                self.run = torch.compile(self._run, mode="reduce-overhead", dynamic=False)
            def _run(self, x): return x
        model = Model()
        """,
        "(m(torch.ones(1, 2)).shape, options(m.forward)['backend'].__name__, options(m.run), "
        "m.run._torchdynamo_orig_callable.__self__ is m)",
        (
            (1, 2),
            "backend",
            {"fullgraph": False, "dynamic": False, "options": {"triton.cudagraphs": True}},
            True,
        ),
    ),
    "context_variables": Travels(
        """
        import contextvars
        depth = contextvars.ContextVar("depth", default=3)
        class Model(nn.Linear):
            def depth(self):
                token = depth.set(depth.get() + 1)
                try: return depth.get()
                finally: depth.reset(token)
        model = Model(2, 2)
        """,
        "(m.depth(), m.depth())",
        (4, 4),
    ),
}


@pytest.mark.parametrize("name", TRAVELS)
def test_travels_to_a_worker(name: str, two_actors: list[Any]) -> None:
    """A script's model works in a worker as here, with empty caches and fresh locks."""
    source, expression, expected = TRAVELS[name]
    model = run_as_script(source)["model"]
    assert evaluate_in_worker(two_actors[0], model, expression) == expected


class Refused(NamedTuple):
    """A script that makes `model`, the path of the part that cannot travel, the cause, and the remedy."""

    source: str
    path: str
    cause: str
    remedy: str


REFUSED = {
    "taken_semaphore": Refused(
        """
        import threading
        model = nn.Linear(2, 2)
        model.slots = threading.Semaphore(1)
        model.slots.acquire()
        """,
        r"Linear\.slots is a threading\.Semaphore",
        "it is taken",
        "Release it before sharing",
    ),
    "context_variable_with_a_value": Refused(
        """
        import contextvars
        scale = contextvars.ContextVar("scale", default=1.0)
        scale.set(0.5)
        class Model(nn.Linear):
            def forward(self, x): return x * scale.get()
        model = Model(2, 2)
        """,
        r"Linear|Model",
        "belongs to a context of this process",
        "Set the value in the worker",
    ),
    "temporary_directory": Refused(
        "import tempfile\nmodel = nn.Linear(2, 2)\nmodel.folder = tempfile.TemporaryDirectory()\n"
        "import types\nfiles = [types.SimpleNamespace(close=model.folder.cleanup)]",
        r"Linear\.folder is a tempfile\.TemporaryDirectory",
        "deletes its folder",
        "Create the directory in the worker",
    ),
    "finalizer": Refused(
        "import weakref\nmodel = nn.Linear(2, 2)\nmodel.end = weakref.finalize(model, print)",
        r"Linear\.end is a weakref\.finalize",
        "when an object of this process ends",
        "Create it in the worker",
    ),
    "weak_reference_with_a_state": Refused(
        """
        import weakref
        class Named(weakref.ref):
            pass
        model = nn.Sequential(nn.Linear(2, 2))
        model.first = Named(model[0])
        model.first.name = "first"
        """,
        r"Sequential\.first is a .*Named",
        "a state of its own",
        r"Hold a weakref\.ref",
    ),
    "weak_reference_to_what_getstate_drops": Refused(
        """
        import weakref
        class Trainer:
            pass
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 2)
                self.trainer = Trainer()
                self.back = weakref.ref(self.trainer)
            def __getstate__(self): return {k: v for k, v in self.__dict__.items() if k != "trainer"}
        model = Model()
        """,
        r"Model\.back is a weakref",
        "Trainer is not a part of the object that is shared",
        "Hold the object itself",
    ),
    "global_of_a_script": Refused(
        """
        import threading
        worker = threading.Thread(target=print)
        pool = {"thread": __import__("os").scandir(".")}
        class Model(nn.Linear):
            @property
            def entries(self): return pool
        model = Model(2, 2)
        files = [pool["thread"]]
        """,
        r"Model.*scandir|Model.*ScandirIterator",
        "travels by value and brings it along",
        "to a module that workers can import",
    ),
    "state_of_reduce_that_nothing_sets": Refused(
        """
        class Scale:
            def __init__(self, by): self.by = by
            def __reduce__(self): return Scale, (1,), ("by", self.by)
        model = nn.Linear(2, 2)
        model.scale = Scale(2)
        """,
        r"Linear\.scale is a .*Scale",
        "a str where pickle takes a dict",
        "Give the class a __setstate__",
    ),
    "state_of_reduce_that_is_a_list": Refused(
        """
        import copyreg
        class Scale:
            def __reduce_ex__(self, protocol): return copyreg.__newobj__, (Scale,), [1, 2]
        model = nn.Linear(2, 2)
        model.scale = Scale()
        """,
        r"Linear\.scale is a .*Scale",
        "a list where pickle takes a dict",
        "Give the class a __setstate__",
    ),
    "state_of_reduce_without_a_dict": Refused(
        """
        def make(): return Scale()
        class Scale:
            __slots__ = ("by",)
            def __reduce__(self): return make, (), {"by": 2}
        model = nn.Linear(2, 2)
        model.scale = Scale()
        """,
        r"Linear\.scale is a .*Scale",
        "the object has no __dict__",
        "Give the class a __setstate__",
    ),
    "unflattened_program": Refused(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(2, 2)
            def forward(self, x): return self.inner(x)
        model = torch.export.unflatten(torch.export.export(Net(), (torch.ones(1, 2),)))
        """,
        r"UnflattenedModule",
        "cannot pickle",
        r"torch\.export\.unflatten\(program\) in the worker",
    ),
    "open_file": Refused(
        "import os\nmodel = nn.Linear(2, 2)\nmodel.log = open(os.devnull)\nfiles = [model.log]",
        r"Linear\.log is a _io\.TextIOWrapper",
        "open in this process at '/dev/null'",
        "Keep the path",
    ),
    "binary_file_in_an_object": Refused(
        """
        import os, types
        model = nn.Linear(2, 2)
        model.io = types.SimpleNamespace(f=open(os.devnull, "wb"))
        files = [model.io.f]
        """,
        r"Linear\.io\.f is a _io\.BufferedWriter",
        "/dev/null",
        "Keep the path",
    ),
    "file_of_a_logging_handler": Refused(
        """
        import logging, os
        model = nn.Linear(2, 2)
        model.handler = logging.FileHandler(os.devnull)
        files = [model.handler]
        """,
        r"Linear\.handler\.stream is a _io",
        "/dev/null",
        "Keep the path",
    ),
    "generator": Refused(
        "def steps():\n    yield 1\nmodel = nn.Linear(2, 2)\nmodel.steps = steps()",
        r"Linear\.steps is a builtins\.generator",
        "of steps",
        "Keep the function that makes the generator",
    ),
    "generator_inside_an_iterator": Refused(
        "model = nn.Linear(2, 2)\nmodel.steps = [(i for i in 'ab')]",
        r"Linear\.steps\[0\] is a builtins\.generator",
        "genexpr",
        "list of its items",
    ),
    "thread": Refused(
        "import threading\nmodel = nn.Linear(2, 2)\nmodel.loop = threading.Thread(target=print)",
        r"Linear\.loop is a threading\.Thread",
        "runs in this process",
        "Start the thread in the worker",
    ),
    "process_pool": Refused(
        "import concurrent.futures as c\nmodel = nn.Linear(2, 2)\nmodel.pool = c.ProcessPoolExecutor(1)",
        r"Linear\.pool is a concurrent\.futures\.process\.ProcessPoolExecutor",
        "starts processes",
        "Create the executor in the worker",
    ),
    "child_process": Refused(
        "import subprocess\nmodel = nn.Linear(2, 2)\nmodel.child = subprocess.Popen(['true'])\nmodel.child.wait()",
        r"Linear\.child is a subprocess\.Popen",
        "child of this process",
        "Start the program in the worker",
    ),
    "full_simple_queue": Refused(
        "import queue\nmodel = nn.Linear(2, 2)\nmodel.jobs = queue.SimpleQueue()\nmodel.jobs.put(1)",
        r"Linear\.jobs is a _queue\.SimpleQueue",
        "holds 1 items",
        r"queue\.Queue",
    ),
    "pending_future": Refused(
        "import concurrent.futures as c\nmodel = nn.Linear(2, 2)\nmodel.answer = c.Future()",
        r"Linear\.answer is a concurrent\.futures\._base\.Future",
        "no result yet",
        r"result\(\)",
    ),
    "values_of_a_thread": Refused(
        "import threading\nmodel = nn.Linear(2, 2)\nmodel.now = threading.local()\nmodel.now.x = 1",
        r"Linear\.now is a _thread\._local",
        "threads of this process",
        "plain attribute",
    ),
    "weak_reference_to_the_outside": Refused(
        "import weakref\nowner = nn.Linear(3, 3)\nmodel = nn.Linear(2, 2)\nmodel.owner = weakref.ref(owner)",
        r"Linear\.owner is a weakref\.ReferenceType",
        "nothing would keep it alive",
        "Hold the object itself",
    ),
    "weak_proxy": Refused(
        "import weakref\nmodel = nn.Sequential(nn.Linear(2, 2))\nvars(model[0])['owner'] = weakref.proxy(model)",
        r"Sequential\.0\.owner is a weakref\.CallableProxyType",
        "acts as its referent",
        r"weakref\.ref",
    ),
    "object_that_reduces_to_a_name": Refused(
        """
        class Marker:
            def __reduce__(self): return "MISSING"
        MISSING = Marker()
        model = nn.Linear(2, 2)
        model.default = [MISSING]
        """,
        r"Linear\.default\[0\] is a __main__\.Marker",
        r"as the name __main__\.MISSING",
        "Define it in a module",
    ),
    "name_in_a_function": Refused(
        """
        class Marker:
            def __reduce__(self): return "MISSING"
        MISSING = Marker()
        model = nn.Linear(2, 2)
        model.function = lambda x: x is MISSING
        """,
        r"Linear\.function\.<global MISSING> is a __main__\.Marker",
        r"as the name __main__\.MISSING",
        "__reduce__",
    ),
    "name_in_a_class": Refused(
        """
        class Marker:
            def __reduce__(self): return "MISSING"
        MISSING = Marker()
        class Model(nn.Linear):
            default = MISSING
        model = nn.Sequential(Model(2, 2))
        """,
        r"Sequential\.0\.__class__\.default is a __main__\.Marker",
        r"as the name __main__\.MISSING",
        "__reduce__",
    ),
    "attribute_with_the_name_of_a_global": Refused(
        """
        import select
        clock = select.poll()
        class Model(nn.Linear):
            def forward(self, x): return self.clock
        model = Model(2, 2)
        model.held = [select.poll()]
        """,
        r"Model\.held\[0\] is a select\.poll",
        "cannot pickle",
        r"leave it out in Model\.__getstate__",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_at_prepare(name: str, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a state of this process is refused with its path, the cause and a remedy."""
    source, path, cause, remedy = REFUSED[name]
    names = run_as_script(source)
    # A script is __main__, where pickle finds its names.
    for name in names.keys() - {"__name__", "__builtins__", "torch", "nn"}:
        monkeypatch.setattr(sys.modules["__main__"], name, names[name], raising=False)
    with pytest.raises(TypeError, match=rf"(?s){path}.*{cause}.*{remedy}"):
        prepare_model_for_actors(names["model"])
    for file in names.get("files", ()):
        file.close()


@functools.lru_cache
def importable_cache(n: int) -> int:
    """Be found by name."""
    return n


def test_importable_caches_travel_by_name(two_actors: list[Any]) -> None:
    """A cached function of a module is the worker's own."""
    model = torch.nn.Linear(2, 2)
    model.helper = importable_cache
    expression = "m.helper is __import__('test_functions').importable_cache"
    assert evaluate_in_worker(two_actors[0], model, expression)


def call_compiled(model_ref: Any) -> str:
    """Return the error of a model whose compiler does not exist."""
    os.environ["CXX"] = "no_such_compiler"
    torch._inductor.config.cpp.cxx = ("no_such_compiler",)
    try:
        load_model_in_actor(model_ref)(torch.ones(2, 2))
    except Exception as error:
        return str(error)
    return ""


def test_an_error_of_a_compiler_names_the_function(two_actors: list[Any]) -> None:
    """Where a worker has no C++ compiler, the error says which function was to be compiled, and what to do."""
    model = run_as_script(
        """
        class Model(nn.Linear):
            @torch.compile
            def forward(self, x): return super().forward(x).sin()
        model = Model(2, 2)
        """
    )["model"]
    said = ray.get(two_actors[1].run.remote(call_compiled, prepare_model_for_actors(model)))
    assert "torch.compile of Model.forward failed in this process" in said
    assert "g++" in said


# ---------------------------------------------------------------- depth


def nested_modules(depth: int) -> Any:
    model: Any = torch.nn.Linear(2, 2)
    for _ in range(depth):
        model = torch.nn.Sequential(model)
    return model


def nested_lists(depth: int) -> Any:
    held: Any = torch.nn.Linear(2, 2)
    for number in range(depth):
        held = [held] if number % 2 else {"inner": held}
    return held


def nested_objects(depth: int) -> Any:
    held: Any = torch.nn.Linear(2, 2)
    for _ in range(depth):
        outer = types.SimpleNamespace(inner=held)
        held = outer
    return held


def depth_of(model_ref: Any) -> int:
    """Load a model, and count how deep it is nested."""
    return depth_of_object(load_model_in_actor(model_ref))


def depth_of_object(held: Any) -> int:
    depth = 0
    while not isinstance(held, torch.nn.Linear):
        held = held.inner if hasattr(held, "inner") else held["inner"] if isinstance(held, dict) else held[0]
        depth += 1
    return depth if not held.training else -1


# Python 3.12 has a fixed limit for code in C, such as pickle's: 1,500 calls in its first releases.
FIXED_LIMIT = sys.version_info >= (3, 12)


@pytest.mark.parametrize("nest", [nested_modules, nested_lists, nested_objects])
def test_deep_nesting(nest: Any, two_actors: list[Any]) -> None:
    """Parts nested 400 deep travel, and arrive in eval mode; Python's recursion limit is as before."""
    limit, refused = sys.getrecursionlimit(), ""
    try:
        ref = prepare_model_for_actors(nest(400))
    except TypeError as error:
        refused = str(error)
    assert sys.getrecursionlimit() == limit
    if refused:
        assert FIXED_LIMIT
        assert re.search(r"nested 40\d deep, too deep for pickle.*ModuleList", refused)
    else:
        assert ray.get(two_actors[0].run.remote(depth_of, ref)) == 400


def test_an_error_in_deep_nesting(ray_session: None) -> None:
    """A part that cannot travel is named, however deep it is; what is too deep is an error with the depth."""
    model = nested_modules(300)
    part = model
    while isinstance(part, torch.nn.Sequential):
        part = part[0]
    part.steps = (i for i in "ab")
    named = r"cannot be shared: Sequential\.0.*\.steps is a builtins\.generator"
    with pytest.raises(TypeError, match=rf"{named}|nested 30\d deep" if FIXED_LIMIT else named):
        prepare_model_for_actors(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deep, "DEEPEST", 1000)
        with pytest.raises(TypeError, match=r"nested 300\d* deep.*ModuleList"):
            prepare_model_for_actors(nested_lists(3000))


# ---------------------------------------------------------------- hooks that fill a global


FILLS = {
    "forum": (
        """
        activations = {}
        def get_activation(name):
            def hook(model, input, output):
                activations[name] = output.detach()
            return hook
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].register_forward_hook(get_activation("fc"))
        """,
        r"Sequential\.0 has the hook get_activation\.<locals>\.hook.*global 'activations'.*module\.activations = {}",
    ),
    "list": (
        "seen = []\nmodel = nn.Linear(2, 2)\nmodel.register_forward_pre_hook(lambda m, args: seen.append(args))",
        r"Linear has the hook <lambda>.*global 'seen'",
    ),
    "nested_container": (
        """
        import functools
        store = {"layers": {}}
        def keep(name, module, args, output): store["layers"][name] = output
        model = nn.Linear(2, 2)
        model.register_forward_hook(functools.partial(keep, "a"))
        """,
        r"hook keep.*global 'store'",
    ),
    "assignment": (
        """
        last = None
        def keep(module, args, output):
            global last
            last = output
        model = nn.Linear(2, 2)
        model.register_forward_hook(keep)
        """,
        r"hook keep.*global 'last'",
    ),
    "closure_over_a_global": (
        """
        store = {}
        def make(target, name):
            def hook(module, args, output): target[name] = output
            return hook
        model = nn.Linear(2, 2)
        model.register_forward_hook(make(store, "a"))
        """,
        r"hook make\.<locals>\.hook.*global 'store'",
    ),
    "through_helpers": (
        """
        store = {}
        def put(name, value): store[name] = value
        def note(value): put("out", value)
        def keep(module, args, output): note(output)
        model = nn.Linear(2, 2)
        model.register_forward_hook(keep)
        """,
        r"hook keep.*global 'store'",
    ),
}


@pytest.mark.parametrize("name", FILLS)
def test_a_hook_that_fills_a_global_is_a_warning(name: str, ray_session: None) -> None:
    """The warning names the module, the hook and the global, and says what works."""
    source, words = FILLS[name]
    model = run_as_script(source)["model"]
    with pytest.warns(ZeroCopyWarning, match=words):
        prepare_model_for_actors(model)


def test_hooks_that_work_are_no_warning(two_actors: list[Any]) -> None:
    """A hook that stores on the model, or into a global that the model reads, works in a worker without a warning."""
    model = run_as_script(
        """
        CACHE, CONFIG = {}, {"scale": 2}
        def keep(module, args, output): module.kept["out"] = output * CONFIG["scale"]
        def increase(): CACHE["calls"] = CACHE.get("calls", 0) + 1
        def count(module, args, output): increase()
        def read(): return CACHE["calls"]
        class Model(nn.Linear):
            def calls(self): return read()
        model = Model(2, 2)
        model.kept = {}
        model.register_forward_hook(keep)
        model.register_forward_hook(count)
        """
    )["model"]
    expression = "(m(torch.ones(1, 2)) * 2).equal(m.kept['out']) and m.calls()"
    assert evaluate_in_worker(two_actors[0], model, expression) == 1


FILLED: dict[str, Any] = {}


def make_hook(name: str) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        FILLED[name] = output

    return hook


def test_a_hook_of_a_module_fills_the_module_of_the_worker(two_actors: list[Any]) -> None:
    """A local function of an importable module stores into the global of that module in the worker."""
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(make_hook("here"))
    expression = "m(torch.ones(1, 2)).equal(__import__('test_functions').FILLED.pop('here'))"
    assert evaluate_in_worker(two_actors[0], model, expression)


# ---------------------------------------------------------------- code of classes that fails in the worker


class NeedsKey(nn.Linear):
    """A class of a library that subclasses have to give a key."""

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


class ChecksKey(nn.Linear):
    """The same, but the signature does not tell."""

    def __init_subclass__(cls, **options: str) -> None:
        if "key" not in options:
            raise TypeError("a key is missing")
        super().__init_subclass__()


def test_a_class_of_a_library_that_takes_keywords(two_actors: list[Any]) -> None:
    """Keywords that `__init_subclass__` of a library needs do not travel: an error with the cause and what to do.

    The error is raised at prepare where the signature tells, and otherwise in the worker.
    """
    for base, key in (("NeedsKey", "argument: 'key'"), ("ChecksKey", "a key is missing")):
        model = run_as_script(f"from {__name__} import {base}\nclass M({base}, key='a'): pass\nmodel = M(2, 2)")[
            "model"
        ]
        if base == "NeedsKey":
            with pytest.raises(TypeError, match=rf"M\.__class__ is .*{base}.*{key}.*module that workers can import"):
                prepare_model_for_actors(model)
        else:
            with pytest.raises(
                ZeroCopyError, match=rf"M cannot be rebuilt.*TypeError.*{key}.*that workers can import"
            ):
                evaluate_in_worker(two_actors[0], model, "m")


OLD_SCRIPT = """
import torch
from torch import nn
class Old(torch.jit.ScriptModule):
    @torch.jit.script_method
    def forward(self, x):
        return x * 2
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.old = Old()
    def forward(self, x): return self.old(x)
"""


def test_a_script_method_of_a_script(tmp_path: Path, two_actors: list[Any]) -> None:
    """An object of a ScriptModule class travels. A class of a script that names the ScriptModule class is refused."""
    file = tmp_path / "old.py"  # torch reads the source
    file.write_text(OLD_SCRIPT)
    names: dict[str, Any] = {"__name__": "__main__"}
    quietly(lambda: exec(compile(OLD_SCRIPT, str(file), "exec"), names))
    old = quietly(names["Old"])
    assert evaluate_in_worker(two_actors[0], old, "m(torch.ones(1)).item()") == 2.0
    with pytest.raises(
        TypeError, match=r"<global Old>\._methods\['forward'\].* it is Old\.forward.*as an nn\.Module"
    ):
        prepare_model_for_actors(quietly(names["Net"]))


def test_values_of_threads_in_deep_nesting(ray_session: None) -> None:
    """A `threading.local` is refused however deep it is: another thread pickles deep objects."""
    values = threading.local()
    values.scale = 2.0
    model = {"deep": nested_lists(400), "values": values}
    with pytest.raises(TypeError, match=r"belong to threads of this process|too deep for pickle"):
        prepare_model_for_actors(model)
