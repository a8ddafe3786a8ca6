"""Small named models, each with one thing that sharing could get wrong; and inputs for those that can be called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Case(NamedTuple):
    """A model by name: `make` builds it, `args` calls it (None: it is not callable)."""

    name: str
    make: Callable[[], Any]
    args: Callable[[], tuple[Any, ...]] | None


CASES: dict[str, Case] = {}


def case(args: Callable[[], tuple[Any, ...]] | None = None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that builds a model, seeded, under its own name."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        def seeded() -> Any:
            torch.manual_seed(0)
            return make()

        CASES[make.__name__] = Case(make.__name__, seeded, args)
        return make

    return register


def rows(*shape: int) -> Callable[[], tuple[Any, ...]]:
    """Return a function that makes one seeded random input."""

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
    """Tensors where `state_dict` does not look, and tensors with nothing in them."""

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
    """Counts its calls in a buffer: a write in every forward."""

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
    """Be a forward hook that matters to the result."""
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
def hugging_face_decoder() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2))


@case(lambda: (torch.arange(6)[None], None, torch.arange(3)[None]))
def hugging_face_encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


NAMES = sorted(CASES)
CALLABLE = [name for name in NAMES if CASES[name].args is not None]


def call(model: Any, name: str) -> Any:
    """Run the named model's example input and return its outputs as a flat list of tensors."""
    torch.manual_seed(2)
    args = CASES[name].args
    if args is None:
        raise ValueError(f"{name} is not callable")
    with torch.no_grad():
        outputs = model(*args())
    leaves, _ = torch.utils._pytree.tree_flatten(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
