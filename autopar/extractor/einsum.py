"""Sums of products of several tensors, said in products of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """``equation`` of two operands, numbers ``left`` and ``right`` of a list that they leave; the
    result goes to its end."""

    equation: str
    left: int
    right: int


def in_letters(equation: str, ranks: Sequence[int]) -> str:
    """The equation with its result, and letters for the dims that an ellipsis stands for.

    >>> in_letters("...ij, jk", [4, 2])
    'abij,jk->abik'
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    free = [c for c in ascii_letters if c not in left]
    extra = [
        rank - len(text.replace("...", "")) if "..." in text else 0
        for text, rank in zip(operands, ranks, strict=True)
    ]
    dims = "".join(free[: max(extra)])
    if not arrow:
        once = sorted(c for c in left if c.isalpha() and left.count(c) == 1)
        right = "..." + "".join(once)
    written = [
        text.replace("...", dims[len(dims) - count :])
        for text, count in zip(operands, extra, strict=True)
    ]
    return ",".join(written) + "->" + right.replace("...", dims)


def products(equation: str, path: Sequence[int] = ()) -> list[Product]:
    """An equation in letters as products of two, in the order of ``path`` (pairs of numbers of what
    is left, as torch takes it), or else from the left.

    >>> products("ab,bc,cd->ad")
    [Product(equation='ab,bc->ac', left=0, right=1), Product(equation='cd,ac->ad', left=0, right=1)]
    """
    left, _, result = equation.partition("->")
    operands = left.split(",")
    pairs = list(zip(path[::2], path[1::2], strict=True)) or [(0, 1)] + [
        (0, len(operands) - 2 - done) for done in range(len(operands) - 2)
    ]
    found = []
    for first, second in pairs:
        a, b = operands[first], operands[second]
        rest = [text for i, text in enumerate(operands) if i not in (first, second)]
        wanted = set("".join(rest)) | set(result)
        made = result if not rest else "".join(c for c in dict.fromkeys(a + b) if c in wanted)
        found.append(Product(f"{a},{b}->{made}", first, second))
        operands = [*rest, made]
    return found
