"""A data set is data: whatever its files say, opening it runs and imports nothing that it brought along."""

import json
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest

from tests.data import toy
from vla_jax.cli import train
from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.source import EpisodeSource
from vla_jax.data.tokenizer import Tokenizer
from vla_jax.sharding import distributed

IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
MODULE = "data.evil.payload"


@pytest.fixture
def evil(dataset, tmp_path, monkeypatch):
    """A whole data set in ./data/evil beside a module that leaves a trace when it is imported."""
    folder = tmp_path / "data/evil"
    shutil.copytree(dataset, folder)
    trace = tmp_path / "executed"
    (folder / "payload.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    yield folder, trace
    for name in [name for name in sys.modules if name == "data" or name.startswith("data.")]:
        del sys.modules[name]


def features(folder):
    return json.loads((folder / "features.json").read_text())


def camera(root):
    """The feature of the first camera, in a whole features.json."""
    steps = root["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    observation = steps["featuresDict"]["features"]["observation"]
    return observation["featuresDict"]["features"]["top"]


def named(root):
    camera(root)["pythonClassName"] = f"{MODULE}.Image"


def other_spelling(root):
    """Protobuf's JSON takes both spellings of a field; the later one counts."""
    top = camera(root)
    del top["pythonClassName"]
    top["python_class_name"] = f"{MODULE}.Image"


def in_a_string(root):
    """TFDS's JSON content: features in a string, which it imports as it does the others."""
    inner = {"evil": {"type": f"{MODULE}.Image", "content": {}}}
    root.clear()
    root |= {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps(inner)},
    }


def legacy(root):
    """The form of TFDS before protobuf."""
    root.clear()
    root |= {"type": f"{MODULE}.Image", "content": {}}


def root_class(root):
    root["pythonClassName"] = f"{MODULE}.FeaturesDict"


def in_a_sequence(root):
    steps = root["featuresDict"]["features"]["steps"]
    steps["sequence"]["feature"]["pythonClassName"] = f"{MODULE}.FeaturesDict"


HOSTILE = (named, other_spelling, in_a_string, legacy, root_class, in_a_sequence)


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_features_of_other_modules_are_not_imported(evil, change):
    folder, trace = evil
    root = features(folder)
    change(root)
    (folder / "features.json").write_text(json.dumps(root))
    with pytest.raises(ValueError) as caught:
        EpisodeSource(folder)
    assert not trace.exists() and MODULE not in sys.modules
    assert "features.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_dry_run_of_training_says_which_class(evil, monkeypatch):
    folder, trace = evil
    root = features(folder)
    named(root)
    (folder / "features.json").write_text(json.dumps(root))
    (folder.parents[1] / "tiny.py").write_text(
        "from vla_jax.config import TrainConfig\n\ndef get_config():\n    return TrainConfig()\n"
    )
    command = "train --config tiny.py --run-dir run --data.path data/evil --dry-run"
    monkeypatch.setattr(sys, "argv", command.split())
    # It ends the process where JAX has computed before, as other tests of this process have.
    monkeypatch.setattr(distributed, "initialize", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"names the class 'data\.evil\.payload\.Image' for steps/observation"
    ):
        train.main()
    assert not trace.exists()


def test_the_classes_that_are_read_are_those_that_are_written(dataset):
    from vla_jax.data.sources.stored_features import CLASSES

    def classes(feature):
        yield feature["pythonClassName"]
        for inner in feature.get("featuresDict", {}).get("features", {}).values():
            yield from classes(inner)
        if "sequence" in feature:
            yield from classes(feature["sequence"]["feature"])

    assert set(classes(features(dataset))) == set(CLASSES)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("features.json", "[" * 100_000, "is not JSON"),
        ("features.json", "[]", r"is not of TFDS's features|names the class ''"),
        ("features.json", '{"pythonClassName": "' + IMAGE + '"}', "is a Image with None in it"),
        ("dataset_info.json", "{}", "does not say how many episodes"),
        ("dataset_info.json", '{"splits": [{"name": "train", "shardLengths": ["-4", "6"]}]}', "lists shards"),
        ("dataset_info.json", '{"splits": [{"name": "train", "shardLengths": ["6"]}]}', "2 shards"),
        (
            "dataset_info.json",
            '{"splits": [{"name": "train", "shardLengths": ["99999999999", "6"]}]}',
            "lists",
        ),
        ("schema.json", "{", "is not a data set's schema"),
        ("schema.json", '{"schema": {"os": 1}, "num_shards": 2}', "is not a data set's schema"),
    ],
)
def test_metadata_that_is_none_is_one_line(dataset, tmp_path, file, content, match):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=match) as caught:
        EpisodeSource(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_other_files_that_dataset_info_names_are_not_opened(dataset, tmp_path):
    """Its template of file names and its module are not read: the shards are the schema's."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "/etc/{DATASET}"
    info |= {"moduleName": MODULE, "name": "../other"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(EpisodeSource(folder)) == 12
    assert MODULE not in sys.modules


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", "", '{"version": "1.0", "model": {"type": "Evil"}}', "[" * 5000],
)
def test_a_tokenizer_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'
    )
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and "evil" not in sys.modules


@pytest.mark.parametrize(
    "files",
    [
        {"processor_config.json": "[]", "tokenizer.json": "{}"},
        {"processor_config.json": '{"scale": 10, "min_token": 0}', "tokenizer.json": "{}"},
        {
            "processor_config.json": '{"scale": 10, "min_token": 0, "time_horizon": "x"}',
            "tokenizer.json": "{}",
        },
        {"processor_config.json": '{"scale": NaN, "min_token": 0}', "tokenizer.json": "{}"},
    ],
)
def test_a_fast_tokenizer_that_is_none_is_one_line(files):
    """auto_map of the public one names Python code beside it (trust_remote_code): it is not looked at."""
    files["processor_config.json"] = files["processor_config.json"].replace(
        "{", '{"auto_map": {"AutoProcessor": "evil.Processor"}, ', 1
    )
    with pytest.raises(ValueError, match=r"FAST tokenizer|tokenizer\.json is no tokenizer") as caught:
        FastTokenizer(files)
    assert "\n" not in str(caught.value) and "evil" not in sys.modules


def test_toy_classes_are_read_again(tmp_path):
    """What is written by this version opens: the check refuses nothing of ours."""
    assert len(EpisodeSource(toy.write(tmp_path / "own", [toy.make_episode(0)], shards=1))) == 1


def test_an_image_that_would_fill_the_memory_is_one_line():
    """A PNG of a few bytes that says it has 4 billion pixels."""
    size = struct.pack(">II5B", 65_000, 65_000, 8, 2, 0, 0, 0)
    head = struct.pack(">I", len(size)) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    state = np.zeros((1, 2), np.float32)
    episode = EncodedEpisode(
        number=3, state=state, action=state, png={"top": (b"\x89PNG\r\n\x1a\n" + head,)},
        language_instruction="", text_target=("",), metadata={},
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="episode 3 step 0: the image of camera top cannot be decoded"
    ) as refused:
        episode.frame("top", 0)
    assert "\n" not in str(refused.value)
