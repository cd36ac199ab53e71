"""Which data to train on, and how it becomes a batch."""

import dataclasses
from typing import Literal

from vla_jax.data.fast.config import FastConfig
from vla_jax.data.prompt_forms import Prompt, PromptForm
from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("data.")
class DataConfig:
    """One RLDS data set, its split, its text and image sizes, its normalisation, its loader."""

    path: str = ""
    """Directory of the data set (as launch.collect writes it)."""
    robot: str = ""
    """What the data's robot is to the model: droid, aloha, libero, … or a path to a .json file with its units, relative
    actions, and which camera is which (docs/robots.md). Empty: states, actions and cameras as they are recorded."""
    val_share: float = 0.05
    """Share of the episodes held out for validation; the choice depends on nothing but the data set."""
    val_episodes: int | None = None
    """Number of episodes held out for validation; overrides val_share."""
    max_text_tokens: int = 48
    """Tokens of prompt, separator, target and end together; a longer text is refused, never cut."""
    max_target_tokens: int = 24
    """Tokens of a target with its end: logits are computed for so many positions. A longer one is refused."""
    vocab_size: int = 1024
    """Tokens of the tokenizer that is trained from the data set's texts (and of the model's embedding)."""
    tokenizer: str = ""
    """A tokenizer to use instead: a directory with tokenizer.json, or a sentencepiece .model of Gemma's kind."""
    prompt: PromptForm = "paligemma"
    """What the model reads: the instruction and a line feed (paligemma; pi0 also turns underscores into spaces), or
    openpi's forms with the state as numbers 0 … 255 (pi05, fast)."""
    prompt_clip_state: bool = True
    """prompt pi05, fast: normalised states below -1 count as -1; False writes them as "-1", as openpi does."""
    prompt_state_dim: int = 0
    """prompt pi05, fast: a shorter state is filled up with zeros to so many numbers, as LeRobot's π0.5 does. 0: as many
    as the robot has."""
    ignore_state: bool = False
    """For a model without a state token, with a prompt that leaves the state out too: nothing then tells the policy
    where its joints are, and it is refused unless this says that it is meant."""
    action_tokens: bool = False
    """Whether batches hold each chunk also as FAST tokens, which the decoder learns as text beside the plan while
    the expert learns the actions (arXiv:2505.23705). model.expert.kind=tokens has them anyway."""
    fast: FastConfig = FastConfig()
    cameras: tuple[str, ...] = ()
    """Cameras the model sees, in this order; empty: model.cameras, or all of the data set. It means the same as
    model.cameras (which weights bring along): where both are given they must agree."""
    image_size: int = 64
    """Images reach the model as squares of this many pixels (resized with padding where they differ)."""
    normalization: Literal["zscore", "quantile"] = "zscore"
    """State and actions to mean 0 and deviation 1, or the 1 % and 99 % quantiles to -1 and 1. What hardly changes (by
    less than 1/65536 of its magnitude, or than 1/32 of its range) is divided by that much instead, and named."""
    normalization_group: Literal["dataset", "task"] = "dataset"
    """Statistics of the whole data set, or of each task: a task of small motions then weighs as much."""
    task_weights: tuple[str, ...] = ()
    """Shares of the samples per task as "task:weight", e.g. reach:2 push:1; every task once, 0 leaves one
    out. Empty: every frame of the data set is as likely."""
    after_end: Literal["mask", "repeat"] = "mask"
    """Steps of a chunk that lie behind the episode's end: mask leaves them out of attention and loss; repeat
    takes the episode's last action as valid, so that what follows can be learned where episodes end with success.
    A mask tells the network when the episode ends, which nobody can tell it when it acts: where the last actions
    matter (a gripper that closes), a policy trained so waits for a sign that never comes."""
    seed: int | None = None
    """Seed of the order of the samples; None: the run's own. Models of several seeds can so see the same data."""
    workers: int = 0
    """Processes that build batches; 0: threads of the training process."""
    threads: int = 2
    """Threads that build batches in each of these processes."""
    prefetch: int = 4
    """Batches kept ready."""
    cache_mb: int = 1024
    """Megabytes of still encoded episodes each process keeps in memory; others are read again."""

    def __post_init__(self):
        if not 0 <= self.val_share < 1:
            raise ValueError(f"data.val_share={self.val_share}: must be in [0, 1)")
        if self.val_episodes is not None and self.val_episodes < 0:
            raise ValueError(f"data.val_episodes={self.val_episodes}: must not be negative")
        at_least = {
            "max_text_tokens": 4,
            "max_target_tokens": 1,
            "image_size": 1,
            "threads": 1,
            "prefetch": 1,
            "cache_mb": 1,
        }
        for name, least in {**at_least, "workers": 0, "vocab_size": 300}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        form = self.prompt_form  # refuses an unknown one
        if self.prompt_state_dim < 0 or (self.prompt_state_dim and not form.uses_state):
            raise ValueError(
                f"data.prompt_state_dim={self.prompt_state_dim} with data.prompt={self.prompt}: at least 0, and above "
                "it only where the prompt holds the state (pi05, fast)"
            )
        if self.after_end not in ("mask", "repeat"):
            raise ValueError(f"data.after_end={self.after_end!r}: use mask or repeat")
        if self.normalization not in ("zscore", "quantile"):
            raise ValueError(f"data.normalization={self.normalization!r}: use zscore or quantile")
        if self.normalization_group not in ("dataset", "task"):
            raise ValueError(f"data.normalization_group={self.normalization_group!r}: use dataset or task")
        if self.robot and self.cameras:
            raise ValueError(
                f"data.cameras with data.robot={self.robot}: the robot's description says which cameras the model "
                "sees; leave data.cameras out"
            )
        if len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"data.cameras={self.cameras}: a camera is named twice")
        self.weights()

    @property
    def prompt_form(self) -> Prompt:
        """The form of prompts that the options choose, with its treatment of the state."""
        return Prompt(self.prompt, self.prompt_clip_state, self.prompt_state_dim)

    def weights(self) -> dict[str, float]:
        """`task_weights` as task → weight."""
        weights: dict[str, float] = {}
        for entry in self.task_weights:
            task, _, number = entry.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = -1.0
            if not task or not 0 <= weight < float("inf"):
                raise ValueError(f"data.task_weights: {entry!r} is not task:weight, e.g. reach-v3:2")
            if task in weights:
                raise ValueError(f"data.task_weights: task {task!r} is named twice")
            weights[task] = weight
        if weights and not any(weights.values()):
            raise ValueError("data.task_weights: all weights are 0; give one task more")
        return weights
