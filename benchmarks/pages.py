"""Draw pictures of benchmark results, and write tables of results into README.md and the pages in docs/.

A page has a pair of comments for each table: `<!-- benchmark: load -->` and `<!-- end -->`. What stands between them
is written by `python -m benchmarks pages` from `benchmarks/results/load.json`. A test checks that pages and results
agree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- benchmark: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "ray_zerocopy"


def read(folder, name):
    """Return a file of results, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------- tables


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def cell(value, form=".2f"):
    return "" if value is None else format(value, form)


def source(found):
    """Return the line under a table: the command, the date, the machine and the versions."""
    m, v = found["machine"], found["versions"]
    packages = ", ".join(f"{name} {v[name]}" for name in ("ray", "torch", "transformers") if name in v)
    return (
        f"\nOne run of `{found['command']}` on {found['date']}, medians; {m['cores']} cores ({m['chip']}), "
        f"{m['memory_gib']} GiB; {packages}.\n"
    )


def load(found):
    figures = found["figures"]
    rows = []
    for row, f in figures["rows"].items():
        name = f"**{row}**" if row.startswith(OURS) else row
        growth = "" if f["driver_growth"] is None else f"{f['driver_growth']:.2f}x"
        times = [cell(f["first_load_ms"], ".1f"), cell(f["load_ms"])]
        rows.append([name, cell(f["prepare_s"], ".3f"), growth, *times, cell(f["private_mib"], ".0f")])
    head = ["", "prepare s", "driver growth", "first load ms", "load ms", "4 actors, private MiB"]
    tensors, mib = figures["tensors"], figures["mib"]
    return (
        table(head, rows) + f"\nBERT-base, random weights, {mib:.1f} MiB in {tensors} tensors, CPU, one thread. "
        "`ray.put(arrays)` is the same bytes without a model: the lower bound.\n"
    )


def by_number(found, figure, form):
    columns = list(found["figures"][OURS][figure])
    rows = [[way, *(cell(f[figure][c], form) for c in columns)] for way, f in found["figures"].items()]
    return columns, rows


def memory(found):
    columns, rows = by_number(found, "pss_mib", ".0f")
    _, private = by_number(found, "private_mib", ".0f")
    for row, other in zip(rows, private, strict=True):
        row.append(other[-1])
    head = ["MiB in all, by actors", *columns, f"private, {columns[-1]} actors"]
    return table(head, rows) + (
        "\nProportional memory (PSS) that the actors gain by a load of BERT-base (417.6 MiB) and one forward. It "
        "counts a shared page once, and gives the driver and the store's own process their "
        "share, at most 417.6 MiB. The last column is the private part.\n"
    )


def sizes(found):
    columns, rows = by_number(found, "load_ms", ".2f")
    return table(["load ms, by MiB of the model", *columns], rows)


def text(found):
    rows = []
    for way, f in found["figures"]["ways"].items():
        rows.append([way, cell(f["rate"], ".1f"), cell(f["cpu"], ".1f"), cell(f["padding"])])
        rows[-1] += [f"{f['seconds']:.1f} for {f['rows']:.0f} texts", cell(f["private"], ".0f"), f.get("rounds", 1)]
    head = ["", "rows/s", "rows/CPU s", "tokens computed/there", "end to end s", "private MiB", "rounds"]
    return table(head, rows)


def cold(found):
    rows = []
    for count, ways in found["figures"]["actors"].items():
        for way, f in ways.items():
            rows.append([count, way, *(cell(f[part]) for part in f)])
    parts = list(next(iter(next(iter(found["figures"]["actors"].values())).values())))
    return (
        table(["actors", "", *parts], rows) + f"\nCompiling once took {found['figures']['compile_seconds']:.0f} s.\n"
    )


def task_overhead(found):
    figures = found["figures"]
    rows = [[row, cell(ms), cell(figures["beyond_ms"].get(row))] for row, ms in figures["ms"].items()]
    rows.append(["call_model, first in a fresh process", cell(figures["first_ms"]), ""])
    return table(["", "ms", "beyond an empty task and the forward, ms"], rows)


def scale(found):
    rows = []
    for f in found["figures"]:
        loads = [f"{f[key] * 1e3:.2f}" for key in ("load_first", "load_others")]
        seconds = [f"{f[key]:.2f}" for key in ("plain_one", "plain_all", "prefetch")]
        if f["nodes"] == 1:
            seconds, loads[1], share = [""] * 3, "", ""
        else:
            share = f"{f['relayed']:.0%}"
        rows.append([f"{f['gib']:g}", f["nodes"], f["object_mib"], *seconds, share, *loads])
    head = ["GiB", "nodes", "objects of MiB", "plain, one node s", "plain, all s", "prefetch, all s", "relayed"]
    return table([*head, "first load ms, first node", "others"], rows)


def loaders(found):
    rows = [
        [row, cell(f["seconds"]), cell(f["driver_mib"], ".1f")]
        for row, f in found["figures"].items()
        if row != "checkpoint_mib"
    ]
    return table([f"{found['figures']['checkpoint_mib']:.0f} MiB", "seconds", "driver grows by MiB"], rows)


def throughput(found):
    rows = [[name, f"{f['ratio']:.2f}x", f"{f['ceiling']:.2f}x"] for name, f in found["figures"]["overlap"].items()]
    return table(["preprocess", "overlapped against serial", "two independent threads"], rows)


def first_touch(found):
    rows = []
    for mib, ways in found["figures"]["sizes"].items():
        for way, f in ways.items():
            times = [cell(f[key], ".1f") for key in ("ready_ms", "first_ms", "second_ms")]
            rows.append([mib, way, *times, f"{f['first_ms'] / f['second_ms']:.2f}x"])
    return table(["MiB", "", "made ready, ms", "first forward", "second", "first/second"], rows)


def torchscript(found):
    rows = [
        [size, name, *(cell(f[key]) for key in ("first_ms", "second_ms", "later_ms", "private_mib"))]
        for size, models in found["figures"].items()
        for name, f in models.items()
    ]
    return table(["", "", "first load ms", "second", "later", "private MiB"], rows)


# A block's name -> the file of results, and the function that writes the table.
BLOCKS = {
    "load": ("load", load),
    "memory": ("memory", memory),
    "sizes": ("memory", sizes),
    "text": ("text", text),
    "text-20000": ("text-20000", text),
    "cold": ("cold", cold),
    "cold-base": ("cold-base", cold),
    "task_overhead": ("task_overhead", task_overhead),
    "scale": ("scale", scale),
    "scale-4gib": ("scale-4gib", scale),
    "loaders": ("loaders", loaders),
    "throughput": ("throughput", throughput),
    "first_touch": ("first_touch", first_touch),
    "first_touch_huge": ("first_touch_huge", first_touch),
    "torchscript": ("torchscript", torchscript),
}


def page_with_results(page, folder):
    """Return the text of a page with its tables written from the results in `folder`."""

    def write(match):
        name, function = BLOCKS[match[2]]
        found = read(folder, name)
        return match[0] if found is None else f"{match[1]}\n{function(found)}{source(found)}\n{match[3]}"

    return BLOCK.sub(write, page)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write_pages(folder):
    """Write the tables of all pages, and the pictures into docs/pictures."""
    for path in pages():
        old = path.read_text()
        new = page_with_results(old, folder)
        if new != old:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")
    for path in draw(folder, ROOT / "docs" / "pictures"):
        print(f"wrote {path.relative_to(ROOT)}")


# ---------------------------------------------------------------- pictures


def draw(folder, out):
    """Draw a picture for each file of results in `folder` that has one; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    drawn = []
    for name, (file, function) in PICTURES.items():
        if (found := read(folder, file)) is None:
            continue
        figure = pyplot.figure(figsize=(7, 3.6))
        function(found, figure)
        script = " ".join(found["command"].split()[:2])
        figure.text(0.01, -0.05, f"{script}, {found['date']}", fontsize=7, color="gray")
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
        drawn.append(out / f"{name}.png")
    return drawn


_OTHERS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")


def style(way, number):
    """Return the look of a line: ours is red and thick."""
    if way.startswith(OURS):
        return {"color": "#d62728", "linewidth": 2.5, "zorder": 3}
    return {"color": _OTHERS[number % len(_OTHERS)], "linewidth": 1.3}


def draw_sizes(found, figure):
    axes = figure.subplots()
    for number, (way, f) in enumerate(found["figures"].items()):
        sizes, times = [int(c) for c in f["load_ms"]], list(f["load_ms"].values())
        axes.plot(sizes, times, marker="o", label=way, **style(way, number))
    axes.set(xscale="log", yscale="log", xlabel="MiB of the model", ylabel="load in an actor, ms")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_memory(found, figure):
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True), ("pss_mib", "private_mib"), ("proportional (PSS)", "private"), strict=True
    ):
        for number, (way, f) in enumerate(found["figures"].items()):
            gib = [value / 1024 for value in f[key].values()]
            axes.plot([int(c) for c in f[key]], gib, marker="o", label=way, **style(way, number))
        axes.set(xlabel="actors", ylabel="GiB in all" if key == "pss_mib" else "", title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_bars(values, figure, label):
    axes = figure.subplots()
    names = list(values)[::-1]
    colors = ["#d62728" if name.startswith(("ours", OURS, "call_model")) else "#7f9fbf" for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_xlabel(label)


def draw_text(found, figure):
    draw_bars({way: f["rate"] for way, f in found["figures"]["ways"].items()}, figure, "texts a second, MiniLM")


def draw_cold(found, figure):
    count, ways = max(found["figures"]["actors"].items(), key=lambda item: int(item[0]))
    draw_bars({way: f["last"] for way, f in ways.items()}, figure, f"seconds until {count} new actors gave a row")


def draw_task_overhead(found, figure):
    beyond = {row: ms for row, ms in found["figures"]["beyond_ms"].items() if not row.startswith("empty")}
    draw_bars(beyond, figure, "ms beyond an empty task and the forward")


def draw_scale(found, figure):
    largest = max(f["gib"] for f in found["figures"])
    rows = sorted((f for f in found["figures"] if f["gib"] == largest and f["nodes"] > 1), key=lambda f: f["nodes"])
    axes = figure.subplots()
    ways = {
        "plain Ray, one node": "plain_one",
        "plain Ray, all nodes": "plain_all",
        "ray_zerocopy.prefetch, all nodes": "prefetch",
    }
    for number, (way, key) in enumerate(ways.items()):
        axes.plot([f["nodes"] for f in rows], [f[key] for f in rows], marker="o", label=way, **style(way, number))
    axes.set(xlabel="nodes", ylabel=f"seconds until the nodes have {largest:g} GiB", ylim=(0, None))
    axes.set_xticks([f["nodes"] for f in rows])
    axes.legend(frameon=False)


PICTURES = {
    "load_time": ("memory", draw_sizes),
    "memory": ("memory", draw_memory),
    "text": ("text", draw_text),
    "cold": ("cold", draw_cold),
    "task_overhead": ("task_overhead", draw_task_overhead),
    "scale": ("scale", draw_scale),
}
