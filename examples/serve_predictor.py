"""Serve `text_classification.TopicClassifier`, the predictor of a batch job, over HTTP with Ray Serve.

    python3 -m venv .venv && .venv/bin/pip install -e ".[demo,serve]"
    .venv/bin/python examples/serve_predictor.py             # sends its own requests, and ends
    .venv/bin/python examples/serve_predictor.py --stay      # then answers other requests until Ctrl-C:
    curl "http://127.0.0.1:8000/" -d "a calendar of holidays"

Two replicas share one copy of the weights. Requests that arrive at the same time become one batch for the model. The
model is lost when the process that prepared it ends, so keep this process running as long as the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
from ray import serve
from starlette.requests import Request
from text_classification import TopicClassifier, prepare_classifier

from ray_zerocopy import ModelRef

QUESTIONS = (
    "send an email over an encrypted connection",
    "what day of the week was the fourth of July",
    "the square root of two",
    "copy a directory to another disk",
    "run a function in the background",
    "replace one word by another in a sentence",
)


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class Topics:
    """A replica that answers a text with its topic."""

    def __init__(self, model_ref: ModelRef) -> None:
        self.predictor = TopicClassifier(model_ref)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        # In a thread, so that the replica accepts requests meanwhile.
        rows = await asyncio.to_thread(self.predictor, pa.table({"text": texts}))
        return [{**row, "replica": os.getpid()} for row in rows.to_pylist()]

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self.classify((await request.body()).decode())


def ask(url: str, text: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, data=text.encode(), timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the topic classifier over HTTP.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--stay", action="store_true", help="serve until Ctrl-C")
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    # With a name, because Serve pickles the arguments of bind itself: Ray would keep an unnamed model for good.
    model_ref = prepare_classifier(name="topics")
    serve.run(Topics.bind(model_ref))
    url = f"http://127.0.0.1:{options.port}/"
    with ThreadPoolExecutor(len(QUESTIONS)) as clients:
        answers = clients.map(lambda text: ask(url, text), QUESTIONS)
    for answer in answers:
        print(f"{answer['topic']:12} {answer['score']:.2f}  {answer['text']}  (process {answer['replica']})")
    if options.stay:
        print(f"serving at {url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    serve.delete("default")
    ray.shutdown()


if __name__ == "__main__":
    main()
