"""The commands `doctor` and `memory`. They use click, which Ray requires."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import click
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import memory as memory_module
from ..errors import ZeroCopyError
from ..models import get_model, list_models
from .checks import OK, PROBLEM, WARNING, Check, check_node

__all__ = ["main"]

_COLORS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}
_NODE_SECONDS = 60.0


@click.group()
def main() -> None:
    """Zero-copy model loading for PyTorch in Ray: look at a cluster."""


@main.command()
@click.option(
    "--address", help="The address of a cluster, or 'local'. Default: a running Ray, or else a new local one."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(address: str | None, as_json: bool) -> None:
    """Check each node: store, isolation, limits, versions, GPUs.

    The exit code is 1 if a node has a problem or does not answer. Warnings do not count.
    """
    _connect(address)
    tasks = {node: _start_checks(node) for node in sorted(n["NodeID"] for n in ray.nodes() if n["Alive"])}
    deadline = time.monotonic() + _NODE_SECONDS
    found = {node: _answer(task, deadline) for node, task in tasks.items()}
    if as_json:
        click.echo(
            json.dumps({node: [check._asdict() for check in checks] for node, checks in found.items()}, indent=1)
        )
    else:
        for node, checks in found.items():
            _print_node(node, checks, brief=len(found) > 1)
    ray.shutdown()
    if any(check.status == PROBLEM for checks in found.values() for check in checks):
        raise SystemExit(1)


def _print_node(node: str, checks: list[Check], *, brief: bool) -> None:
    """Print a line with the counts, and a line for each check; if `brief`, only for what is not in order."""
    counts = ", ".join(
        f"{sum(c.status == s for c in checks)} {s}" for s in _COLORS if any(c.status == s for c in checks)
    )
    click.echo(f"node {node[:12]}: {counts}")
    for check in checks:
        if brief and check.status == OK:
            continue
        click.echo(f"  {click.style(f'{check.status:8}', _COLORS[check.status])}{check.name:15}{check.finding}")
        if check.remedy:
            click.echo(f"  {'':23}{check.remedy}")


def _start_checks(node: str) -> Any:
    """Start a task that checks a node, and needs no CPU."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(check_node).options(scheduling_strategy=strategy).remote()


def _answer(task: Any, deadline: float) -> list[Check]:
    try:
        checks: list[Check] = ray.get(task, timeout=max(0.1, deadline - time.monotonic()))
    except ray.exceptions.RayError as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return [Check("node", PROBLEM, f"no answer: {reason}", "Look at the node with: ray status")]
    return checks


@main.command()
@click.argument("name", required=False)
@click.option("--address", help="The address of a cluster. Default: a running Ray.")
@click.option("--namespace", help="The namespace of the models. Default: that of all models without one.")
@click.option("--watch", type=float, metavar="SECONDS", help="Print again every SECONDS.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def memory(name: str | None, address: str | None, namespace: str | None, watch: float | None, as_json: bool) -> None:
    """Show the named models of a cluster, or the processes that map the model NAME."""
    _connect(address or "auto")
    while True:
        try:
            report = _model_report(name, namespace) if name else _list_report(namespace)
        except (ValueError, ZeroCopyError) as error:
            raise click.ClickException(str(error)) from None
        if watch is not None:
            click.clear()
        click.echo(json.dumps(report[1], indent=1) if as_json else report[0])
        if watch is None:
            return
        time.sleep(watch)


def _list_report(namespace: str | None) -> tuple[str, Any]:
    found = list_models(namespace)
    lines = [str(model) for model in found] or [
        "no named models. Name one: prepare_model_for_actors(model, name=...)"
    ]
    return "\n".join(lines), [model.__dict__ for model in found]


def _model_report(name: str, namespace: str | None) -> tuple[str, Any]:
    found = memory_module.pool_memory(get_model(name, namespace))
    facts = {**found.__dict__, "processes": [process.__dict__ for process in found.processes], "copies": found.copies}
    return str(found), facts


def _connect(address: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except ConnectionError as error:
        raise click.ClickException(f"{error} Give the address of a running cluster: --address HOST:PORT.") from None
