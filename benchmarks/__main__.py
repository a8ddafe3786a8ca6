"""Run all benchmarks, one after the other, and print one summary.

    python -m benchmarks --quick            # under ten minutes on two idle cores
    python -m benchmarks                    # sizes fit for this machine: about an hour on two cores
    python -m benchmarks --full             # also 4 GiB over nodes, BERT-base cold, 20,000 texts
    python -m benchmarks --only load text   # some of them
    python -m benchmarks --out results      # where the JSON files, the printed tables and the pictures go
    python -m benchmarks pages              # write the tables and pictures of README.md and docs/ from results/

Each benchmark is a script that also runs alone. Nothing else should run on the machine meanwhile. The committed files
in `benchmarks/results/` are from the machine that they name; `--out benchmarks/results` replaces them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
EARLIER = ("0.1.5", "0.2.0")  # versions of the earlier library on the package index
# A node and its store take memory; with less than this, the larger sizes are left out.
LARGE_MEMORY_GIB = 14


def commands(size):
    """Return the arguments of each benchmark: `quick`, `fit` for the machine, or `full`."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    large = memory >= LARGE_MEMORY_GIB
    if size == "quick":
        return {
            "load": ["--quick", "--rounds", "2"],
            "memory": ["--quick"],
            "task_overhead": ["--rounds", "20", "--firsts", "1"],
            "throughput": ["--only", "overlap", "--rounds", "1"],
            "text": ["--rows", "2048", "--rounds", "1", "--only", "ours, sort_by$|sentence|floor"],
            "cold": ["--rounds", "1", "--counts", "4"],
            "scale": ["--quick", "--nodes", "1", "3"],
        }
    found = {
        "load": [] if large else ["--quick"],
        "memory": ["--peers", *EARLIER] if large else ["--counts", "1", "2", "4", "--sizes", "4", "40", "400"],
        "task_overhead": [],
        "throughput": [],
        "text": [],
        "cold": [],
        "first_touch": [],
        "scale": [] if large else ["--gib", "0.25"],
        "pool_memory": [] if large else ["--actors", "16"],
        "loaders": [] if large else ["--hidden", "672"],
        "torchscript": [],
        "model_types": [] if size == "full" else ["--limit", "100"],
    }
    if size == "full":
        found["memory"] = ["--peers", *EARLIER]
        found["cold-base"] = ["--model", "base"]
        found["scale-4gib"] = ["--gib", "4", "--nodes", "1", "2"]
        found["text-20000"] = ["--rows", "20000", "--rounds", "1", "--only", "ours, sort_by$|sentence"]
    return found


def run(name, arguments, out):
    """Run one benchmark; its table goes to the terminal and to a file. Return whether it succeeded."""
    script = HERE / f"{name.partition('-')[0]}.py"
    command = [sys.executable, "-W", "ignore", str(script), *arguments, "--json", str(out / f"{name}.json")]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    print(f"\n==== {name}: python benchmarks/{script.name} {' '.join(arguments)}", flush=True)
    begin = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process,
        open(out / f"{name}.txt", "w") as file,
    ):
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    print(f"({time.perf_counter() - begin:.0f} s)")
    return process.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="?", choices=["pages"], help="write README.md and docs/ from results/")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="fit")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these benchmarks")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="by default out/benchmarks")
    given = parser.parse_args()
    from . import pages

    if given.pages:
        pages.write_pages(RESULTS)
        return
    chosen = commands(given.size)
    if unknown := set(given.only or ()) - set(chosen):
        parser.error(f"--only {' '.join(sorted(unknown))}: not one of {', '.join(chosen)}")
    given.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    failed = [
        name
        for name, arguments in chosen.items()
        if not given.only or name in given.only
        if not run(name, arguments, given.out)
    ]
    pictures = pages.draw(given.out, given.out)
    print(f"\n==== summary, {time.perf_counter() - begin:.0f} s")
    for name in chosen:
        path = given.out / f"{name}.json"
        if name not in failed and path.exists() and (not given.only or name in given.only):
            print(f"{name}:")
            for line in json.loads(path.read_text())["summary"]:
                print(f"  {line}")
    print(f"figures and pictures: {given.out} ({', '.join(path.name for path in pictures)})")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the error is printed above")


if __name__ == "__main__":
    main()
