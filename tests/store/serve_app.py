"""An app of Ray Serve, as `serve deploy` imports it: with a model at module level, and with a builder."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from ray import serve
from torch import nn

from ray_zerocopy import ModelRef, load_model_in_actor, prepare_model_for_actors, prepare_model_from


def filled(value: float) -> nn.Module:
    """Return a module of `value`, 30 MiB."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
    model[-1].weight = nn.Parameter(torch.empty(512, 1024))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@serve.deployment(
    num_replicas=1, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=1, graceful_shutdown_wait_loop_s=0.1
)
class Model:
    def __init__(self, model_ref: ModelRef) -> None:
        self.model = load_model_in_actor(model_ref)

    def __call__(self) -> tuple[int, float]:
        return os.getpid(), self.model[0].weight.min().item()


# Every replica imports this module, so the name decides who prepares.
app = Model.bind(prepare_model_for_actors(filled(1.0), name="at import", lifetime="detached", get_if_exists=True))


def rollout(args: dict[str, Any]) -> Any:
    """Prepare the next version of a model; Serve calls this once for each deployment of a config."""
    load = functools.partial(filled, float(args["value"]))
    return Model.bind(prepare_model_from(load, name="rollout", lifetime="detached", replace=True))
