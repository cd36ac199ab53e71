"""What is rewritten when a policy is compiled, and for which shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrites:
    """What is done once in place of often, or not at all: each gives the same actions up to rounding, and can be
    switched off alone."""

    time: bool = True
    """What depends on time alone (π0's biases, π0.5's adaRMS modulations) is computed once for the solver's times."""
    state: bool = True
    """What all evaluations of a chunk have in common (π0's state token) is computed once per call."""
    unstack: bool = True
    """Parameters of each layer are arrays of their own, not slices of a stack, which a CPU copies at every use; what
    nobody reads of the last prefix layer is then left out."""
    cameras: bool = True
    """Absent cameras are left out of the program where they would be black, masked images."""
    prompt: bool = True
    """Prompts are padded to a bucket and not to the longest text of training."""
    reuse: bool = True
    """One robot that asks again about unchanged images and prompt gets by with the solver alone."""

    @classmethod
    def none(cls, **on: bool) -> "Rewrites":
        """All off but those named."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)} | on)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the rewrites that can be switched on and off."""
        return tuple(field.name for field in dataclasses.fields(cls))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How a policy is compiled."""

    rewrites: Rewrites = Rewrites()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the blocks' matrices and of activations; None: the model's. Norms, softmax, the last projection stay
    float32."""
    weights: Literal["same", "int8"] = "same"
    """int8: matrices of the towers as 8-bit integers with a float32 scale per output channel; not exact."""
    buckets: tuple[int, ...] = (1, 8, 32)
    """Batch sizes; a call is padded to the next one, more robots are cut into several calls."""
    prompts: tuple[int, ...] = ()
    """Text lengths, in tokens; empty: 16, 32, 64, … and the longest of training."""
    resize: Literal["device", "host"] = "device"
    """Where images are scaled to the model's size, to the same bits. device: by a program for each size that comes;
    host: before the program, one for images of all sizes."""

    def __post_init__(self):
        for name in ("buckets", "prompts"):
            sizes = getattr(self, name)
            if (name == "buckets" and not sizes) or any(size < 1 for size in sizes):
                raise ValueError(f"{name}={sizes}: give at least one, and none below 1")
        if self.weights not in ("same", "int8"):
            raise ValueError(f"weights={self.weights!r}: use same or int8")
        if self.resize not in ("device", "host"):
            raise ValueError(f"resize={self.resize!r}: use device or host")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: use float32 or bfloat16")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CompileConfig":
        """Of `dataclasses.asdict`, also after a way through JSON.

        Rewrites that there are no more (older recordings name them) changed no action but for rounding.
        """
        sizes = {name: tuple(values[name]) for name in ("buckets", "prompts")}
        known = {name: on for name, on in values["rewrites"].items() if name in Rewrites.names()}
        return cls(**{**values, **sizes, "rewrites": Rewrites(**known)})

    def prompt_lengths(self, longest: int) -> tuple[int, ...]:
        """The text lengths that are compiled, up to the longest of training. Raises ValueError."""
        if max(self.prompts, default=0) > longest:
            raise ValueError(
                f"prompts={self.prompts}: no text of this policy has more than {longest} tokens "
                f"(data.max_text_tokens); leave out {max(self.prompts)}"
            )
        if not self.rewrites.prompt:
            return (longest,)
        chosen = self.prompts or tuple(16 * 2**i for i in range(16))
        return tuple(sorted({length for length in chosen if length < longest} | {longest}))


def batch_bucket(buckets: tuple[int, ...], rows: int) -> int:
    """The smallest batch size that holds so many rows. Raises ValueError."""
    fitting = [size for size in buckets if size >= rows]
    if not fitting:
        raise ValueError(f"{rows} rows are more than the largest bucket, {max(buckets)}")
    return min(fitting)


def replace_rewrites(config: CompileConfig, changes: Mapping[str, bool]) -> CompileConfig:
    """The same with some rewrites on or off."""
    return dataclasses.replace(config, rewrites=dataclasses.replace(config.rewrites, **changes))
