"""A trained run's statistics go along to openpi's format, and its formulas then compute what the run did."""

import dataclasses
import json

import numpy as np
import pytest

from tests.convert import layouts
from tests.data import toy
from vla_jax.checkpoint import Checkpoints, load, read_meta
from vla_jax.cli import convert as launcher
from vla_jax.config import from_json, to_json
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.convert.policy_data import policy_data
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.sample import Sample

SIZES = dataclasses.replace(layouts.TINY, vocab=300, actions=8, states=8)


def episode(seed):
    """Of the toy robot, whose x and whose dy never change."""
    made = toy.make_episode(seed, length=40)
    made.state[:, 0], made.action[:, 1] = 0.25, 5.0
    return made


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Weights of π0 and π0.5 without statistics, and a data set."""
    folder = tmp_path_factory.mktemp("theirs")
    for kind in ("pi0", "pi05"):
        layouts.save_small_openpi(folder / kind, SIZES, kind)
        convert(folder / kind, folder / f"ours_{kind}", source="openpi", target="vla_jax")
    toy.write(folder / "toy", [episode(seed) for seed in range(6)])
    return folder


def trained(theirs, kind, out, **data):
    """A run of that model on the data, as training saves it; and its transforms."""
    config = DataConfig(path=str(theirs / "toy"), image_size=8, vocab_size=300, max_text_tokens=64, **data)
    bundle = prepare(config, state_dim=8, action_dim=8)
    record = {"config": read_meta(theirs / f"ours_{kind}")["config"], "data": bundle.to_json()}
    checkpoints = Checkpoints(out, keep=1)
    checkpoints.save(1, {"params": load(theirs / f"ours_{kind}", "params")}, record)
    checkpoints.close()
    return bundle


def openpi_normalised(kind, x, s):
    s = {name: np.asarray(values) for name, values in s.items()}
    if kind == "pi0":
        return (x - s["mean"]) / (s["std"] + 1e-6)
    return (x - s["q01"]) / (s["q99"] - s["q01"] + 1e-6) * 2 - 1


def openpi_back(kind, x, s):
    s = {name: np.asarray(values) for name, values in s.items()}
    if kind == "pi0":
        return x * (s["std"] + 1e-6) + s["mean"]
    return (x + 1) / 2 * (s["q99"] - s["q01"] + 1e-6) + s["q01"]


@pytest.mark.parametrize(
    ("kind", "normalization", "group"),
    [
        ("pi0", "zscore", "dataset"),
        ("pi05", "quantile", "dataset"),
        ("pi0", "quantile", "dataset"),  # not the method that openpi fixes
        ("pi05", "zscore", "task"),
        ("pi05", "quantile", "task"),
    ],
)
def test_there_and_back(theirs, tmp_path, kind, normalization, group):
    bundle = trained(theirs, kind, tmp_path / "run", normalization=normalization, normalization_group=group)
    report = convert(tmp_path / "run", tmp_path / "out", source="vla_jax", target="openpi")
    assert report.lost == ()
    names = ["toy"] if group == "dataset" else ["push", "reach"]
    files = sorted((tmp_path / "out/assets").rglob("*.json"))
    assert [file.parent.relative_to(tmp_path / "out/assets").as_posix() for file in files] == names
    rng = np.random.default_rng(0)
    tokenizer = bundle.tokenizer.save(tmp_path / "tokenizer") or tmp_path / "tokenizer"
    convert(
        tmp_path / "out", tmp_path / "again", source="openpi", target="vla_jax", options=Options(horizon=4)
    )
    back = read_meta(tmp_path / "again")
    model = from_json(json.dumps(back["config"])).model
    for name in names:
        written = json.loads((tmp_path / "out/assets" / name / "norm_stats.json").read_text())["norm_stats"]
        assert back["assets"]["norm_stats"][name] == written
        found = bundle.normalize.statistics["" if group == "dataset" else name]
        own = normalization == ("zscore" if kind == "pi0" else "quantile")
        for field, statistics, moving in (("state", found.state, [1]), ("actions", found.action, [0, 2])):
            for of in ("mean", "std", "q01", "q99") if own else ("q01",) if kind == "pi0" else ("mean",):
                same = np.asarray(written[field][of])[moving] == np.asarray(getattr(statistics, of))[moving]
                assert same.all(), (field, of)
        state = np.concatenate([np.full((5, 1), 0.25), rng.normal(size=(5, 1))], axis=1).astype(np.float32)
        chunks = rng.normal(size=(5, 4, 3)).astype(np.float32)
        _, again = policy_data(model, back["assets"], PolicyOptions(tokenizer=tokenizer, statistics=name))
        for row, chunk in zip(state, chunks):
            sample = Sample(images={}, state=row, instruction=f"{name} the block", actions=chunk, task=name)
            ours, ours_back = bundle.normalize.inputs(sample).state, bundle.normalize.outputs(sample).actions
            near = {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(openpi_normalised(kind, row, written["state"]), ours, **near)
            np.testing.assert_allclose(openpi_back(kind, chunk, written["actions"]), ours_back, **near)
            np.testing.assert_allclose(again.normalize.inputs(sample).state, ours, **near)
            np.testing.assert_allclose(again.normalize.outputs(sample).actions, ours_back, **near)


def test_formats_without_a_place_for_them_say_so(theirs, tmp_path, monkeypatch, capsys):
    trained(theirs, "pi0", tmp_path / "run")
    argv = [
        "--from",
        "vla_jax",
        "--path",
        str(tmp_path / "run"),
        "--to",
        "pi0_hf",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", ["convert", *argv])
    launcher.main()
    assert (
        "not written: the statistics toy, for which pi0_hf has no place; openpi has"
        in capsys.readouterr().out
    )


def test_a_task_whose_name_is_no_folder_s(theirs, tmp_path):
    bundle = trained(theirs, "pi0", tmp_path / "run", normalization_group="task")
    normalize = bundle.normalize
    moved = dataclasses.replace(
        normalize, statistics={f"../{name}": s for name, s in normalize.statistics.items()}, task_of={}
    )
    bundle = dataclasses.replace(
        bundle, transforms=tuple(moved if t is normalize else t for t in bundle.transforms)
    )
    checkpoints = Checkpoints(tmp_path / "odd", keep=1)
    config = json.loads(to_json(from_json(json.dumps(read_meta(tmp_path / "run")["config"]))))
    checkpoints.save(
        1, {"params": load(tmp_path / "run", "params")}, {"config": config, "data": bundle.to_json()}
    )
    checkpoints.close()
    with pytest.raises(ValueError, match=r"'\.\./push' go into a folder of that name"):
        convert(tmp_path / "odd", tmp_path / "out", source="vla_jax", target="openpi")
    assert not (tmp_path / "out").exists()
