"""Small named models, each with one property that sharing could break, and example inputs of the callable ones."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Case(NamedTuple):
    """A named model: `make` builds it, and `args` returns an example input (None: the model is not callable)."""

    name: str
    make: Callable[[], Any]
    args: Callable[[], tuple[Any, ...]] | None


CASES: dict[str, Case] = {}


def case(args: Callable[[], tuple[Any, ...]] | None = None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that builds a model under the function's name. Seeds torch before each build."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        def seeded() -> Any:
            torch.manual_seed(0)
            return make()

        CASES[make.__name__] = Case(make.__name__, seeded, args)
        return make

    return register


def rows(*shape: int) -> Callable[[], tuple[Any, ...]]:
    """Return a function that makes a seeded random input of this shape."""

    def make() -> tuple[Any, ...]:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)

    return make


@case(rows(3, 8))
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@case(rows(4, 64))
def large_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.Linear(512, 2))


@case(rows(2, 3, 16, 16))
def batch_norm_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    net(torch.randn(4, 3, 16, 16))
    return net


@case(rows(5, 2, 6))
def lstm() -> nn.Module:
    return nn.LSTM(6, 7, num_layers=2, bidirectional=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@case(lambda: (torch.tensor([[1, 2, 3]]),))
def tied() -> nn.Module:
    return Tied()


class Dtypes(nn.Module):
    """One buffer of every dtype that torch stores."""

    NAMES = (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
        "float4_e2m1fn_x2 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex32 complex64 complex128"
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES.split():
            dtype = getattr(torch, name, None)
            if dtype is None:
                continue
            size = dtype.itemsize
            raw = torch.randint(0, 2 if name == "bool" else 256, (6 * size,), dtype=torch.uint8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls complex32 experimental
                self.register_buffer(f"as_{name}", raw.view(dtype).reshape(2, 3))


@case()
def every_dtype() -> nn.Module:
    return Dtypes()


class Views(nn.Module):
    """Tensors over one storage: slices, transposes, expansions, and separate Parameters."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6, 8)
        self.base = nn.Parameter(base)
        self.rows = nn.Parameter(base[1:3])
        self.register_buffer("column", base[:, 2])
        self.register_buffer("turned", base.t())
        self.register_buffer("every_other", base[::2, 1::3])
        self.register_buffer("expanded", torch.tensor([1.5]).expand(4, 5))
        self.register_buffer("channels_last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.turned + self.rows.sum() + self.column


@case(rows(2, 8))
def views() -> nn.Module:
    return Views()


@case()
def one_storage_two_dtypes() -> Any:
    base = torch.randn(6, 8)
    return [base, base.view(torch.int32)[1], base.view(torch.float64)]


class Odd(nn.Module):
    """Tensors that are not in `state_dict`, and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("transient", torch.randn(4), persistent=False)
        self.register_buffer("nothing", None)
        self.plain = torch.randn(5)
        self.in_list = [torch.randn(2), [self.plain, torch.ones(3)]]
        self.in_dict = {"a": torch.zeros(2), 3: (torch.arange(4), self.weight)}
        self.scalar = torch.tensor(3.5)
        self.empty = torch.empty(0, 7)
        self.empty_view = self.plain[5:]
        self.array = np.arange(10_000, dtype=np.float32)
        self.small_array = np.arange(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.transient + self.plain[:4] * self.scalar


@case(rows(2, 4))
def odd_places() -> nn.Module:
    return Odd()


class Counter(nn.Module):
    """Counts its calls in a buffer, so that every forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.weight + self.calls


@case(rows(2, 4))
def counter() -> nn.Module:
    return Counter()


def double_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Change the result, as a forward hook."""
    return output * 2


@case(rows(3, 8))
def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].register_forward_hook(double_output)
    return net


@case(rows(3, 8))
def partly_frozen_and_mixed_mode() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    net[0].weight.requires_grad_(False)
    net[1].eval()
    return net


class Inner:
    """A plain object with models inside."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 4)
        self.same = self.model
        self.others = [nn.Linear(4, 2), {"deep": nn.Linear(2, 2)}]
        self.itself = self


@case()
def plain_object() -> Any:
    return Inner()


@case()
def dict_of_tensors() -> Any:
    weight = torch.randn(20)
    return {"weight": weight, "again": weight, "part": weight[5:9], "names": ["a", "b"]}


@case()
def two_arrays_one_memory() -> Any:
    array = np.arange(100, dtype=np.float32)
    return [torch.from_numpy(array), torch.from_numpy(array)[10:20], torch.from_numpy(array[50:])]


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )


@case(lambda: (torch.arange(6)[None],))
def hugging_face_encoder() -> nn.Module:
    from transformers import BertModel

    return BertModel(_bert_config())


@case(lambda: (torch.arange(6)[None],))
def hugging_face_encoder_that_has_run() -> nn.Module:
    """Return a model after a call: transformers' hooks then write hidden states to a global of their module."""
    from transformers import BertModel

    config = _bert_config()
    config.output_hidden_states = True
    model = BertModel(config)
    model(torch.arange(6)[None])
    return model


@case(lambda: (torch.arange(6)[None],))
def hugging_face_decoder() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2))


@case(lambda: (torch.arange(6)[None], None, torch.arange(3)[None]))
def hugging_face_encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


# ---------------------------------------------------------------- parametrized and rewritten modules


@case(rows(3, 8))
def parametrized() -> nn.Module:
    parametrizations = torch.nn.utils.parametrizations
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )
    return net


class Symmetric(nn.Module):
    """A parametrization with an inverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).T

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


class Scaled(nn.Module):
    """A second parametrization, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@case(rows(3, 8))
def custom_parametrized() -> nn.Module:
    parametrize = torch.nn.utils.parametrize
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Scaled())
    parametrize.register_parametrization(layer, "bias", Scaled())
    other = nn.Linear(8, 8)
    parametrize.register_parametrization(other, "weight", Symmetric())
    return nn.Sequential(layer, other, layer)


@case(rows(3, 8))
def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.ReLU())


@case(rows(3, 8))
def pruned() -> nn.Module:
    from torch.nn.utils import prune

    layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return nn.Sequential(layer)


@case(rows(3, 8))
def graph_module() -> nn.Module:
    """Return a GraphModule that was changed after tracing: the order of its modules is not that of its code."""
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    net.add_submodule("before.linear", nn.Linear(8, 8))
    net.register_buffer("shift", torch.randn(8), persistent=False)
    net.unused = nn.Linear(2, 2)
    (x,) = net.graph.find_nodes(op="placeholder")
    with net.graph.inserting_after(x):
        shift = net.graph.get_attr("shift")
    with net.graph.inserting_after(shift):
        shifted = net.graph.call_function(torch.add, (x, shift))
    with net.graph.inserting_after(shifted):
        first = net.graph.call_module("before.linear", (shifted,))
    (second,) = net.graph.find_nodes(op="call_module", target="0")
    second.args = (first,)
    net.recompile()
    net.register_forward_hook(double_output)
    return net


# ---------------------------------------------------------------- aliases


class Aliases(nn.Module):
    """One Parameter, one module and one storage under several names."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(40)
        self.a = nn.Parameter(flat[:16].view(4, 4))
        self.b = nn.Parameter(flat[16:20])
        self.same = self.a
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.listed = nn.ModuleList([self.first, nn.Linear(4, 4)])
        self.plain_list = [self.a, self.first.weight, self.first]
        self.register_buffer("expanded", torch.randn(4, 1).expand(4, 1000))
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("imaginary", torch.randn(3, dtype=torch.complex64).conj().imag)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x @ self.same + self.b) + self.expanded[:, 0] + self.imaginary.sum()


@case(rows(2, 4))
def aliases() -> nn.Module:
    return Aliases()


@case()
def slice_of_a_large_storage() -> Any:
    large = torch.randn(1_000_000)
    return {"slice": large[500_001:500_101].view(10, 10), "other": nn.Parameter(large[500_050:500_200])}


# ---------------------------------------------------------------- subclasses and other representations


class Marked(nn.Parameter):
    """A Parameter subclass."""


class Noted(torch.Tensor):
    """A tensor subclass that adds nothing."""


class PairTensor(torch.Tensor):
    """A tensor subclass made of two tensors, values and scale, as quantized tensors are."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> PairTensor:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_ = values
        self.scale_ = scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> PairTensor:
        return cls(inner["values_"], inner["scale_"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale_)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        return self.values_.to(self.scale_.dtype) * self.scale_


class Represented(nn.Module):
    """Parameters and buffers with attributes, subclasses and a sparse layout."""

    def __init__(self) -> None:
        super().__init__()
        self.marked = Marked(torch.randn(4, 4))
        self.marked.label = "input"
        self.marked.companion = self.marked.data[0]
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.weight.shard = {"dim": 1}
        self.buffer = nn.Buffer(torch.randn(4))
        self.noted = torch.randn(4).as_subclass(Noted)
        self.noted.note = "kept"
        self.register_buffer("sparse", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.sparse, (x @ self.marked @ self.weight).T).T + self.buffer + self.noted


@case(rows(2, 4))
def represented() -> nn.Module:
    return Represented()


@case(rows(2, 64))
def subclass_of_two_tensors() -> nn.Module:
    layer = nn.Linear(64, 64)
    pair = PairTensor(torch.randint(-8, 8, (64, 64), dtype=torch.int8), torch.tensor(0.25))
    layer.weight = nn.Parameter(pair, requires_grad=False)
    return nn.Sequential(layer)


@case()
def sparse_and_quantized() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "coo": torch.eye(8).to_sparse(),
            "csr": torch.eye(8).to_sparse_csr(),
            "trained": torch.eye(8).to_sparse_csr().requires_grad_(),
            "bsr": torch.eye(8).to_sparse_bsr((2, 2)),
            "nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
            "jagged": torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
            "per_tensor": torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 2, torch.quint8),
            "per_channel": torch.quantize_per_channel(
                torch.randn(4, 4), torch.rand(4) + 0.1, torch.zeros(4), 0, torch.qint8
            ),
        }


@case(rows(2, 64))
def dynamically_quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = (
            "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
        )
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


# ---------------------------------------------------------------- unusual states


class WithState(nn.Module):
    """Defines __getstate__, __setstate__ and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.table = {"one": torch.ones(2)}
        self.cache = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["cache"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = threading.Lock()

    def get_extra_state(self) -> Any:
        return self.table

    def set_extra_state(self, state: Any) -> None:
        self.table = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.table["one"].sum()


@case(rows(2, 4))
def own_getstate() -> nn.Module:
    return nn.Sequential(WithState())


@case(rows(2, 4))
def with_gradients_and_activations() -> nn.Module:
    net = nn.Linear(4, 4)
    net.cached = net(torch.ones(1, 4)).detach()
    net(torch.ones(1, 4)).sum().backward()
    return nn.Sequential(net)


@case(rows(2, 4))
def built_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def backward_hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Do nothing, as a backward hook."""


@case(rows(3, 8))
def every_kind_of_hook() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net[1].register_full_backward_hook(backward_hook)
    net[0].register_state_dict_post_hook(lambda *a: None)
    return net


@case()
def exported_program() -> Any:
    return torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), rows(2, 8)())


# ---------------------------------------------------------------- TorchScript


class Recurrent(nn.Module):
    """A module to script: it has submodules, a loop, attributes and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.steps: int = 3
        self.table = {"a": torch.randn(8), "b": torch.randn(8)}
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = x, x
        for _ in range(self.steps):
            h, c = self.cell(self.first(h), (h, c))
        return self.second(h) + self.offset + self.table["b"]


def quietly(make: Callable[[], Any]) -> Any:
    """Call `make` without torch.jit's deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@case(rows(2, 8))
def scripted() -> Any:
    module = Recurrent()
    return quietly(lambda: torch.jit.script(module))


@case(rows(2, 8))
def traced_inside_eager() -> Any:
    inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    return nn.Sequential(nn.Linear(8, 8), quietly(lambda: torch.jit.trace(inner, torch.randn(2, 8))))


@case(rows(2, 64))
def frozen_script() -> Any:
    module = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    return quietly(lambda: torch.jit.freeze(torch.jit.script(module)))


class Halves(nn.Module):
    """Two Parameters over one storage."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(8, 8)
        self.a = nn.Parameter(base[:4])
        self.b = nn.Parameter(base[4:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.t() + x @ self.b.t()


@case(rows(2, 8))
def scripted_halves() -> Any:
    return quietly(lambda: torch.jit.script(Halves()))


@case(rows(2, 8))
def traced_many_ways() -> Any:
    """Return a traced module with a module under two names, and Parameters and buffers over parts of storages."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.same = self.first
            self.part = nn.Parameter(torch.randn(100, 8)[7:9])
            self.turned = nn.Parameter(torch.randn(8, 8).t())
            self.register_buffer("expanded", torch.randn(1, 8).expand(5, 8))
            self.register_buffer("detached", self.first.weight.detach())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.same(self.first(x)) @ self.turned
            return x @ self.detached + self.part.sum() + self.expanded[0]

    return quietly(lambda: torch.jit.trace(Many(), torch.randn(2, 8)))


@case(rows(1, 3, 8, 8))
def quantized_convolution() -> nn.Module:
    def make() -> nn.Module:
        convolution = torch.ao.nn.quantized.Conv2d(3, 4, 3)
        weight = torch.quantize_per_tensor(torch.randn(4, 3, 3, 3), 0.1, 0, torch.qint8)
        convolution.set_weight_bias(weight, torch.randn(4))
        layers = (
            torch.ao.nn.quantized.Quantize(0.1, 5, torch.quint8),
            convolution,
            torch.ao.nn.quantized.DeQuantize(),
        )
        return nn.Sequential(*layers)

    return quietly(make)


class Reduced(nn.Module):
    """Defines __reduce__, which loses flags."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size))

    def __reduce__(self) -> Any:
        return Reduced, (self.size,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


# Models with weights packed for the processor, which every process copies.
PACKED = {"dynamically_quantized", "quantized_convolution"}
# Models with TorchScript.
SCRIPTED = {"scripted", "traced_inside_eager", "frozen_script", "scripted_halves", "traced_many_ways"}
# Models with weights that no list of tensors has.
BAKED = {"frozen_script", *PACKED}

NAMES = sorted(CASES)
CALLABLE = [name for name in NAMES if CASES[name].args is not None]


def call(model: Any, name: str) -> Any:
    """Run the named model's example input and return its outputs as a flat list of tensors."""
    torch.manual_seed(2)
    args = CASES[name].args
    if args is None:
        raise ValueError(f"{name} is not callable")
    with torch.inference_mode():
        outputs = model(*args())
    leaves, _ = torch.utils._pytree.tree_flatten(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
