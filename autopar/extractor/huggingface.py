"""``hf:PATH_OR_NAME``: a transformers model with random weights, its batch and its labels."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from autopar.errors import AutoparError

DEFAULT_BATCH = 8
DEFAULT_SEQUENCE = 1024
"""Tokens a sample, or what the model has positions for if that is less."""

_AUTO_CLASSES = (
    ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
)
"""Tried in this order for a config without architectures, or with one that has no loss."""

Batch = dict[str, torch.Tensor]


def builder(
    name: str, batch: int | None, sequence: int | None
) -> tuple[str, Callable[[], tuple[nn.Module, Batch, None]]]:
    """A name for the model, and what builds it with one global batch."""
    config = _config(name)
    make = _model_maker(config, name)

    def build() -> tuple[nn.Module, Batch, None]:
        model = make()
        return model.train(), _batch(model, config, name, batch or DEFAULT_BATCH, sequence), None

    path = Path(name)
    short = path.resolve().parent.name if path.name == "config.json" else path.name
    return short, build


def _config(name: str) -> PretrainedConfig:
    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise AutoparError(f"hf:{name}: there is no file {name!r}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise AutoparError(f"hf:{name}: the directory {name!r} has no config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if path.exists():
            reason = str(error).splitlines()[0]
            raise AutoparError(
                f"hf:{name}: transformers cannot read its config: {reason}"
            ) from error
        raise AutoparError(
            f"hf:{name}: neither a path nor a model in the local cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}); nothing is downloaded.{_near(name)} "
            "Give a path to a config.json."
        ) from error
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return config


def _near(name: str) -> str:
    try:
        cached = [repo.repo_id for repo in huggingface_hub.scan_cache_dir().repos]
    except (huggingface_hub.errors.CacheNotFound, OSError):
        cached = []
    near = difflib.get_close_matches(name, cached, 1, 0.4)
    return f" Did you mean hf:{near[0]}?" if near else ""


def _model_maker(config: PretrainedConfig, name: str) -> Callable[[], nn.Module]:
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if found is not None and not architecture.endswith("Model"):
            return lambda: found(config)
    several = len(config.sub_configs) > 1  # such as CLIP: a head would train one of its towers
    for auto, types in _AUTO_CLASSES:
        if config.model_type in types and not several:
            return lambda: getattr(transformers, auto).from_config(config)
    raise AutoparError(
        f"hf:{name}: a {config.model_type} with architectures {config.architectures} has no head "
        "with a loss that autopar can give labels to; write a model.py for it"
    )


def _batch(
    model: nn.Module, config: PretrainedConfig, name: str, batch: int, sequence: int | None
) -> Batch:
    head = type(model).__name__
    text: Any = config.get_text_config()
    classes = getattr(config, "num_labels", 2)
    takes = getattr(model, "main_input_name", "input_ids")
    if takes not in ("input_ids", "pixel_values"):
        raise AutoparError(
            f"hf:{name}: a {head} takes {takes!r}; autopar can make token ids and images: write a "
            "model.py with model(), inputs() and loss()"
        )
    if takes == "pixel_values":
        inputs = {"pixel_values": _images(config, batch)}
    else:
        longest = getattr(text, "max_position_embeddings", None)
        length = sequence or min(DEFAULT_SEQUENCE, longest or DEFAULT_SEQUENCE)
        if longest and length > longest:
            raise AutoparError(
                f"hf:{name}: sequence {length} is longer than the {longest} positions of the model"
            )
        inputs = {"input_ids": torch.randint(text.vocab_size, (batch, length))}
    if head.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        labels = torch.randint(text.vocab_size, tuple(inputs["input_ids"].shape))
    elif head.endswith(("ForImageClassification", "ForSequenceClassification")):
        labels = torch.randint(classes, (batch,))
    elif head.endswith("ForTokenClassification"):
        labels = torch.randint(classes, tuple(inputs["input_ids"].shape))
    else:
        raise AutoparError(
            f"hf:{name}: autopar knows no labels for {head}; write a model.py with model(), "
            "inputs() and loss()"
        )
    return {**inputs, "labels": labels}


def _images(config: PretrainedConfig, batch: int) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(batch, getattr(config, "num_channels", 3), height, width)
