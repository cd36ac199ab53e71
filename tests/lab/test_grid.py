"""A sweep's cells, the programs that train them, and what is refused."""

import dataclasses

import pytest

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.lab.grid import make_cells, parse_grid
from vla_jax.lab.plan import Group, plan, split

BASE = TrainConfig(seed=4, data=DataConfig(path="x"))


def test_cells_are_all_combinations_and_whole_configurations():
    grid = ["objective.action_weight=0,0.1,10", "objective.insulation=0,1"]
    cells = make_cells(BASE, grid, seeds=2)
    assert len(cells) == len({cell.name for cell in cells}) == 10  # λ = 0 needs no second κ
    cell = next(c for c in cells if c.name == "action_weight=0.1,insulation=0,seed=5")
    want = dataclasses.replace(
        BASE,
        seed=5,
        data=DataConfig(path="x", seed=4),  # the same data in the same order, whatever the seed
        objective=dataclasses.replace(BASE.objective, action_weight=0.1, insulation=0.0),
    )
    assert cell.config == want
    assert cell.values == {"objective.action_weight": 0.1, "objective.insulation": 0.0, "seed": 5}


def test_names_are_as_short_as_they_can_be():
    cells = make_cells(BASE, ["train.steps=5,6"], seeds=1)
    assert [c.name for c in cells] == ["steps=5,seed=4", "steps=6,seed=4"]
    cells = make_cells(BASE, ["model.backbone.text.width=32", "model.expert.width=16"], seeds=1)
    assert cells[0].name == "text.width=32,expert.width=16,seed=4"


def test_kinds_have_fields_of_their_own():
    """A kind is a value like any other; a field that the chosen kind lacks is one line."""
    tokens = ["model.expert.kind=tokens", "data.prompt=fast", "data.normalization=quantile"]
    (cell,) = make_cells(BASE, [*tokens, "model.expert.horizon=7"], seeds=1)
    assert cell.config.kind == "tokens" and cell.config.model.expert.horizon == 7
    with pytest.raises(ValueError, match=r"^TokensConfig has no field width, which the grid wants to vary$"):
        make_cells(BASE, [*tokens, "model.expert.width=16"], seeds=1)


def test_a_combination_is_checked_as_a_whole():
    """κ = 0 is refused for mgda, but where the grid changes both at once only the result counts."""
    base = dataclasses.replace(BASE, objective=dataclasses.replace(BASE.objective, insulation=0.0))
    grid = ["objective.weighting.policy=mgda", "objective.insulation=1"]
    assert make_cells(base, grid, seeds=1)[0].config.objective.weighting.policy == "mgda"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            ["objective.action_wait=1"],
            r"there is no field objective.action_wait; did you mean objective.action_weight\?",
        ),
        (["action_weight=1"], r"no field action_weight; did you mean objective.action_weight\?"),
        (["objective.action_weight"], "write FIELD=VALUE,VALUE"),
        (["objective.action_weight=1,-2"], r"^objective.action_weight=-2.0 is negative; λ is at least 0$"),
        (["objective.action_weight=1,one"], "'one' is not of type float"),
        (["objective.action_weight=1,1.0"], "1 is there twice"),
        (["objective.insulation=2"], r"objective.insulation=2.0 lies outside \[0, 1\]"),
        (["train.steps=5", "train.steps=6"], "names train.steps twice"),
        (["objective.weighting.policy=mgba"], "'mgba' is not one of fixed, step"),
        (["objective.weighting.policy=mgda", "objective.insulation=0,1"], "policy=mgda compares gradients"),
        (["objective.text=yes"], "'yes' is neither True nor False"),
        (["model.cameras=a,b"], "fields that hold several values cannot be varied"),
        (["seed=1,2"], "use --seeds N"),
    ],
)
def test_what_is_refused_is_one_line(grid, message):
    with pytest.raises(ValueError, match=message) as error:
        make_cells(BASE, grid, seeds=1)
    assert "\n" not in str(error.value)


def test_values_have_the_fields_types():
    axes = parse_grid(["train.ema_decay=None,0.9", "objective.text=True", "train.steps=7"])
    assert axes == {"train.ema_decay": [None, 0.9], "objective.text": [True], "train.steps": [7]}


def test_programs_differ_in_what_cannot_be_traced_and_in_whether_there_are_actions():
    grid = ["objective.action_weight=0,1,5", "objective.insulation=0.5,1", "optim.learning_rate=0.01,0.02"]
    programs = plan(make_cells(BASE, grid, seeds=2))
    assert [len(p.cells) for p in programs] == [4, 16]
    assert all(c.config.objective.action_weight == 0 for c in programs[0].cells)
    knobs = programs[1].knobs(copies=1)
    assert knobs.seed.tolist() == [4, 5] * 8 + [5]
    assert set(knobs.learning_rate.tolist()) == {1, 2} and set(knobs.insulation.tolist()) == {0.5, 1}
    programs = plan(
        make_cells(BASE, ["objective.weighting.policy=fixed,gradnorm", "train.steps=5,6"], seeds=3)
    )
    assert [len(p.cells) for p in programs] == [3] * 4


def test_parts_of_a_program_are_as_equal_as_they_can_be():
    group = plan(make_cells(BASE, [], seeds=10))[0]
    assert [len(part.cells) for part in split(group, 4)] == [4, 3, 3]
    assert split(group, 10)[0].id == group.id != Group(group.cells[:9]).id
    with pytest.raises(ValueError, match="--group 0"):
        split(group, 0)
