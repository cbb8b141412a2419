"""The largest models are extracted on the meta device in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autopar import extractor
from autopar.extractor import extract
from tests.helpers.zoo import GPT

MEASURE = """
import resource, sys, time
import torch, transformers
from autopar.extractor import extract

kind, layers = sys.argv[1], int(sys.argv[2])
if kind == "llama":
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        use_cache=False,
    )
    make, length = transformers.LlamaForCausalLM, 8192
else:
    config = transformers.GPT2Config(
        vocab_size=51200, n_positions=2048, n_embd=12288, n_layer=layers, n_head=96,
        use_cache=False,
    )
    make, length = transformers.GPT2LMHeadModel, 2048
with torch.device("meta"):
    model = make(config)
    ids = torch.zeros(64, length, dtype=torch.int64)
start = time.process_time()
graph = extract(model, {"input_ids": ids, "labels": ids}, precision="mixed")
cpu_s = time.process_time() - start
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(graph.operators), graph.parameter_count, peak_kib * 1024, cpu_s)
"""


def measure(kind: str, layers: int) -> tuple[int, int, int, float]:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, kind, str(layers)]
    root = Path(extractor.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    operators, parameters, peak, cpu_s = done.stdout.split()
    return int(operators), int(parameters), int(peak), float(cpu_s)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers", "billions"),
    [("llama", 32, 8.03), ("gpt3", 96, 174.6), ("llama", 128, 28.97)],
)
def test_a_large_model_is_extracted_in_under_a_gigabyte(
    kind: str, layers: int, billions: float
) -> None:
    operators, parameters, peak_bytes, _ = measure(kind, layers)
    assert parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert operators > layers * 30
    assert peak_bytes < 1e9


def test_operators_grow_by_the_same_number_for_each_layer() -> None:
    ids = torch.zeros(8, 16, dtype=torch.int64)
    with torch.device("meta"):
        models = [GPT(layers=layers) for layers in (1, 2, 3)]
    sizes = [len(extract(model, (ids, ids)).operators) for model in models]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
