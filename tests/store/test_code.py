"""A model is also code: modules that workers cannot import travel by value, or the error names them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import Runner
from models import CASES, quietly
from torch import nn

from ray_zerocopy import (
    ZeroCopyError,
    ZeroCopyPredictor,
    load_model_in_actor,
    load_pipeline_in_actor,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._store.ref import Header
from ray_zerocopy.invoke import call_model, rewrite_pipeline

# ---------------------------------------------------------------- modules that live in this process only

CODE = """
import functools
import torch
from torch import nn

SCALE = {"factor": 2.0}

@functools.lru_cache
def factor():
    return SCALE["factor"]

class Base(nn.Linear):
    pass

class Net(Base):
    def __init__(self):
        super().__init__(2, 2)
    def forward(self, x):
        return super().forward(x) * factor()
"""


def run_here(kept: dict[str, Any], model_ref: Any, x: torch.Tensor) -> Any:
    """Load a model, and return the name of its module and what it computes."""
    model = load_model_in_actor(model_ref)
    return type(model).__module__, model(x), type(model).__module__ in sys.modules


def same_in_worker(actor: Any, model: Any) -> str:
    """Check that a worker computes the same without the model's module; return the module's name."""
    x = torch.randn(3, model.in_features)
    name, y, has_module = ray.get(actor.run_kept.remote(run_here, prepare_model_for_actors(model), x))
    assert torch.equal(y, model(x))
    assert not has_module
    return name


@pytest.fixture
def forget_modules() -> Iterator[None]:
    """Remove the modules that a test imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_from_a_file(tmp_path: Path, two_actors: list[Any], forget_modules: None) -> None:
    """A module that was loaded from a path, which no import finds, travels by value."""
    (tmp_path / "code.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("from_a_path", tmp_path / "code.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["from_a_path"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    assert same_in_worker(two_actors[0], module.Net()) == "from_a_path"
    assert "from_a_path" not in ray.cloudpickle.list_registry_pickle_by_value()


def test_a_module_from_a_removed_path(tmp_path: Path, two_actors: list[Any], forget_modules: None) -> None:
    """A package whose folder was on the path only while it was imported, as by torch.hub, travels by value."""
    (tmp_path / "hubcode").mkdir()
    (tmp_path / "hubcode" / "__init__.py").write_text("")
    (tmp_path / "hubcode" / "net.py").write_text(
        CODE.replace("SCALE = ", "from . import parts\nSCALE = parts.SCALE or ")
    )
    (tmp_path / "hubcode" / "parts.py").write_text("SCALE = {'factor': 3.0}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from hubcode.net import Net
    finally:
        sys.path.remove(str(tmp_path))
    assert same_in_worker(two_actors[0], Net()) == "hubcode.net"


def test_a_module_made_by_hand(two_actors: list[Any], forget_modules: None) -> None:
    """A module that was made in memory travels by value, also where a function refers to the module."""
    module = sys.modules["in_memory"] = types.ModuleType("in_memory")
    exec(CODE.replace("return SCALE", "import in_memory\n    return SCALE"), module.__dict__)
    net = module.Net()
    net.module_ = module
    ref = prepare_model_for_actors(net)
    x = torch.randn(3, 2)
    with pytest.raises(ray.exceptions.RayTaskError, match="No module named 'in_memory'"):
        ray.get(two_actors[0].run_kept.remote(run_here, ref, x))  # the import inside the function is the user's
    exec(CODE, module.__dict__)
    net = module.Net()
    net.module_ = module
    assert same_in_worker(two_actors[0], net) == "in_memory"


REMOTE_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .parts import Scale

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.width, config.width)
        self.scale = Scale()
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, x):
        return BaseModelOutput(last_hidden_state=self.scale(self.layer(x)))
"""


def remote_code_model(folder: Path) -> Any:
    """Build a model with trust_remote_code, as from a repository on the Hub."""
    from transformers import AutoModel

    folder.mkdir()
    (folder / "own_model.py").write_text(REMOTE_CODE)
    (folder / "parts.py").write_text(
        "from torch import nn\nclass Scale(nn.Module):\n    def forward(self, x):\n        return x * 3\n"
    )
    (folder / "config.json").write_text(
        '{"model_type": "own", "width": 8, "auto_map": {"AutoConfig": "own_model.OwnConfig", '
        '"AutoModel": "own_model.OwnModel"}}'
    )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModel.from_config(config, trust_remote_code=True).eval()


def run_remote_code(kept: dict[str, Any], model_ref: Any, x: torch.Tensor) -> Any:
    """Load a model of remote code and return what it computes, and facts about its classes."""
    model = load_model_in_actor(model_ref)
    return model(x).last_hidden_state, type(model).__name__, model.config.width, model.dtype, model.device


@pytest.mark.parametrize("registered", ["nothing", "ray", "cloudpickle"])
def test_trust_remote_code(
    registered: str, tmp_path: Path, two_actors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of trust_remote_code travels by value, whether or not the user registered its module."""
    import cloudpickle

    model = remote_code_model(tmp_path / f"repo_{registered}")
    package = sys.modules["transformers_modules"]
    register = {"ray": ray.cloudpickle, "cloudpickle": cloudpickle}.get(registered)
    if register:
        register.register_pickle_by_value(package)
    try:
        x = torch.randn(2, 8)
        got = ray.get(two_actors[1].run_kept.remote(run_remote_code, prepare_model_for_actors(model), x))
    finally:
        if register:
            register.unregister_pickle_by_value(package)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(got[0], model(x).last_hidden_state)
    assert got[1:] == ("OwnModel", 8, torch.float32, torch.device("cpu"))
    assert "transformers_modules" not in ray.cloudpickle.list_registry_pickle_by_value()


# ---------------------------------------------------------------- modules beside the script


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None, ray_session: None) -> Any:
    """Import a module that only the driver has on its path."""
    (tmp_path / "beside_the_script.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("beside_the_script")


class Passes(ZeroCopyPredictor):
    """Give a column to the model as it is, and keep its output."""

    input_columns = "x"
    output_column = "y"


def _load(*args: Any) -> None:
    load_model_in_actor(*args)


def _load_in_pipeline(*args: Any) -> None:
    load_pipeline_in_actor(*args)


def _load_model(net: Any, actor: Any) -> None:
    ray.get(actor.run.remote(_load, prepare_model_for_actors(net)))


def _load_pipeline(net: Any, actor: Any) -> None:
    ray.get(actor.run.remote(_load_in_pipeline, *rewrite_pipeline_for_actors({"net": net})))


def _call(net: Any, actor: Any) -> None:
    ray.get(call_model.remote(prepare_model_for_actors(net), (torch.ones(1, 2),)))


def _rewritten(net: Any, actor: Any) -> None:
    rewrite_pipeline({"net": net})["net"](torch.ones(1, 2))


def _predictor(net: Any, actor: Any) -> None:
    ref = prepare_model_for_actors(net)
    ray.get(actor.run.remote(lambda: Passes.using(ref)() and None))


@pytest.mark.parametrize("way", [_load_model, _load_pipeline, _call, _rewritten, _predictor])
def test_a_class_that_workers_cannot_import(way: Any, beside: Any, two_actors: list[Any]) -> None:
    """Every way of loading names model, class, module and the remedies; by value the model works."""
    with pytest.raises(
        ZeroCopyError,
        match=r"(Net|dict).*beside_the_script\.Net.*cannot import beside_the_script.*working_dir.*py_modules"
        r".*PYTHONPATH.*register_pickle_by_value\(beside_the_script\)",
    ):
        way(beside.Net(), two_actors[0])
    ray.cloudpickle.register_pickle_by_value(beside)
    try:
        way(beside.Net(), two_actors[0])
        assert same_in_worker(two_actors[0], beside.Net()) == "beside_the_script"
    finally:
        ray.cloudpickle.unregister_pickle_by_value(beside)


def test_other_causes_of_a_missing_class(
    tmp_path: Path, beside: Any, two_actors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that a module imports, another version of a module, and a module of a script's function are named."""
    other = tmp_path / "worker"
    other.mkdir()
    path = ray.get(two_actors[0].run.remote(eval, f"__import__('sys').path.insert(0, {str(other)!r})"))
    assert path is None
    (other / "beside_the_script.py").write_text("import not_installed\n")
    with pytest.raises(ZeroCopyError, match=r"no module 'not_installed'.*'pip': \['not_installed'\]"):
        _load_model(beside.Net(), two_actors[0])
    (other / "beside_the_script.py").write_text("Net2 = 3\n")
    with pytest.raises(ZeroCopyError, match=r"another beside_the_script \(.*worker/beside_the_script\.py\).*Net"):
        _load_model(beside.Net(), two_actors[0])
    names: dict[str, Any] = {"__name__": "__main__", "tools": beside, "nn": torch.nn}
    exec("class Own(nn.Linear):\n    def forward(self, x): return tools.SCALE", names)
    with pytest.raises(ZeroCopyError, match=r"needs the module beside_the_script, and this worker cannot import"):
        _load_model(names["Own"](2, 2), two_actors[1])


# ---------------------------------------------------------------- operators

OPERATORS = """
import torch
from torch import Tensor

@torch.library.custom_op("modops::scale", mutates_args=())
def scale(x: Tensor, k: float) -> Tensor:
    return x * k

@scale.register_fake
def _(x, k):
    return torch.empty_like(x)

oldlib = torch.library.Library("oldops", "DEF")
oldlib.define("twice(Tensor x) -> Tensor")

@torch.library.impl(oldlib, "twice", "CPU")
def twice(x):
    return x * 2

torch.library.define("NEWops::thrice", "(Tensor x) -> Tensor")

@torch.library.impl("NEWops::thrice", "CPU")
def thrice(x):
    return x * 3

@torch.library.register_fake("newops::thrice")
def _(x):
    return torch.empty_like(x)
"""

# A model whose module does not import the operators: the driver has imported them for it.
USER = """
import torch
from torch import nn

class Uses(nn.Linear):
    def forward(self, x):
        return torch.ops.newops.thrice(torch.ops.modops.scale(super().forward(x), 2.0))

class UsesOld(nn.Linear):
    def forward(self, x):
        return torch.ops.oldops.twice(super().forward(x))

def twice(x: torch.Tensor):
    return torch.ops.oldops.twice(x)

class Forks(nn.Module):
    def forward(self, x):
        return torch.jit.wait(torch.jit.fork(twice, x))
"""

# Apart, because the functions of a model's module are read as well.
DESCRIPTORS = """
import torch
from torch import nn

class UsesInStatic(nn.Linear):
    @staticmethod
    def twice(x):
        return torch.ops.oldops.twice(x)

    def forward(self, x):
        return self.twice(super().forward(x))

class UsesInProperty(nn.Linear):
    @property
    def doubled(self):
        return torch.ops.oldops.twice(self.weight)

    def forward(self, x):
        return x @ self.doubled.T
"""


@pytest.fixture(scope="module")
def worker_folder(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[Any]:
    """Start an actor that can import modules of operators, and import them here."""
    folder = tmp_path_factory.mktemp("on_workers")
    (folder / "opsmodule.py").write_text(OPERATORS.replace("NEW", "new"))
    (folder / "usermodule.py").write_text(USER)
    (folder / "descriptormodule.py").write_text(DESCRIPTORS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def fresh_actor(folder: Path | None) -> Any:
    """Start an actor that has imported neither operators nor models, and can do so if it has a folder."""
    path = os.pathsep.join([os.environ["PYTHONPATH"], *([str(folder)] if folder else [])])
    environment = {"env_vars": {"PYTHONPATH": path}}
    return ray.remote(num_cpus=0.1, runtime_env=environment)(Runner).remote()


def compute(model_ref: Any, x: torch.Tensor) -> torch.Tensor:
    model = load_model_in_actor(model_ref)
    result = (model.module() if isinstance(model, torch.export.ExportedProgram) else model)(x)
    return result[0] if isinstance(result, tuple) else getattr(result, "y", result)


X = torch.randn(2, 4)


def operator_models() -> dict[str, Any]:
    """Return models that call operators which Python registered."""
    import descriptormodule
    import opsmodule
    import usermodule

    uses, old = usermodule.Uses(4, 4).eval(), usermodule.UsesOld(4, 4).eval()
    script: dict[str, Any] = {"__name__": "__main__", "torch": torch, "nn": nn, "ops": torch.ops.oldops}
    script["packet"], script["definition"] = torch.ops.newops.thrice, opsmodule.scale
    script["overload"] = torch.ops.modops.scale.default
    exec(
        "class Main(nn.Linear):\n    def forward(self, x):\n"
        "        return ops.twice(packet(overload(definition(super().forward(x), 2.0), 1.0)))",
        script,
    )
    return {
        "eager": uses,
        "eager_of_a_library": old,
        "eager_in_a_static_method": descriptormodule.UsesInStatic(4, 4).eval(),
        "eager_in_a_property": descriptormodule.UsesInProperty(4, 4).eval(),
        "script_with_operators_as_objects": script["Main"](4, 4),
        "traced": quietly(lambda: torch.jit.trace(uses, X)),
        "forked": quietly(lambda: torch.jit.script(usermodule.Forks())),
        "frozen": quietly(lambda: torch.jit.freeze(torch.jit.trace(old, X))),
        "exported": torch.export.export(uses, (X,)),
        "fx": torch.fx.symbolic_trace(uses),
    }


def needs_of(model_ref: Any) -> tuple[set[str], set[str]]:
    """Return the imports and the operators that the header of a model lists."""
    header = Header.from_bytes(ray.get(model_ref.refs[0])["header"])
    return {item.name for item in header.imports}, set(header.operators)


def test_operators_of_a_module(worker_folder: Path) -> None:
    """A worker imports the modules that register the operators of a model; a worker without them is told so."""
    refs, outputs = {}, {}
    for name, model in operator_models().items():
        refs[name] = prepare_model_for_actors(model)
        outputs[name] = (model.module() if isinstance(model, torch.export.ExportedProgram) else model)(X)
        imports, operators = needs_of(refs[name])
        assert imports == {"opsmodule"}, name
        assert bool(operators) == (not name.startswith("eager")), name
    groups = (
        ["traced", "frozen", "forked", "fx"],
        ["exported", "script_with_operators_as_objects"],
        ["eager_of_a_library", "eager", "eager_in_a_static_method", "eager_in_a_property"],
    )
    for group in groups:
        knows = fresh_actor(worker_folder)
        for name in group:
            assert torch.equal(ray.get(knows.run.remote(compute, refs[name], X)), outputs[name]), name
    does_not = fresh_actor(None)
    for name in ("traced", "exported", "fx", "frozen", "forked", "script_with_operators_as_objects"):
        with pytest.raises(ZeroCopyError, match=r"opsmodule is to be imported.*the operator \w+ops::\w+"):
            ray.get(does_not.run.remote(compute, refs[name], X))


def test_an_ordinary_model_imports_nothing(ray_session: None) -> None:
    """The list of imports is empty for models that use torch's own operators."""
    for make in (CASES["hugging_face_decoder"].make, CASES["scripted"].make, CASES["exported_program"].make):
        assert needs_of(prepare_model_for_actors(make())) == (set(), set())


def test_the_option_imports(worker_folder: Path, tmp_path: Path) -> None:
    """`imports` names modules for every way of loading; a name that is wrong is refused at once."""
    model = torch.nn.Linear(2, 2)
    import opsmodule

    ref = prepare_model_for_actors(model, imports=["opsmodule"])
    skeleton, refs = rewrite_pipeline_for_actors({"net": model}, imports=[opsmodule])
    assert ray.get(fresh_actor(worker_folder).run.remote(_load_and_find, skeleton, refs))
    assert needs_of(ref)[0] == needs_of(rewrite_pipeline(model, imports="opsmodule").model_ref)[0] == {"opsmodule"}
    for bad, kind, words in (
        (["no_such_module"], ValueError, "no_such_module"),
        (["__main__"], ValueError, "Move the code"),
        ([3], TypeError, "3"),
        ([str(tmp_path / "lib.so")], ValueError, "no such file"),
    ):
        with pytest.raises(kind, match=words):
            prepare_model_for_actors(model, imports=bad)
    with pytest.raises(ZeroCopyError, match=r"opsmodule is to be imported.*imports=\[\.\.\.\] lists it.*working_dir"):
        ray.get(fresh_actor(None).run.remote(_load, ref))


def _load_and_find(*args: Any) -> bool:
    load_model_in_actor(*args) if len(args) == 1 else load_pipeline_in_actor(*args)
    return hasattr(torch.ops.newops, "thrice")


MAIN_OPERATORS = """
import dataclasses

@torch.library.custom_op("mainops::add_one", mutates_args=())
def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + ONE

@add_one.register_fake
def _(x):
    return torch.empty_like(x)

ONE = 1.0

class Main(nn.Linear):
    def forward(self, x):
        return torch.ops.mainops.add_one(super().forward(x))

class Direct(nn.Linear):
    def forward(self, x):
        return add_one(super().forward(x))

@dataclasses.dataclass
class Out:
    y: torch.Tensor
    n: int

torch.export.register_dataclass(Out, serialized_type_name="main_out")

class WithOut(nn.Linear):
    def forward(self, x):
        return Out(super().forward(x) + 1, 2)
"""


def test_operators_and_types_of_a_script(ray_session: None) -> None:
    """An operator or a pytree type that a script registers travels with each form of the model."""
    script: dict[str, Any] = {"__name__": "__main__", "torch": torch, "nn": nn}
    exec(MAIN_OPERATORS, script)
    main = script["Main"](4, 4).eval()
    forms = {
        "traced": quietly(lambda: torch.jit.trace(main, X)),
        "eager": main,
        "direct": script["Direct"](4, 4),
        "exported": torch.export.export(main, (X,)),
        "dataclass": torch.export.export(script["WithOut"](4, 4), (X,)),
    }
    actors = [fresh_actor(None) for _ in range(2)]
    for number, (name, model) in enumerate(forms.items()):
        expected = (model.module() if isinstance(model, torch.export.ExportedProgram) else model)(X)
        got = ray.get(actors[number % 2].run.remote(compute, prepare_model_for_actors(model), X))
        assert torch.equal(got, getattr(expected, "y", expected)), name


def test_an_exported_program_with_an_output_of_hugging_face(two_actors: list[Any]) -> None:
    """The output class of an exported program registers itself when the worker imports it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    program = torch.export.export(BertModel(config).eval(), (torch.arange(4)[None],), strict=False)
    ref = prepare_model_for_actors(program)
    kind = ray.get(two_actors[0].run.remote(_kind_of_output, ref, torch.arange(4)[None]))
    assert kind == "BaseModelOutputWithPoolingAndCrossAttentions"


def _kind_of_output(model_ref: Any, ids: torch.Tensor) -> str:
    return type(load_model_in_actor(model_ref).module()(ids)).__name__


def test_an_operator_that_no_worker_can_import(ray_session: None) -> None:
    """A graph whose operator is registered in the script itself, not as a custom_op, is refused with the remedy."""
    script: dict[str, Any] = {"__name__": "__main__", "torch": torch, "nn": nn}
    source = """
lib = torch.library.Library("cellops", "DEF")
lib.define("negate(Tensor x) -> Tensor")
lib.impl("negate", lambda x: -x, "CPU")
class Main(nn.Linear):
    def forward(self, x):
        return torch.ops.cellops.negate(super().forward(x))
"""
    exec(compile(source, "<cell 1>", "exec"), script)
    traced = quietly(lambda: torch.jit.trace(script["Main"](4, 4), X))
    with pytest.raises(TypeError, match=r"cellops::negate, which __main__ registers.*imports=\['that_module'\]"):
        prepare_model_for_actors(traced)


# ---------------------------------------------------------------- operators of a shared library

LIBRARY = """
#include <cstdint>
extern "C" {
int aoti_torch_library_init_def(const char*, const char*, uint32_t, void**);
int aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, void**);
int aoti_torch_library_def(void*, const char*);
int aoti_torch_library_impl(void*, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
int aoti_torch_call_dispatcher(const char*, const char*, uint64_t*);
}
static void negate(uint64_t* stack, uint64_t, uint64_t) { aoti_torch_call_dispatcher("aten::neg", "", stack); }
struct Registration {
  Registration() {
    void *definitions, *kernels;
    aoti_torch_library_init_def("libops", __FILE__, __LINE__, &definitions);
    aoti_torch_library_def(definitions, "negate(Tensor x) -> Tensor");
    aoti_torch_library_init_impl("libops", "CompositeExplicitAutograd", __FILE__, __LINE__, &kernels);
    aoti_torch_library_impl(kernels, "negate", negate);
  }
} registration;
"""


class Negates(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.ops.libops.negate(super().forward(x))


class HoldsAnOperator(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.last = torch.ops.libops.negate

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(super().forward(x))


def _prepare_with_library(kept: dict[str, Any], library: str, kind: str, x: torch.Tensor) -> tuple[list[Any], Any]:
    """Load a shared library, prepare a model that calls its operator, and return the handle and what it computes."""
    torch.ops.load_library(library)
    model: Any = HoldsAnOperator() if kind == "attribute" else Negates(4, 4)
    if kind == "traced":
        model = quietly(lambda: torch.jit.trace(model, x))
    elif kind == "exported":
        model = torch.export.export(model, (x,))
    ref = kept[kind] = prepare_model_for_actors(model)
    return [ref], (model.module() if kind == "exported" else model)(x)


def test_an_operator_of_a_shared_library(tmp_path: Path, ray_session: None) -> None:
    """A library of `torch.ops.load_library` is loaded in the worker first; one that is not there is named."""
    source, library = tmp_path / "negate.cpp", tmp_path / "libnegate.so"
    source.write_text(LIBRARY)
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_libraries}"], check=True)
    prepares, loads, last = (ray.remote(num_cpus=0.1)(Runner).remote() for _ in range(3))
    for kind in ("eager", "attribute", "traced", "exported"):
        (ref,), expected = ray.get(prepares.run_kept.remote(_prepare_with_library, str(library), kind, X))
        assert torch.equal(ray.get(loads.run.remote(compute, ref, X)), expected), kind
    library.unlink()
    with pytest.raises(ZeroCopyError, match=r"libnegate\.so is to be imported before.*this worker cannot import it"):
        ray.get(last.run.remote(compute, ref, X))
