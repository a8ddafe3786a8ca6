"""Rank pictures of unequal sizes by their sharpness.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/picture_sharpness.py
    .venv/bin/python examples/picture_sharpness.py --folder ~/Pictures --limit 100     # the first 100 of yours

The pictures are those that the installed packages carry: photos, diagrams and icons from 16 x 16 to some megapixels.
The model computes the variance of the Laplacian, a usual measure of sharpness. The pictures of a micro-batch are
padded to the largest of them. `sort_by` reads the size of each picture from the head of its file, so that pictures of
similar size go together.
"""

from __future__ import annotations

import argparse
import io
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image

from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


class Sharpness(torch.nn.Module):
    """The variance of the Laplacian of grey pictures, each in the top left corner of its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.laplacian = torch.nn.Conv2d(1, 1, 3, bias=False)
        self.laplacian.weight.data[:] = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])

    def forward(self, pictures: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        edges = self.laplacian(pictures)[:, 0]
        rows, columns = torch.arange(edges.shape[1]), torch.arange(edges.shape[2])
        inside = (rows[:, None] < sizes[:, 0, None, None] - 2) & (columns < sizes[:, 1, None, None] - 2)
        count = inside.sum((1, 2)).clamp(min=1)
        mean = (edges * inside).sum((1, 2)) / count
        return ((edges - mean[:, None, None]) ** 2 * inside).sum((1, 2)) / count


class Ranker(ZeroCopyPredictor):
    """Adds the sharpness and the size of each picture. A file that is no picture has an error."""

    micro_batch_tokens = 4_000_000  # pixels, padding included
    on_error = "null"

    def sort_by(self, batch: pa.Table) -> list[int]:
        return [max(open_picture(file).size) ** 2 for file in batch["bytes"].to_pylist()]

    def preprocess(self, batch: pa.Table) -> dict[str, torch.Tensor]:
        pictures = [grey(open_picture(file)) for file in batch["bytes"].to_pylist()]
        sizes = torch.tensor([picture.shape for picture in pictures])
        padded = torch.zeros(len(pictures), 1, *np.maximum(sizes.amax(0).numpy(), 3))
        for place, picture in zip(padded, pictures, strict=True):
            place[0, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture)
        return {"pictures": padded, "sizes": sizes}

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> dict:
        sizes = ["{} x {}".format(*open_picture(file).size) for file in batch["bytes"].to_pylist()]
        return {"path": batch["path"], "size": sizes, "sharpness": outputs}


def open_picture(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def grey(picture: Image.Image) -> np.ndarray:
    """Return the brightness of each pixel, from 0 to 1."""
    if picture.mode.startswith("I"):  # 16 bits, which convert("L") would cut off at 255
        return np.asarray(picture).astype(np.float32) / 65535
    return np.asarray(picture.convert("L")).astype(np.float32) / 255


def find_pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank pictures by their sharpness.")
    parser.add_argument(
        "--folder", type=Path, default=Path(sysconfig.get_paths()["purelib"]), help="default: packages"
    )
    parser.add_argument("--limit", type=int, help="only the first LIMIT pictures")
    options = parser.parse_args()
    files = find_pictures(options.folder)[: options.limit]
    if not files:
        raise SystemExit(f"No pictures in {options.folder}. Pass another --folder.")

    ray.init(include_dashboard=False)
    actors = max(1, min(int(ray.cluster_resources()["CPU"]), len(files) // 256))  # as many as cores, if all have work
    ds = ray.data.from_items([{"path": str(file), "bytes": file.read_bytes()} for file in files]).map_batches(
        Ranker.using(prepare_model_for_actors(Sharpness())),
        batch_format="pyarrow",
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
    )
    rows = ds.take_all()
    ranked = sorted((row for row in rows if row["error"] is None), key=lambda row: -row["sharpness"])
    for row in ranked:
        print(f"{row['sharpness']:7.4f}  {row['size']:>11}  {row['path']}")
    for row in rows:
        if row["error"] is not None:
            print(f"failed: {row['path']}: {row['error']}")
    print(f"{len(ranked)} of {len(rows)} pictures ranked")
    ray.shutdown()


if __name__ == "__main__":
    main()
