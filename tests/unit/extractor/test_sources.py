"""From what is written on the command line to a model, and what is said when that fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from autopar.errors import AutoparError
from autopar.extractor import extract, load

MODEL = """
import torch
from torch import nn
from width import WIDTH

def model():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

def inputs():
    return (torch.randn(8, 8),)
"""
LOSS = """
def loss(outputs, inputs):
    return (outputs - inputs[0][:, :4]).pow(2).mean()
"""


@pytest.fixture(autouse=True)
def _forget_imports() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("width", "shop") or name.startswith("autopar_model_"):
            del sys.modules[name]


def write(directory: Path, text: str, name: str = "model.py") -> str:
    (directory / "width.py").write_text("WIDTH = 16\n")
    (directory / name).write_text(text)
    return str(directory / name)


def test_a_file_gives_a_hollow_model_and_later_a_real_one(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, MODEL + LOSS))
    assert loaded.name == tmp_path.name
    assert all(p.is_meta for p in loaded.model.parameters())
    graph = loaded.extract()
    assert graph.parameter_count == 8 * 16 + 16 + 16 * 4 + 4
    model, inputs, loss = loaded.materialise(seed=3)
    again, same_inputs, _ = loaded.materialise(seed=3)
    assert not any(p.is_meta for p in model.parameters())
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(inputs[0], same_inputs[0])
    assert extract(model, inputs, loss, name=loaded.name) == graph


def test_code_that_needs_values_is_built_for_real(tmp_path: Path) -> None:
    text = MODEL.replace("WIDTH)", "int(torch.ones(16).sum().item()))", 1) + LOSS
    loaded = load(write(tmp_path, text))
    assert not any(p.is_meta for p in loaded.model.parameters())
    assert loaded.extract().parameter_count == 8 * 16 + 16 + 16 * 4 + 4


def test_inputs_that_need_values_do_not_make_the_model_real(tmp_path: Path) -> None:
    text = MODEL.replace("torch.randn(8, 8)", "torch.randn(8, int(torch.ones(8).sum()))") + LOSS
    loaded = load(write(tmp_path, text))
    assert all(p.is_meta for p in loaded.model.parameters())
    assert loaded.extract().spec("input").shape == (8, 8)


def test_a_mistake_in_the_inputs_is_found_before_a_model_is_made(tmp_path: Path) -> None:
    text = MODEL.replace("return nn.Seq", "raise SystemExit\n    return nn.Seq")
    with pytest.raises(AutoparError, match="NameError: name 'batch'"):
        load(write(tmp_path, text.replace("randn(8, 8)", "randn(batch, 8)")))


def test_a_function_in_a_package_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MODEL + LOSS + "\ndef make():\n    return model(), inputs(), loss\n"
    write(tmp_path, made, "shop.py")
    monkeypatch.chdir(tmp_path)
    loaded = load("shop:make")
    assert loaded.name == "make"
    assert loaded.extract().inputs == ("input",)


BROKEN = {
    "def modle(): return 1": r"no model\(\) and no inputs\(\).*defines modle",
    "import nosuchpackage": r"model\.py failed at .*model\.py:1: ModuleNotFoundError",
    "x = (": r"model\.py:1: SyntaxError",
    "def model(): return 1\ndef inputs(): return 'a'": (
        r"the model is a int, not an nn\.Module; the inputs are a str"
    ),
    MODEL + "\nloss = 3": r"loss must be a function",
    MODEL.replace("torch.randn", "torch.rnadn"): r"model\.py:10: AttributeError.*rnadn",
    "raise SystemExit(3)": r"model\.py:1: SystemExit",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_says_what_is_wrong_and_where(tmp_path: Path, text: str) -> None:
    with pytest.raises(AutoparError, match=BROKEN[text]):
        load(write(tmp_path, text))


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL)
    with pytest.raises(AutoparError, match=r"no file .*Did you mean .*model\.py"):
        load(path.replace("model.py", "modle.py"))
    with pytest.raises(AutoparError, match=r"Did you mean .*model\.py"):
        load(str(tmp_path))
    with pytest.raises(
        AutoparError, match=r"torch\.nn has no 'Liner'.*Did you mean torch\.nn:Line"
    ):
        load("torch.nn:Liner")
    with pytest.raises(AutoparError, match="there is no module 'nosuchpackage'"):
        load("nosuchpackage.models:make")
    with pytest.raises(AutoparError, match="hf:PATH_OR_NAME"):
        load("gpt5")
    with pytest.raises(AutoparError, match="batch and sequence are for hf"):
        load(path, batch=4)


SMALL = {
    "GPT2LMHeadModel": transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=64),
    "Qwen2ForCausalLM": transformers.Qwen2Config(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
    ),
    "BertForMaskedLM": transformers.BertConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        vocab_size=64,
        architectures=["BertModel"],
    ),
    "T5ForConditionalGeneration": transformers.T5Config(
        num_layers=1, d_model=32, vocab_size=64, decoder_start_token_id=0
    ),
    "ViTForImageClassification": transformers.ViTConfig(num_hidden_layers=1, hidden_size=48),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_config_on_disk_becomes_a_model_with_labels(tmp_path: Path, kind: str) -> None:
    SMALL[kind].save_pretrained(tmp_path)
    loaded = load(f"hf:{tmp_path}", batch=4)
    assert type(loaded.model).__name__ == kind
    assert loaded.model.training
    assert all(p.is_meta for p in loaded.model.parameters())
    graph = loaded.extract()
    assert {graph.spec(name).shape[0] for name in graph.inputs} == {4}
    assert "labels" in graph.input_keys
    assert len(graph.parameters) == len({id(p) for p in loaded.model.parameters()})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.CLIPConfig(architectures=["CLIPModel"]), "no head with a loss"),
        (
            transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]),
            "takes 'input_features'",
        ),
    ],
    ids=["one of two towers", "sound"],
)
def test_what_a_config_alone_cannot_train_is_refused(
    tmp_path: Path, config: transformers.PretrainedConfig, said: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(AutoparError, match=f"{said}.*write a model.py"):
        load(f"hf:{tmp_path}")


def test_sequence_and_positions_of_a_config(tmp_path: Path) -> None:
    SMALL["Qwen2ForCausalLM"].save_pretrained(tmp_path)
    spec = f"hf:{tmp_path / 'config.json'}"
    assert load(spec).inputs["input_ids"].shape == (8, 128)  # type: ignore[call-overload]
    assert load(spec, sequence=64).inputs["labels"].shape == (8, 64)  # type: ignore[call-overload]
    with pytest.raises(AutoparError, match="sequence 256 is longer than the 128 positions"):
        load(spec, sequence=256)


def test_a_name_that_is_not_cached_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match="nothing is downloaded"):
        load("hf:nobody/nothing")
    with pytest.raises(AutoparError, match=r"has no config\.json"):
        load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "nosuchtype"}')
    with pytest.raises(AutoparError, match="cannot read its config"):
        load(f"hf:{tmp_path}")


CUSTOM = """
import torch
from torch import nn

@torch.library.custom_op("autopar_tests::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3

@tripled.register_fake
def _(x):
    return torch.empty_like(x)

tripled.register_autograd(lambda context, gradient: gradient * 3)

class Tripling(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return tripled(self.linear(x)).square().mean()

def model():
    return Tripling()

def inputs():
    return (torch.randn(8, 8),)
"""


def test_custom_ops_of_a_cached_extraction_are_registered_when_they_are_tried(
    tmp_path: Path,
) -> None:
    """Each in a process of its own: in this one, the op would stay registered."""
    (tmp_path / "model.py").write_text(CUSTOM)
    plan = (
        "import sys, autopar\n"
        "from autopar.extractor import cache\n"
        "cache.platformdirs.user_cache_path = lambda _: __import__('pathlib').Path('cache')\n"
        "plan = autopar.plan('model.py', topology='1x2xh100-sxm', propose=True)\n"
        "assert 'tripled' in plan.proposed[0][0], plan.proposed\n"
        "autopar.verify(plan)\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", plan], cwd=tmp_path, check=True)
    assert len(list((tmp_path / "cache").rglob("*.json.gz"))) == 1
