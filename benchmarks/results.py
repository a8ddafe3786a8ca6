"""The JSON file that each benchmark writes with `--json`: the figures, the command, the versions and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

PACKAGES = ("ray", "torch", "transformers", "safetensors", "sentence-transformers", "pyarrow", "numpy")
GIB = 1 << 30
_begin, _load_average = time.time(), os.getloadavg()[0]


def add_json_option(parser):
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine():
    chip = platform.machine()
    with open("/proc/cpuinfo") as file:
        chip = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), chip)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return {"cores": os.cpu_count(), "chip": chip, "memory_gib": round(memory), "linux": platform.release()}


def describe(found):
    """Return versions and machine of a file of results as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    m = found["machine"]
    return f"{packages}; {m['cores']} cores ({m['chip']}), {m['memory_gib']} GiB, Linux {m['linux']}"


def write_json(path, figures, summary):
    """Write a file of results, if a path was given.

    Args:
        path: The file, or None.
        figures: Nested dictionaries and lists of numbers.
        summary: Lines for people, such as each goal with what was reached.
    """
    if path is None:
        return
    arguments, skip = [], False
    for argument in sys.argv[1:]:  # the command without `--json FILE`
        if skip or argument.startswith("--json"):
            skip = argument == "--json"
            continue
        arguments.append(argument)
    found = {
        "command": " ".join(["python", os.path.join("benchmarks", os.path.basename(sys.argv[0])), *arguments]),
        "date": time.strftime("%Y-%m-%d", time.localtime(_begin)),
        "seconds": round(time.time() - _begin),
        "load_average_at_start": round(_load_average, 2),
        "versions": versions(),
        "machine": machine(),
        "summary": summary,
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
