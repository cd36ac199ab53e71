"""Parameters in two parts, those that are trained and those that are frozen: one tree of names, no leaf in both."""

from collections.abc import Callable, Mapping
from typing import Any


def split(tree: dict[str, Any], inside: Callable[[str], bool], above: str = "") -> tuple[dict, dict]:
    """The leaves whose path is `inside`, and the others; folders that are empty are left out."""
    chosen: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        if not isinstance(value, dict):
            (chosen if inside(path) else others)[name] = value
            continue
        parts = split(value, inside, f"{path}/")
        for part, into in zip(parts, (chosen, others)):
            if part:
                into[name] = part
    return chosen, others


def join(first: dict[str, Any], second: dict[str, Any] | None) -> dict[str, Any]:
    """One tree of two that share no leaf; the second may be None."""
    if second is None:
        return first
    joined = dict(first)
    for name, value in second.items():
        if name not in joined:
            joined[name] = value
        elif isinstance(value, dict) and isinstance(joined[name], dict):
            joined[name] = join(joined[name], value)
        else:
            raise ValueError(f"'{name}' is in both parts of the parameters")
    return joined


def flatten(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by path: {"a": {"b": x}} → {"a/b": x}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
