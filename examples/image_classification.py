"""Read image files as bytes, decode them in `preprocess`, and classify them.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]"
    .venv/bin/python examples/image_classification.py
    .venv/bin/python examples/image_classification.py --limit 50     # only the first 50 of 397 images

The images are scikit-learn's handwritten digits, 8 x 8 pixels each. The example writes them as PNG files into a
temporary folder. It trains a small network on the first 1400 digits, which takes a few seconds. The job classifies
the other digits, which the network has not seen.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors

TRAINING_IMAGES = 1400


class Digits(ZeroCopyPredictor):
    """Adds the digit of each image file, and keeps the column `path`."""

    output_column = "digit"
    keep_columns = ("path",)

    def preprocess(self, batch: pa.Table) -> torch.Tensor:
        images = [np.asarray(Image.open(io.BytesIO(file)).convert("L")) for file in batch["bytes"].to_pylist()]
        return torch.from_numpy(np.stack(images)[:, None]) / 255

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).argmax(1)


def train(images: torch.Tensor, digits: torch.Tensor) -> torch.nn.Module:
    """Train a small convolutional network for 15 epochs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # with more threads this small job is slower
    convolutions = [
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3),
        torch.nn.ReLU(),
    ]
    model = torch.nn.Sequential(*convolutions, torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(15):
        for rows in torch.randperm(len(images)).split(64):
            loss = torch.nn.functional.cross_entropy(model(images[rows]), digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify handwritten digits in PNG files.")
    parser.add_argument("--limit", type=int, help="classify only the first LIMIT images")
    limit = parser.parse_args().limit
    data = load_digits()
    pixels = (data.images * 15.9375).astype(np.uint8)  # from 0..16 to 0..255
    images = torch.from_numpy(pixels[:TRAINING_IMAGES, None]) / 255
    model = train(images, torch.from_numpy(data.target[:TRAINING_IMAGES]))

    ray.init(include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        for number, image in list(enumerate(pixels))[TRAINING_IMAGES:][:limit]:
            Image.fromarray(image).save(Path(folder, f"{number}.png"))
        ds = ray.data.read_binary_files(folder, include_paths=True, override_num_blocks=4).map_batches(
            Digits.using(prepare_model_for_actors(model)),
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,  # two actors need one CPU, so the example runs on any machine
        )
        rows = ds.take_all()
    truth = [int(data.target[int(Path(row["path"]).stem)]) for row in rows]
    pairs = Counter((true, row["digit"]) for true, row in zip(truth, rows, strict=True))
    for digit in range(10):
        wrong = [f"read as {read}: {count}" for (true, read), count in pairs.items() if true == digit != read]
        print(f"digit {digit}: {pairs[digit, digit]:2} of {truth.count(digit):2} right", *wrong, sep="  ")
    print(f"{sum(pairs[digit, digit] for digit in range(10))} of {len(rows)} images right")
    ray.shutdown()


if __name__ == "__main__":
    main()
