"""Parameters chosen by glob patterns of their paths: ``backbone/img/**``, ``**/attn/*/w``, ``expert/*_proj/kernel``.

`*` is anything within one part of a path, `**` any parts at all.
"""

import difflib
import re
from collections.abc import Collection, Sequence

from jax.tree_util import tree_leaves_with_path

from vla_jax.sharding.rules import is_box, path_name
from vla_jax.types import PyTree


def leaf_names(tree: PyTree) -> list[str]:
    """Paths of all leaves, boxed or not."""
    return [path_name(path) for path, _ in tree_leaves_with_path(tree, is_leaf=is_box)]


def fits(name: str, pattern: str) -> bool:
    """Whether the pattern describes the whole path."""
    return _compiled(pattern).fullmatch(name) is not None


def choose(names: Collection[str], patterns: Sequence[str], where: str) -> frozenset[str]:
    """The paths that any pattern describes. Raises ValueError where a pattern describes none; `where` is the option."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fits(name, pattern)}
        if not found:
            raise ValueError(f"{where}: no parameter is called '{pattern}'{_hint(names, pattern)}")
        chosen |= found
    return frozenset(chosen)


def _hint(names: Collection[str], pattern: str) -> str:
    inside = f"{pattern.rstrip('/')}/**"
    if any(fits(name, inside) for name in names):
        return f"; for all below it write '{inside}'"
    parts = [name.split("/") for name in names]
    known = {"/".join(p[:i]) for p in parts for i in range(1, len(p) + 1)}
    near = difflib.get_close_matches(pattern.strip("/*"), sorted(known), n=1, cutoff=0)
    return f"; the nearest is '{near[0]}'" if near else ""


def _compiled(pattern: str) -> re.Pattern[str]:
    translated = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*")
    return re.compile(translated.replace(r"\*", "[^/]*"))
