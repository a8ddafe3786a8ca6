"""Build every model type of transformers small from its config, share it, and compare it in a worker, bit for bit.

    python benchmarks/model_types.py                 # about ten minutes on two cores
    python benchmarks/model_types.py --limit 50

Prints one line, and one more for each type that sharing refuses or changes. A type that cannot be built small, or
needs a package that is not installed, is counted and not shared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import os
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
import transformers
from results import add_json_option, write_json
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ray_zerocopy import (
    load_model_in_actor,
    load_pipeline_in_actor,
    memory,
    prepare_model_for_actors,
    rewrite_pipeline_for_actors,
)

# A larger model is not built.
MOST_PARAMETERS = 60_000_000

LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "num_hidden_groups", "num_block_repeats", "num_decode_layers"),
)
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), 16),
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
}
VOCABULARY = {"vocab_size": 1000}


def shrink(config: Any, sizes: dict[str, int]) -> Any:
    """Set the sizes of a config and of the configs in it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value, sizes)
        elif name in LAYERS and isinstance(value, int) and value > 2:
            setattr(config, name, 2)
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:2])
        elif name in sizes and isinstance(value, int) and value > sizes[name]:
            setattr(config, name, sizes[name])
        elif name.endswith("_token_id") and isinstance(value, int) and "vocab_size" in sizes:
            setattr(config, name, min(value, 999))
    return config


def build(config_class: Any) -> Any:
    """Return a small model of a config class; None if it cannot be built."""
    try:
        kinds = MODEL_MAPPING[config_class]
    except ValueError:  # transformers 5.23 names a class that it does not have
        return None
    kind = kinds[0] if isinstance(kinds, (tuple, list)) else kinds
    for sizes in ({**SIZES, **VOCABULARY}, SIZES, VOCABULARY, {}):
        try:
            with torch.device("meta"):
                model = kind(shrink(config_class(), sizes))
            if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
                continue
            torch.manual_seed(0)
            return kind(shrink(config_class(), sizes)).eval()
        except Exception:
            continue
    return None


def digest(model: Any) -> str:
    """Return a hash of the names, shapes and bytes of all tensors of a model."""
    result = hashlib.sha256()
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


class Worker:
    """A process that has imported no model."""

    def digest(self, model_ref: Any) -> tuple[str, bool]:
        model = load_model_in_actor(model_ref)
        large = [p for p in model.parameters() if p.nbytes >= 1 << 16]
        return digest(model), all(memory.location(p) is not None for p in large)

    def parts_of(self, skeleton: Any, refs: Any) -> list[str]:
        pipeline = load_pipeline_in_actor(skeleton, refs)
        return [digest(part) for part in vars(pipeline).values() if isinstance(part, torch.nn.Module)]


def small_pipelines() -> Iterator[tuple[str, Any]]:
    """Yield pipelines of several models that are built here, without files from the Hub."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    bert, vit = BertModel(BertConfig(vocab_size=1000, **small)), ViTModel(ViTConfig(**small))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4))
    processor = transformers.ViTImageProcessor()
    yield "retriever and reader", types.SimpleNamespace(retriever=bert, reader=gpt, top_k=5)
    yield "one model twice", types.SimpleNamespace(encoder=bert, again=bert, names=["a", "b"])
    yield "captioning", types.SimpleNamespace(encoder=vit, decoder=gpt, processor=processor)
    feature = transformers.ImageFeatureExtractionPipeline(model=vit, image_processor=processor, device="cpu")
    yield "transformers' ImageFeatureExtractionPipeline", feature
    chain = types.SimpleNamespace(first=torch.compile(bert, backend="eager"), second=torch.nn.DataParallel(vit))
    yield "compiled and data-parallel", chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=10_000, help="share at most this many types")
    add_json_option(parser)
    options = parser.parse_args()
    limit = options.limit
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=2 << 30,
        logging_level="error",
        log_to_driver=False,
    )
    worker = ray.remote(num_cpus=0.1)(Worker).remote()
    begin = time.perf_counter()
    equal, not_built, failed = 0, 0, []
    for model_type, config_class in sorted(CONFIG_MAPPING.items()):
        if config_class not in MODEL_MAPPING:
            continue
        if equal + len(failed) >= limit:
            break
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = build(config_class)
        if model is None:
            not_built += 1
            continue
        try:
            same, shared = ray.get(worker.digest.remote(prepare_model_for_actors(model)))
            reason = "" if (same, shared) == (digest(model), True) else "not equal" if shared else "not shared"
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        if reason:
            failed.append(f"{model_type}: {reason}")
        else:
            equal += 1
        del model
    pipelines, equal_pipelines = list(small_pipelines()), 0
    for name, pipeline in pipelines:
        try:
            got = ray.get(worker.parts_of.remote(*rewrite_pipeline_for_actors(pipeline)))
            expected = [digest(part) for part in vars(pipeline).values() if isinstance(part, torch.nn.Module)]
            equal_pipelines += got == expected
            failed += [f"{name}: not equal"] * (got != expected)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    summary = (
        f"transformers {transformers.__version__}: {equal} model types equal and shared in a worker, "
        f"{equal_pipelines} of {len(pipelines)} pipelines, {len(failed)} failed, {not_built} not built, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    print(summary)
    counts = {"equal": equal, "pipelines": equal_pipelines, "failed": failed, "not_built": not_built}
    write_json(options.json, counts, [summary])
    for line in failed:
        print(f"  {line}")
    ray.shutdown()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    main()
