"""Find how much of each recording is speech, in recordings of unequal lengths.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo]" && .venv/bin/pip install --no-deps silero-vad==6.2.3
    apt-get install asterisk-core-sounds-en-wav
    .venv/bin/python examples/speech_detection.py
    .venv/bin/python examples/speech_detection.py --folder recordings --limit 50     # other WAV files, the first 50

The recordings are the English prompts of the telephone server Asterisk, from the Debian package above: 568 WAV files
of 0.1 to 30 seconds, 8000 samples a second. The model is the published TorchScript network Silero VAD. It reads 256
samples at a time, so the longest recording of a micro-batch sets the number of calls. `sort_by` puts recordings of
similar lengths together.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from ray_zerocopy import ZeroCopyPredictor, prepare_model_for_actors
from ray_zerocopy.arrow import column_to_padded

RATE, CHUNK = 8000, 256
FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")


class SpeechDetector(ZeroCopyPredictor):
    """Adds the seconds of each recording, and the seconds in which someone speaks."""

    sort_by = "samples"  # the number of samples
    micro_batch_tokens = 60 * RATE  # a minute of samples, padding included

    def preprocess(self, batch: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
        samples, lengths = column_to_padded(batch, "samples")
        samples = torch.nn.functional.pad(samples.float() / 2**15, (0, -samples.shape[1] % CHUNK))
        return samples.unflatten(1, (-1, CHUNK)), lengths

    def predict(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        chunks, lengths = inputs
        self.model.reset_states()
        speech = torch.cat([self.model(chunk, RATE) for chunk in chunks.unbind(1)], 1) > 0.5
        there = torch.arange(speech.shape[1]) * CHUNK < lengths[:, None]
        return torch.stack([lengths / RATE, (speech & there).sum(1) * CHUNK / RATE], 1)

    def postprocess(self, outputs: torch.Tensor, batch: pa.Table) -> dict:
        return {
            "path": batch["path"],
            "seconds": outputs[:, 0],
            "speech": torch.minimum(outputs[:, 1], outputs[:, 0]),
        }


def problem(path: Path) -> str:
    """Say why the model cannot hear a file, or return an empty string."""
    try:
        with wave.open(str(path)) as file:
            channels, bits, rate = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
    except (wave.Error, EOFError, OSError) as error:
        return f"not a WAV file that can be read ({error})"
    right = (channels, bits, rate) == (1, 16, RATE)
    return "" if right else f"{channels} channels, {bits} bits, {rate} samples a second, not 1, 16 and {RATE}"


def read_wav(row: dict) -> dict:
    """Return the samples of a WAV file of 16 bits and one channel."""
    with wave.open(io.BytesIO(row["bytes"])) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return {"path": row["path"], "samples": samples}


def load_model() -> torch.nn.Module:
    package = importlib.util.find_spec("silero_vad")
    if package is None or package.origin is None:
        raise SystemExit("The model is missing: pip install --no-deps silero-vad==6.2.3")
    return torch.jit.load(str(Path(package.origin).parent / "data" / "silero_vad.jit")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Find how much of each recording is speech.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="WAV files, default: %(default)s")
    parser.add_argument("--limit", type=int, help="only the first LIMIT recordings")
    options = parser.parse_args()
    found = sorted(path for path in options.folder.rglob("*.wav") if path.is_file())[: options.limit]
    problems = {file: problem(file) for file in found}
    files = [file for file in found if not problems[file]]
    for file in found:
        if problems[file]:
            print(f"left out: {file}: {problems[file]}")
    if not files:
        raise SystemExit(
            f"No WAV files of one channel, 16 bits and {RATE} samples a second in {options.folder}. Install some: "
            f"apt-get install asterisk-core-sounds-en-wav"
        )

    ray.init(include_dashboard=False)
    actors = max(1, min(int(ray.cluster_resources()["CPU"]), len(files) // 256))  # as many as cores, if all have work
    ds = ray.data.from_items([{"path": str(file), "bytes": file.read_bytes()} for file in files])
    ds = ds.map(read_wav).map_batches(
        SpeechDetector.using(prepare_model_for_actors(load_model())),
        batch_format="pyarrow",
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,  # the rest is for reading
    )
    rows = ds.take_all()
    for row in sorted(rows, key=lambda row: (row["speech"] / max(row["seconds"], 1e-9), -row["seconds"]))[:5]:
        print(f"{row['speech']:5.2f} of {row['seconds']:5.2f} s  {row['path']}")
    total, speech = (sum(row[column] for row in rows) for column in ("seconds", "speech"))
    print(f"{len(rows)} recordings: {speech:.1f} of {total:.1f} seconds are speech")
    ray.shutdown()


if __name__ == "__main__":
    main()
