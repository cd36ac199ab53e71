"""Turns other libraries' weights into ours, or ours into theirs, one array at a time.

python -m launch.convert --from big_vision --path pt_224.npz --out runs/paligemma

python -m launch.convert --from openpi --path pi0_base --out runs/pi0 --dtype bfloat16

python -m launch.convert --from openpi --path pi05_droid --out runs/droid --tokenizer paligemma_tokenizer.model \\
    --robot droid

python -m launch.convert --from openpi --path pi0_fast_droid --out runs/fast --tokenizer paligemma_tokenizer.model \\
    --fast fast --horizon 10 --robot droid_fast

python -m launch.convert --from vla_jax --path runs/pi0 --to pi0_hf --out exported

python -m launch.convert --from vla_jax --path runs/lora --to vla_jax --out runs/merged

The last one leaves a run's weights alone: LoRA is merged, optimiser and unaveraged parameters stay behind.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla_jax.cli.command import cli
from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ConvertArgs:
    """What to read, and what to write."""

    source: Annotated[
        Literal["big_vision", "paligemma_hf", "pi0_hf", "openpi", "lerobot", "vla_jax"],
        tyro.conf.arg(name="from"),
    ]
    """Format of the weights that are there."""
    to: Literal["vla_jax", "paligemma_hf", "pi0_hf", "openpi"] = "vla_jax"
    """Format to write; one of the two, or both, is vla_jax."""
    path: Path
    """The weights: a file (big_vision) or a folder; a run's directory or one step of it (vla_jax)."""
    out: Path
    """Folder to write; it must not be there yet."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Type of the arrays; keep leaves each the one it has."""
    weights: Literal["params", "ema"] | None = None
    """Which weights of a run to export; default: the averaged ones where it has them."""
    cameras: tuple[str, ...] = ()
    """Names of the cameras in the order of their tokens, for weights that come in; default: the format's usual ones."""
    horizon: int | None = None
    """Actions of a chunk, for weights that come in and whose files do not say it, as openpi's; default: 50, but a
    π0-FAST policy has none."""
    names: Literal["legacy", "4.5x", "5.x"] | None = None
    """Generation of names that paligemma_hf writes; default: legacy, which every transformers reads."""
    max_file_gb: float | None = None
    """Largest safetensors file in GB, of paligemma_hf and pi0_hf; more than one get an index. Default: 5."""
    lora_scale: float | None = None
    """α / rank of the LoRA in an openpi checkpoint, which is merged; default: 1, as in openpi's own variants."""
    tokenizer: Path | None = None
    """tokenizer.json or a sentencepiece .model: with it, and the statistics beside the weights, what comes in is a
    policy that launch.serve and launch.evaluate load. Without, it is a start for training."""
    statistics: str = ""
    """With --tokenizer: which of several statistics beside the weights."""
    robot: str = ""
    """With --tokenizer: the robot that the policy acts on, droid, droid_joint_position, droid_fast, aloha, aloha_sim,
    libero, libero_relative, libero_fast, or a path to a .json file (docs/robots.md): its own keys, its units, its
    dimensions, relative actions. Without, states and actions are as the statistics have them."""
    state_dims: int | None = None
    """With --tokenizer and without --robot: dims of the robot's state, the first ones of the statistics. Asked for
    where these look padded (as long as the model's, or trailing dims that never move)."""
    action_dims: int | None = None
    """The same of its actions."""
    default_prompt: str = ""
    """With --robot: the instruction of requests that bring none."""
    control_hz: float | None = None
    """With --tokenizer: steps per second of the robot, which no file says; default: the robot's, or 20."""
    state_in_prompt: bool = True
    """With --tokenizer, for a π0.5: whether its prompt holds the state. Not for openpi's pi05_libero
    (discrete_state_input=False), which no file says either."""
    fast: Path | None = None
    """With --tokenizer, for a π0-FAST: the folder of its FAST tokenizer, tokenizer.json and processor_config.json as in
    physical-intelligence/fast. --horizon is needed too where they name none."""
    value: bool = True
    """Whether the leaves written for openpi end in /value, as those it saves itself."""

    def __post_init__(self):
        if self.lora_scale is not None and not math.isfinite(self.lora_scale):
            raise ValueError(f"lora_scale={self.lora_scale}: a finite number is expected")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon={self.horizon}: a chunk needs at least one action")
        if self.max_file_gb is not None and self.max_file_gb <= 0:
            raise ValueError(f"max_file_gb={self.max_file_gb}: must be positive")
        for name in ("state_dims", "action_dims"):
            dims = getattr(self, name)
            if dims is not None and dims < 1:
                raise ValueError(f"{name}={dims}: at least 1")
        self._check_used()
        if self.tokenizer is not None and (self.source == "vla_jax" or self.to != "vla_jax"):
            raise ValueError("a tokenizer is for weights of others that come in; a run has its own")

    def _check_used(self) -> None:
        """What is given and does nothing is hardly meant."""
        comes_in, policy = self.source != "vla_jax", self.tokenizer is not None
        options = [  # name, whether it is given, whether it does something, what it is for
            ("cameras", self.cameras, comes_in, "weights of others that come in; a run names its own"),
            ("horizon", self.horizon, comes_in, "weights of others that come in; a run has its own"),
            (
                "weights",
                self.weights,
                not comes_in,
                "a run, --from vla_jax; the weights of others are one set",
            ),
            ("names", self.names, self.to == "paligemma_hf", "--to paligemma_hf"),
            (
                "max-file-gb",
                self.max_file_gb,
                self.to in ("paligemma_hf", "pi0_hf"),
                "--to paligemma_hf or pi0_hf",
            ),
            ("lora-scale", self.lora_scale, self.source == "openpi", "--from openpi"),
            ("no-value", not self.value, self.to == "openpi", "--to openpi"),
            ("statistics", self.statistics, policy, "a policy; give its --tokenizer too"),
            (
                "state-dims",
                self.state_dims,
                policy and not self.robot,
                "a policy of a robot without a description; give its --tokenizer, and no --robot",
            ),
            (
                "action-dims",
                self.action_dims,
                policy and not self.robot,
                "a policy of a robot without a description; give its --tokenizer, and no --robot",
            ),
            ("robot", self.robot, policy, "a policy; give its --tokenizer too"),
            (
                "default-prompt",
                self.default_prompt,
                bool(self.robot),
                "a described robot; give its --robot too",
            ),
            ("fast", self.fast, policy, "a policy; give its --tokenizer too"),
            ("control-hz", self.control_hz, policy, "a policy; give its --tokenizer too"),
            ("no-state-in-prompt", not self.state_in_prompt, policy, "a policy; give its --tokenizer too"),
        ]
        for name, given, used, purpose in options:
            if given and not used:
                raise ValueError(f"--{name} would do nothing here: it is for {purpose}")


def main() -> None:
    """Parses the command line and converts."""
    args = cli(ConvertArgs, description=__doc__)

    from vla_jax.convert import Options, PolicyOptions, convert  # after parsing: --help need not wait for JAX

    policy = None
    if args.tokenizer is not None:
        policy = PolicyOptions(
            tokenizer=args.tokenizer,
            statistics=args.statistics,
            control_hz=args.control_hz,
            robot=args.robot,
            state_dims=args.state_dims,
            action_dims=args.action_dims,
            default_prompt=args.default_prompt,
            state_in_prompt=args.state_in_prompt,
            fast=args.fast,
        )
    options = Options(
        cameras=args.cameras,
        horizon=args.horizon,
        names=args.names or "legacy",
        max_file_bytes=int((args.max_file_gb or 5.0) * 1e9),
        value=args.value,
        lora_scale=args.lora_scale,
        policy=policy,
    )
    report = convert(
        args.path,
        args.out,
        source=args.source,
        target=args.to,
        dtype=args.dtype,
        weights=args.weights,
        options=options,
    )
    for name in report.left_out:
        print(f"left out: {name} (unused, or a copy of a tied weight)")
    if report.without_expert:
        print(
            f"left out: the action expert, {report.without_expert} arrays; {args.to} holds the backbone alone"
        )
    if report.merged:
        scale = 1.0 if args.lora_scale is None else args.lora_scale
        print(f"merged: LoRA of {report.merged} matrices, with alpha / rank = {scale:g}, into float32")
    if report.lost:
        print(
            f"not written: the statistics {', '.join(report.lost)}, for which {args.to} has no place; openpi has"
        )
    if report.silenced:
        print(
            f"written as zeros: {report.silenced} action dims of the model that the run's robot does not have"
        )
    print(f"{args.out}: {report.parameters:,} parameters in {report.arrays} arrays")
