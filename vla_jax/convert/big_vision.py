"""PaliGemma as big_vision saves it: one npz, keys with or without ``params/`` in front, our names and shapes."""

from pathlib import Path

from vla_jax.convert.entry import Entry
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.model import config_from, our_shapes
from vla_jax.convert.sources import NpzSource
from vla_jax.models.config import VLAConfig


def open_weights(path: Path, options: Options) -> Opened:
    """The backbone in an npz file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    source = NpzSource(path)
    ours = {name: f"backbone/{name.removeprefix('params/')}" for name in source.specs}
    specs = {ours[name]: spec for name, spec in source.specs.items()}
    cameras = options.cameras or ("image",)
    model, _ = config_from(specs, where=path, cameras=cameras, horizon=options.chunk())
    entries = table(model, "params/" if any(name.startswith("params/") for name in ours) else "")
    return Opened(where=path, source=source, entries=entries, model=model, expert=False)


def table(model: VLAConfig, prefix: str) -> list[Entry]:
    """The table: the backbone's own names."""
    names = our_shapes(model, expert=False)
    return [Entry(theirs=f"{prefix}{name.removeprefix('backbone/')}", ours=name) for name in names]
