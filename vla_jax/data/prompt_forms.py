"""How an instruction (and a state) becomes the prompt of a model family.

| form        | text, after the begin token                                    |
|-------------|----------------------------------------------------------------|
| `paligemma` | the instruction, then a line feed that is tokenised by itself  |
| `pi0`       | the same; underscores become spaces                            |
| `pi05`      | `Task: …, State: 127 3 … 255;` line feed `Action: `            |
| `fast`      | `Task: …, State: …;` line feed, the task in lower case; action tokens follow "Action: " |

The last three are openpi's (π0, π0.5, π0-FAST). The state is the normalised one, before it is padded, each dimension
in 256 equal bins of [-1, 1].
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

PromptForm = Literal["paligemma", "pi0", "pi05", "fast"]
FORMS: tuple[PromptForm, ...] = ("paligemma", "pi0", "pi05", "fast")
SEPARATOR = "\n"
_EDGES = np.linspace(-1, 1, 257)[:-1]


def discretize(state: Float[np.ndarray, " q"], clip: bool = True) -> Int[np.ndarray, " q"]:
    """The bin 0 … 255 of each dimension. Without `clip` values below -1 give -1, as in openpi."""
    bins = np.digitize(state, _EDGES) - 1
    return np.maximum(bins, 0) if clip else bins


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One form, ready to be filled in."""

    form: PromptForm = "paligemma"
    clip_state: bool = True
    """Whether values below -1 fall into bin 0, instead of being written as -1."""
    state_dim: int = 0
    """Numbers of the state in the text: zeros fill up a shorter one, as in LeRobot's π0.5. 0: as many as it has."""

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"data.prompt={self.form!r}: use one of {', '.join(FORMS)}")

    @property
    def uses_state(self) -> bool:
        """Whether the state is part of the text."""
        return self.form in ("pi05", "fast")

    def pieces(self, instruction: str, state: Float[np.ndarray, " q"]) -> tuple[str, ...]:
        """The prompt's pieces, to be tokenised one by one and put together."""
        text = instruction.strip().replace(SEPARATOR, " ")
        if self.form == "paligemma":
            return text, SEPARATOR
        text = text.replace("_", " ")
        if self.form == "pi0":
            return text, SEPARATOR
        if 0 < self.state_dim < len(state):
            raise ValueError(f"data.prompt_state_dim={self.state_dim}: the state has {len(state)} dimensions")
        state = np.pad(state, (0, max(0, self.state_dim - len(state))))
        bins = " ".join(map(str, discretize(state, self.clip_state)))
        if self.form == "pi05":
            return (f"Task: {text}, State: {bins};\nAction: ",)
        return (f"Task: {text.lower()}, State: {bins};\n",)

    def training_texts(self, texts: list[str], state_dim: int) -> list[str]:
        """What a tokenizer should be trained on: the texts, and the form's own words and digits."""
        if not self.uses_state:
            return texts
        digits = ["".join(map(str, range(10)))]
        filled = [piece for text in texts for piece in self.pieces(text, np.zeros(state_dim))]
        return sorted({*texts, *filled, *digits, "Action: ", "|"})
