"""Predictors in an importable module, which Ray sends to workers by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ray_zerocopy import ModelRef, ZeroCopyPredictor


def adds_one() -> torch.nn.Module:
    """Return a model that adds one."""
    model = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    return model


class AddOne(ZeroCopyPredictor):
    """Runs the model on column `x` and appends the result as `y`."""

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        assert isinstance(batch, pa.Table), type(batch)
        return torch.from_numpy(batch["x"].to_numpy().astype(np.float32))[:, None]

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> pa.Table:
        return batch.append_column("y", pa.array(outputs[:, 0].numpy()))


class WithOptions(AddOne):
    """Has a constructor of its own."""

    def __init__(self, factor: float, model_ref: ModelRef | None = None, **options: Any) -> None:
        super().__init__(model_ref, **options)
        self.factor = factor

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> dict[str, Any]:
        return {"y": outputs[:, 0] * self.factor, "inference": [torch.is_inference_mode_enabled()] * len(outputs)}


class Formats(AddOne):
    """Returns its rows in the form that it is told."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__(**options)
        self.form = form

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> Any:
        match self.form:
            case "record_batch":
                return pa.RecordBatch.from_pydict({"y": pa.array(outputs[:, 0].numpy())})
            case "arrays":
                return {"y": outputs[:, 0].numpy(), "name": ["a"] * len(outputs), "z": pa.array(range(len(outputs)))}
            case "bf16":
                return {"y": outputs[:, 0].to(torch.bfloat16), "m": outputs.expand(-1, 3)}
            case "fp8":
                return {"y": outputs[:, 0].to(torch.float8_e4m3fn)}
            case "bf16_list":
                return {"y": [part.to(torch.bfloat16) for part in outputs[:, 0]]}
            case "bytes":
                return {"y": b"12345"}
            case "mapping":
                return {"y": {"a": 1}}
            case "same_name":
                return {1: outputs, "1": outputs}
            case "gradient":
                with torch.inference_mode(False), torch.enable_grad():
                    scale = torch.ones(1, requires_grad=True)
                    return {"y": outputs[:, 0].clone() * scale}
            case "pandas":
                return batch.append_column("y", pa.array(outputs[:, 0].numpy())).to_pandas()
            case "generator":
                return ({"y": part} for part in outputs[:, 0].split(2))
            case "tensor":
                return outputs
            case "none":
                return None
            case "unequal":
                return {"y": outputs[:, 0], "short": outputs[:1, 0]}
            case "scalar":
                return {"y": outputs.sum()}
        raise ValueError(self.form)


class NoPostprocess(ZeroCopyPredictor):
    """Lacks a method."""

    def preprocess(self, batch: pa.Table) -> Any:
        return batch


class NoPreprocess(ZeroCopyPredictor):
    """Lacks the other method."""

    def postprocess(self, outputs: Any, batch: pa.Table) -> Any:
        return batch


class Keywords(AddOne):
    """Gives the model keyword arguments, and a mapping that is not a dict."""

    def preprocess(self, batch: pa.Table) -> Any:
        from collections import UserDict

        return UserDict(input=super().preprocess(batch))


class Overridden(AddOne):
    """Calls the model its own way."""

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.forward(inputs) + 100


class TakesModel(AddOne):
    """Asks for the model by name, as one may write it."""

    def __init__(self, model_ref: ModelRef, threads: int = 1) -> None:
        super().__init__(model_ref)
        self.threads = threads


class OneThread(AddOne):
    """Says in which thread the model was called, which must not be two at once."""

    inside = 0

    def predict(self, inputs: torch.Tensor) -> Any:
        self.inside += 1
        time.sleep(0.002)
        if self.inside != 1:
            raise RuntimeError("the model is called by two threads at once")
        self.inside -= 1
        return super().predict(inputs), threading.get_ident()

    def postprocess(self, outputs: Any, batch: pa.Table) -> pa.Table:
        values, thread = outputs
        return super().postprocess(values, batch).append_column("thread", pa.array([thread] * len(batch)))


class NoMultiplesOfSeven(AddOne):
    """Cannot take some rows."""

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        bad = [x for x in batch["x"].to_pylist() if x % 7 == 0]
        if bad:
            raise ValueError(f"{bad[0]} is a multiple of seven")
        return super().preprocess(batch)


class Dies(AddOne):
    """Ends its process at one row, as a segmentation fault does."""

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        if (inputs == 13).any():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().predict(inputs)
