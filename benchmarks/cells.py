"""What cells of a table of published runs say, in the spellings that people use.

A cell that cannot be read is told by its column, by what it says, and by what would be read; one
that says nothing is ``None``, and what is assumed then is decided where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite

Row = dict[str, str]

NOT_SAID = ("", "none", "nan", "null", "n/a", "na", "-", "?", "unknown")
OUT_OF_MEMORY = ("oom", "out of memory", "out_of_memory")

MOST = {
    # no model or machine that anybody ran has more; beyond them numbers are typing errors
    "layers": 4096,
    "hidden": 10**6,
    "ffn": 10**7,
    "moe_ffn": 10**7,
    "vocab": 10**8,
    "seq_len": 10**8,
    "heads": 10**5,
    "kv_heads": 10**5,
    "head_dim": 10**5,
    "n_gpus": 10**6,
    "gpus_per_node": 10**6,
    "global_batch": 10**7,
    "micro_batch": 10**6,
    "n_experts": 10**4,
    "topk": 10**4,
}
"""Of a column."""


class SkippedError(Exception):
    """Why a row is not predicted."""


def is_said(row: Mapping[str, str], column: str) -> bool:
    return row[column].lower() not in NOT_SAID


def number(row: Mapping[str, str], column: str, default: int | None = None) -> int:
    """``default``: what an empty cell, or one that says none, means."""
    text = row[column]
    if not is_said(row, column):
        if default is None:
            raise SkippedError(f"{column} is not given (it says {text!r}); {WHOLE_NUMBER}")
        return default
    try:
        found = float(_plain(text))
    except ValueError:
        raise SkippedError(f"{column} is {text!r}, no number; {WHOLE_NUMBER}") from None
    if not isfinite(found) or found != int(found):
        raise SkippedError(f"{column} is {text!r}, no whole number; {WHOLE_NUMBER}")
    if found < 1:
        raise SkippedError(f"{column} is {text}, and must be at least 1; {WHOLE_NUMBER}")
    most = MOST.get(column)
    if most is not None and found > most:
        raise SkippedError(f"{column} is {text}, more than the {most} that are built here")
    return int(found)


WHOLE_NUMBER = "a whole number like 8, 8.0 or 1,536 is read"


def positive(row: Mapping[str, str], column: str) -> float | None:
    """``None`` where nothing is said, or that memory ran out.

    >>> positive({"value": "24k"}, "value"), positive({"value": "~1,310"}, "value")
    (24000.0, 1310.0)
    """
    text = row[column]
    if not is_said(row, column) or text.lower() in OUT_OF_MEMORY:
        return None
    said = re.fullmatch(r"[~≈><≥≤\s]*(.*?)\s*([kKM%]?|s|sec|seconds)", text)
    assert said is not None  # the pattern has all texts of one line
    plain, unit = said.groups()
    try:
        found = float(_plain(plain)) * UNITS.get(unit, 1.0)
    except ValueError:
        raise SkippedError(f"{column} is {text!r}, no number; {ANY_NUMBER}") from None
    if not (isfinite(found) and found > 0):
        raise SkippedError(f"{column} is {text}, and must be more than 0; {ANY_NUMBER}")
    return found


UNITS = {"k": 1e3, "K": 1e3, "M": 1e6}
ANY_NUMBER = "a number like 0.5, 1.5e3, 1,310 or 24k is read"


def _plain(text: str) -> str:
    """Without commas between thousands."""
    return text.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text) else text


def flag(row: Mapping[str, str], column: str) -> bool | None:
    """By whole words first, then by what is found in it; the first."""
    said = row[column].lower()
    if said in NOT_SAID:
        return None
    found = (yes for pattern, yes in WORDS.get(column, ()) if re.search(pattern, said))
    known = FLAGS.get(said)
    known = next(found, None) if known is None else known
    if known is None:
        raise SkippedError(
            f"{column} is {row[column]!r}, neither True nor False; {READ[column]} is read"
        )
    return known


FLAGS = dict.fromkeys(("true", "yes", "y", "t", "1", "1.0", "on"), True)
FLAGS |= dict.fromkeys(("false", "no", "n", "f", "0", "0.0", "off"), False)

WORDS: dict[str, tuple[tuple[str, bool], ...]] = {
    "gated_mlp": ((r"glu|gated", True), (r"gelu|relu|plain", False)),
    "flash_attn": (
        (r"unfused|eager|naive|math|without|\bno\b", False),
        (
            r"flash|\bfa-?[234]|^[234](\.0)?$|cudnn|sdpa|splash|fused|xformers|efficient|triton",
            True,
        ),
    ),
    "sequence_parallel": ((r"\bsp\b|sequence", True),),
}
"""Words that mean yes or no in a column, beside those of all."""

READ = {
    "gated_mlp": "True, SwiGLU, False or GELU",
    "flash_attn": "True, FlashAttention, cudnn, False or eager",
    "sequence_parallel": "True or False",
}


def sharded(text: str, data: int) -> tuple[int, int, int] | None:
    """Devices that shard, replicas of these, level of ZeRO; of HSDP those of a host shard, or as
    many as it says.

    >>> sharded("FSDP2 (ZeRO-3)", 64), sharded("HSDP over 128", 256), sharded("ZeRO Stage 1", 8)
    ((64, 1, 3), (128, 2, 3), (8, 1, 1))
    """
    said = text.lower()
    if said in NOT_SAID:
        return None
    if said.startswith(("hsdp", "hybrid")):
        over = re.search(r"(?:over|of|size) ?(\d+)", said)
        shards = int(over[1]) if over and int(over[1]) else 8
        whole = data % shards == 0 and data > shards
        return (shards, data // shards, 3) if whole else (data, 1, 3)
    level = next((level for pattern, level in LEVELS if re.search(pattern, said)), None)
    found = re.search(r"(?:zero|stage|-z|^)[ _-]*(?:stage)?[ _-]*([0-3])(?:\.0)?(?![\d.])", said)
    level = int(found[1]) if found else level
    if level is None:
        raise SkippedError(
            f"zero_fsdp is {text!r}: not known; 0 to 3, ZeRO-1, FSDP, HSDP, DDP or distributed "
            "optimizer is read"
        )
    return data, 1, level


LEVELS = (
    (r"shard_grad_op", 2),
    (r"no_shard|^(false|no|ddp|off)$|^ddp", 0),
    (r"fsdp|fully.?sharded|full_shard", 3),
    (r"dist\w*[ _-]*opt", 1),
)
"""Where no number is in it, by what is found in it, in small letters; the first."""

DTYPES = {"nvfp4": "bfloat16", "mxfp8": "bfloat16", "fp8": "bfloat16", "float8": "bfloat16"}
DTYPES |= {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
DTYPES |= {"half": "float16", "fp32": "float32", "float32": "float32"}
"""Of what is no product, by what comes first in a column ``precision``."""

PRODUCTS = {"fp8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn_x2"}
PRODUCTS["float8"] = "float8_e4m3fn"
"""Of products with the weights of blocks; attention, embedding and head are in the other."""


def dtypes(text: str) -> tuple[str, str | None] | None:
    """Of all, and of products where it is another.

    >>> dtypes("bf16-mixed"), dtypes("FP8-MX"), dtypes("amp_bf16 (MP DEFAULT)")
    (('bfloat16', None), ('bfloat16', 'float8_e4m3fn'), ('bfloat16', None))
    """
    said = text.lower()
    if said in NOT_SAID:
        return None
    found = re.search(rf"(?<![a-z\d])(?:amp_)?({'|'.join(DTYPES)})", said)
    if found is None:
        raise SkippedError(f"precision is {text!r}: not known; {', '.join(DTYPES)} are read")
    return DTYPES[found[1]], PRODUCTS.get(found[1])


ORDERS: tuple[tuple[str, str, str], ...] = (
    # what is found in a column schedule, in small letters, the member of the shelf, what is assumed
    (r"zb.?h1|zb.?1p|zero.?bubble.?h1", "zero_bubble_h1", ""),
    (r"zb|zero.?bubble", "zero_bubble_h1", "the schedule is taken as zero_bubble_h1"),
    (r"gpipe|afab|f.?then.?b", "gpipe", ""),
    (r"chimera", "chimera", ""),
    (r"breadth|bfs", "looped_bfs", ""),
    (r"interleaved|1f1b-?i\b|vpp", "interleaved", ""),
    (r"1f1b|dapple|pipedream.?flush", "1f1b", ""),
)


def order(text: str) -> tuple[str, str]:
    """A member of the shelf of schedules, ``interleaved``, or nothing; and what is assumed.

    >>> order("interleaved 1F1B"), order("ZB-1p"), order("none")
    (('interleaved', ''), ('zero_bubble_h1', ''), ('', ''))
    """
    said = text.lower()
    for pattern, name, assumed in ORDERS:
        if re.search(pattern, said):
            return name, assumed
    if said in NOT_SAID or said.startswith("none"):
        return "", ""
    return "", "the schedule is taken as 1f1b"


def network_bytes_per_s(text: str, per_host: int, usual: float) -> tuple[float, str] | None:
    """Of a device, one way, and what is assumed: of a host (or of each of its cards), of a device,
    or, where it is not told of what, of a device if it is what it usually has (``usual``), else of
    a host. ``None`` where no number is told, or one that is only typical.

    >>> network_bytes_per_s("4x100Gb/s EFA/node", 8, 25e9), network_bytes_per_s("IB", 8, 25e9)
    ((6250000000.0, ''), None)
    >>> network_bytes_per_s("400Gb/s RDMA per GPU", 8, 25e9)[0]
    50000000000.0
    """
    found, said = RATE.search(text), text.lower()
    if found is None or "typical" in said or "unspecified" in said:
        return None
    cards, rate, unit, byte = found.groups()
    bytes_per_s = float(rate) * {"G": 1e9, "T": 1e12}[unit] / (1 if byte == "B" else 8)
    if bytes_per_s <= 0:
        raise SkippedError(f"inter is {text!r}, and must be more than 0 Gb/s")
    if re.search(r"(per|/|each|a)[ -]?(gpu|device|chip|accelerator)", said):
        return bytes_per_s * float(cards or 1), ""
    if cards:
        return bytes_per_s * float(cards) / per_host, ""
    if re.search(r"(per|/|each|a)[ -]?(node|host|server|machine|vm)", said):
        return bytes_per_s / per_host, ""
    if bytes_per_s == usual:
        return bytes_per_s, "inter is taken as that of a device"
    return bytes_per_s / per_host, "inter is taken as that of a host"


RATE = re.compile(r"(?:(\d+) ?[xX] ?)?(\d+(?:\.\d+)?) ?([GT])(B(?=/s|ps)|b(?:it)?s?)")
"""Cards, numbers of them, giga or tera, and bytes or bits."""
