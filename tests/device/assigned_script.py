"""What workers of a Ray that counts two GPUs make of each device; prints JSON. Run by test_device_actors."""

from __future__ import annotations

import json
from typing import Any

import ray
import torch

from ray_zerocopy import actor, load_model_in_actor, prepare_model_for_actors
from ray_zerocopy._device import choose


def said(model_ref: Any) -> dict[str, str]:
    """Return the device, or the error, for each thing that may be asked for."""
    found = {}
    for device in (None, "auto", "cuda", "cuda:0", 0, torch.device("cuda:0"), "cuda:1", 1, "cpu"):
        try:
            found[repr(device)] = str(choose.resolve_device(device, actor._assigned_gpus()))
        except ValueError as error:
            found[repr(device)] = str(error)
    try:
        found["load"] = str(load_model_in_actor(model_ref).weight.device)
    except ValueError as error:
        found["load"] = str(error)
    return found


ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100 << 20)
ref = prepare_model_for_actors(torch.nn.Linear(2, 2))
task = ray.remote(said)
print(
    json.dumps(
        {
            "half": ray.get(task.options(num_gpus=0.5).remote(ref)),
            "whole": ray.get(task.options(num_gpus=1).remote(ref)),
            "none": ray.get(task.options(num_gpus=0).remote(ref)),
        }
    )
)
