"""FLOPs of the products in a compiled program, from the compiler's own text: an independent count."""

import math
import re

SHAPE = r"[a-z0-9]+\[([\d,]*)\]"
DEFINED = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = {SHAPE}", re.M)
DOT = re.compile(rf"= {SHAPE}\S* dot\((?:{SHAPE}\S* )?%?([\w.\-]+),.*lhs_contracting_dims=\{{([\d,]*)\}}")


def sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def products(text: str) -> int:
    """2 FLOPs per multiply-add of every dot; refuses those in loops, whose length the text does not say."""
    assert " convolution(" not in text
    looped = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    total = 0
    for computation in re.split(r"^\}", text, flags=re.M):
        shapes = {name: sizes(shape) for name, shape in DEFINED.findall(computation)}
        name = re.search(r"^(?:ENTRY )?%?([\w.\-]+) \(", computation.lstrip(), re.M)
        for result, shown, operand, contracted in DOT.findall(computation):
            assert name is not None and name[1] not in looped
            left = sizes(shown) if shown else shapes[operand]
            total += 2 * math.prod(sizes(result)) * math.prod(left[i] for i in sizes(contracted))
    return total
