"""Small models with the shapes of real ones, each with one global batch of 8 and a scalar loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

BATCH = 8
IGNORED = -100

Inputs = tuple[Tensor, ...] | dict[str, Tensor]
Built = tuple[nn.Module, Inputs]


def unbalanced_labels(shape: tuple[int, int], classes: int) -> Tensor:
    """Random classes in which sample ``i`` has about ``i`` times as many ignored places as 1."""
    labels = torch.randint(classes, shape)
    samples, places = shape
    kept = (
        torch.arange(places)[None, :] >= (torch.arange(samples) * places // (samples + 1))[:, None]
    )
    return labels.where(kept, torch.tensor(IGNORED))


class _NeverNarrower(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


class LossOf(nn.Module):
    """A transformers model that returns only its loss.

    Many of them do norms, rotary tables and the loss in float32 whatever their weights are; with
    float64 weights this one does not, so that it can be compared to the last digits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        double = next(self.model.parameters()).dtype == torch.float64
        with _NeverNarrower() if double else nullcontext():
            loss: Tensor = self.model(**inputs).loss
        return loss


def _tokens(vocabulary: int, length: int = 16) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(vocabulary, (BATCH, length)),
        "labels": unbalanced_labels((BATCH, length), vocabulary),
    }


def gpt2(dropout: float = 0.0) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LossOf(GPT2LMHeadModel(config)), _tokens(64)


def llama(dropout: float = 0.0) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16,
        attention_dropout=dropout,
        use_cache=False,
    )
    return LossOf(LlamaForCausalLM(config)), _tokens(64)


def qwen(dropout: float = 0.0) -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=16,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LossOf(Qwen3ForCausalLM(config)), _tokens(64)


def mixtral(dropout: float = 0.0) -> Built:
    """Its experts one by one, as torch has no grouped product of float64."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=16,
        attention_dropout=dropout,
        use_cache=False,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager")
    return LossOf(model), _tokens(64)


def phi3(dropout: float = 0.0) -> Built:
    """Query, key and value in one projection, of unequal parts; so are gate and value."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16,
        original_max_position_embeddings=16,
        attention_dropout=dropout,
        resid_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LossOf(Phi3ForCausalLM(config)), _tokens(64)


def bert(dropout: float = 0.0) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    lengths = 16 - torch.arange(BATCH)
    mask = (torch.arange(16)[None, :] < lengths[:, None]).long()
    return LossOf(BertForMaskedLM(config)), {**_tokens(64), "attention_mask": mask}


def t5(dropout: float = 0.0) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    batch = {
        "input_ids": torch.randint(1, 64, (BATCH, 16)),
        "labels": unbalanced_labels((BATCH, 8), 64),
    }
    return LossOf(T5ForConditionalGeneration(config)), batch


def vit(dropout: float = 0.0) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=8,
    )
    batch = {
        "pixel_values": torch.randn(BATCH, 4, 16, 16, dtype=torch.get_default_dtype()),
        "labels": torch.randint(8, (BATCH,)),
    }
    return LossOf(ViTForImageClassification(config)), batch


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """Batch norm, strides, max pooling, in-place additions, a dropout before the head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = nn.Sequential(
            _Bottleneck(16, 16, 1), _Bottleneck(16, 32, 2), _Bottleneck(32, 32, 1)
        )
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 16)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stages(self.pool(self.stem(images)))
        x = torch.flatten(self.average(x), 1)
        return F.cross_entropy(self.head(self.dropout(x)), labels, label_smoothing=0.1)


def resnet(dropout: float = 0.0) -> Built:
    images = torch.randn(BATCH, 4, 16, 16, dtype=torch.get_default_dtype())
    return ResNet(dropout), (images, torch.randint(16, (BATCH,)))


class UNet(nn.Module):
    """Skips around a bottleneck, group norm, transposed convolution and nearest upsampling."""

    def __init__(self, dropout: float) -> None:
        super().__init__()

        def block(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU()
            )

        self.down1 = block(4, 16)
        self.down2 = block(16, 32)
        self.bottom = block(32, 32)
        self.dropout = nn.Dropout(dropout)
        self.up2 = block(64, 16)
        self.widen = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.up1 = block(32, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, noisy: Tensor, target: Tensor) -> Tensor:
        first = self.down1(noisy)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.dropout(self.bottom(F.avg_pool2d(second, 2)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.widen(self.up2(torch.cat([x, second], dim=1)))
        x = self.out(self.up1(torch.cat([x, first], dim=1)))
        return F.mse_loss(x, target)


def unet(dropout: float = 0.0) -> Built:
    dtype = torch.get_default_dtype()
    noisy, target = (torch.randn(BATCH, 4, 16, 16, dtype=dtype) for _ in range(2))
    return UNet(dropout), (noisy, target)


def tower(features: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.LayerNorm(width),
        nn.Linear(width, 16),
    )


class TwoTower(nn.Module):
    """Two branches without a common operator until the contrastive loss."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query = tower(24, 64, dropout)
        self.item = tower(40, 32, dropout)
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        q = F.normalize(self.query(queries), dim=-1)
        i = F.normalize(self.item(items), dim=-1)
        scores = q @ i.t() * torch.exp(self.temperature)
        labels = torch.arange(scores.shape[0], device=scores.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


def two_tower(dropout: float = 0.0) -> Built:
    dtype = torch.get_default_dtype()
    return TwoTower(dropout), (
        torch.randn(BATCH, 24, dtype=dtype),
        torch.randn(BATCH, 40, dtype=dtype),
    )


TABLE_ROWS = (512, 256, 128)


class DLRM(nn.Module):
    """Large embedding tables, bags of them, pairwise interaction, two MLPs."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(rows, 16) for rows in TABLE_ROWS])
        self.bottom = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)
        )

    def forward(self, dense: Tensor, sparse: Tensor, clicks: Tensor) -> Tensor:
        x = self.bottom(dense)
        bags = [table(sparse[:, i]).sum(dim=1) for i, table in enumerate(self.tables)]
        features = torch.stack([x, *bags], dim=1)
        pairs = torch.bmm(features, features.transpose(1, 2)).flatten(1)
        logits = self.top(torch.cat([x, pairs], dim=1)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, clicks)


def dlrm(dropout: float = 0.0) -> Built:
    dtype = torch.get_default_dtype()
    return DLRM(dropout), {
        "dense": torch.randn(BATCH, 12, dtype=dtype),
        "sparse": torch.stack([torch.randint(rows, (BATCH, 4)) for rows in TABLE_ROWS], dim=1),
        "clicks": torch.randint(2, (BATCH,)).to(dtype),
    }


class TransformerEncoder(nn.Module):
    """torch's own encoder, pre-norm and post-norm, with a padding mask and a pooled regression."""

    def __init__(self, dropout: float) -> None:
        super().__init__()

        def layers(norm_first: bool) -> nn.TransformerEncoder:
            layer = nn.TransformerEncoderLayer(
                32, 4, 64, dropout, batch_first=True, norm_first=norm_first
            )
            return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        self.first = layers(norm_first=True)
        self.second = layers(norm_first=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor, padding: Tensor, target: Tensor) -> Tensor:
        x = self.second(self.first(x, src_key_padding_mask=padding))
        return F.smooth_l1_loss(self.head(x).mean(dim=1), target)


def transformer_encoder(dropout: float = 0.0) -> Built:
    dtype = torch.get_default_dtype()
    padding = torch.arange(16)[None, :] >= (16 - torch.arange(BATCH))[:, None]
    x, target = torch.randn(BATCH, 16, 32, dtype=dtype), torch.randn(BATCH, 8, dtype=dtype)
    return TransformerEncoder(dropout), (x, padding, target)


class MLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(24, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 32), nn.Tanh()
        )
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(x)), labels)


def mlp(dropout: float = 0.0) -> Built:
    x = torch.randn(BATCH, 24, dtype=torch.get_default_dtype())
    return MLP(dropout), (x, torch.randint(16, (BATCH,)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.dropout(self.o(y.transpose(1, 2).reshape(batch, length, width)))
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + self.dropout(y)


class GPT(nn.Module):
    """A plain decoder with separate q, k, v and, when ``tied``, one embedding at both ends."""

    def __init__(
        self,
        vocabulary: int = 64,
        length: int = 16,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([_Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _token_pair() -> tuple[Tensor, Tensor]:
    batch = _tokens(64)
    return batch["input_ids"], batch["labels"]


def gpt(dropout: float = 0.0) -> Built:
    return GPT(dropout=dropout), _token_pair()


def gpt_tied(dropout: float = 0.0) -> Built:
    return GPT(dropout=dropout, tied=True), _token_pair()


class _Codebook(nn.Module):
    """A VQ autoencoder: some that read the codebook and the codes send no gradient back."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.encode = nn.Linear(16, 32)
        self.codes = nn.Embedding(24, 32)
        self.decode = nn.Sequential(nn.Dropout(dropout), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        found, codes = self.encode(x), self.codes.weight
        far = codes.square().sum(-1) - 2 * found @ codes.t()
        nearest = self.codes(far.argmin(-1))
        passed = found + (nearest - found).detach()
        commitment = F.mse_loss(nearest, found.detach()) + F.mse_loss(found, nearest.detach()) / 4
        return F.mse_loss(self.decode(passed), x) + commitment


def codebook(dropout: float = 0.0) -> Built:
    return _Codebook(dropout), (torch.randn(BATCH, 4, 16),)


ZOO: dict[str, Callable[..., Built]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen": qwen,
    "mixtral": mixtral,
    "phi3": phi3,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "unet": unet,
    "two_tower": two_tower,
    "dlrm": dlrm,
    "transformer_encoder": transformer_encoder,
    "mlp": mlp,
    "gpt": gpt,
    "gpt_tied": gpt_tied,
    "codebook": codebook,
}
"""Functions of ``dropout`` that return a model in train mode and one global batch."""


class Towers(nn.Module):
    """Two branches without a common operator until pairs are scored, each pair by itself: unlike
    in ``TwoTower`` a batch can be worked on in parts."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query = tower(24, 64, dropout)
        self.item = tower(40, 32, dropout)
        self.score = nn.Linear(16, 4)

    def forward(self, queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.score(self.query(queries) * self.item(items)), target)


def towers(dropout: float = 0.0) -> Built:
    dtype = torch.get_default_dtype()
    sizes = (24, 40, 4)
    return Towers(dropout), tuple(torch.randn(BATCH, n, dtype=dtype) for n in sizes)


class Inception(nn.Module):
    """Four branches of unequal size over one tensor, joined by channels."""

    def __init__(self, dropout: float) -> None:
        super().__init__()

        def branch(channels: int, *layers: tuple[int, int]) -> nn.Sequential:
            made: list[nn.Module] = []
            for out, kernel in layers:
                conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
                made += [conv, nn.GroupNorm(2, out), nn.ReLU()]
                channels = out
            return nn.Sequential(*made)

        self.stem = branch(4, (16, 3))
        self.one = branch(16, (8, 1))
        self.three = branch(16, (8, 1), (16, 3))
        self.five = branch(16, (4, 1), (8, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), *branch(16, (8, 1)))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(40 * 64, 8))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        joined = torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)
        return F.cross_entropy(self.head(joined), labels)


def inception(dropout: float = 0.0) -> Built:
    images = torch.randn(BATCH, 4, 8, 8, dtype=torch.get_default_dtype())
    return Inception(dropout), (images, torch.randint(8, (BATCH,)))


BRANCHES: dict[str, Callable[..., Built]] = {"towers": towers, "inception": inception}
"""As ``ZOO``: models for stages that are a graph, of ops that the others have."""


def gpt_deep(dropout: float = 0.0) -> Built:
    """As many layers as two chunks on each of two groups need."""
    return GPT(layers=4, dropout=dropout, tied=True), _token_pair()


def _published(name: str, **sizes: int) -> Built:
    """One of examples/published, made small."""
    path = Path(__file__).parents[2] / "examples" / "published" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(sizes, BATCH=BATCH, LENGTH=16, VOCABULARY=64)
    return module.model(), module.inputs()


def palm(dropout: float = 0.0) -> Built:
    """One head of keys and values, layers in parallel."""
    del dropout
    return _published("palm", LAYERS=2, WIDTH=32, HEADS=4, HEAD_WIDTH=8, HIDDEN=48)


def gopher(dropout: float = 0.0) -> Built:
    """Attention with relative positions."""
    del dropout
    return _published("gopher", LAYERS=2, WIDTH=32, HEADS=4, HEAD_WIDTH=8)


WRITTEN_DOWN: dict[str, Callable[..., Built]] = {
    "gpt_deep": gpt_deep,
    "palm": palm,
    "gopher": gopher,
}
"""As ``ZOO``: models for what people publish."""


def zoo(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Built:
    """A model of any table, the same weights and batch for the same ``seed``."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model, inputs = {**ZOO, **BRANCHES, **WRITTEN_DOWN}[name](**options)
        finally:
            torch.set_default_dtype(before)
    return model.to(dtype).train(), inputs
