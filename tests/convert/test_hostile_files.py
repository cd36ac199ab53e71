"""Files made to harm: each is refused in one line, runs nothing, and takes no more memory than an honest one."""

import io
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.convert import layouts
from tests.convert.test_round_trip import pi0_hf_files, save_lerobot, save_statistics
from vla_jax.convert import Options, convert
from vla_jax.convert.sources import NpzSource, SafetensorsSource
from vla_jax.data.tokenizer_files import read_tokenizer

MOST = 64 * 2**20
"""Bytes that a refusal may take."""
INDEX = "model.safetensors.index.json"


def refused(act, match):
    """`act()` raises one line that matches, and no large array was made on the way."""
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError), match=match) as caught:
            act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < MOST


def array(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = json.dumps(array([2], [0, 8])).encode()
TWO = json.dumps(array([2], [8, 16])).encode()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(b"\x10\0\0\0\0\0\0\0{", "not a whole safetensors", id="header cut off"),
        pytest.param(struct.pack("<Q", 2**60) + b"{}", "header too large", id="header of 2^60 bytes"),
        pytest.param(
            safetensors({"a": array([2], [0, 8]), "b": array([2], [4, 12])}, bytes(12)),
            "invalid offset",
            id="overlapping",
        ),
        pytest.param(
            safetensors({"a": array([2], [8, 0])}, bytes(8)), "not a whole safetensors", id="backwards"
        ),
        pytest.param(safetensors({"a": array([2], [0, 8], "F31")}, bytes(8)), "variant `F31`", id="no type"),
        pytest.param(
            safetensors({"a": array([4], [0, 16], "C64")}, bytes(16)),
            "not a whole safetensors|type C64, which",
            id="type of another size",
        ),
        pytest.param(
            safetensors({"a": array([2**62, 4], [0, 8])}, bytes(8)), "overflow", id="shape that overflows"
        ),
        pytest.param(safetensors({"a": array([2**40, 0], [0, 0])}), "has no elements", id="empty, but long"),
        pytest.param(
            safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
            "invalid JSON",
            id="NaN as a size",
        ),
        pytest.param(
            safetensors(b'{"a":' + ONE + b',"a":' + TWO + b"}", bytes(16)),
            "invalid offset",
            id="twice a name",
        ),
        pytest.param(safetensors(b"[" * 100_000), "invalid JSON", id="deep"),
        pytest.param(pickle.dumps({"a": print}), "not a whole safetensors", id="a pickle"),
    ],
)
def test_safetensors(tmp_path, content, match):
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(lambda: SafetensorsSource(tmp_path), match)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": "x\0"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": ".."}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": ""}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": 3}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": ["x"], "b": None}}, "not the name of a file in the same folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, r"absent\.safetensors is missing"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "has no weight_map"),
        ("[" * 100_000, "not readable JSON"),
    ],
)
def test_an_index(tmp_path, index, match):
    """An honest file lies outside the folder: an index that leads there is refused all the same."""
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": array([2], [0, 8])}, bytes(8)))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    refused(lambda: SafetensorsSource(folder), match)


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def described(shape, descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def archive(*members, method=zipfile.ZIP_STORED, change=None):
    """A zip; `change` may edit the bytes of its first directory entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            with (
                file.open(zipfile.ZipInfo(name), "w")
                if method == zipfile.ZIP_STORED
                else file.open(name, "w") as member
            ):
                member.write(content)
    content = bytearray(buffer.getvalue())
    if change is not None:
        change(content, content.rfind(b"PK\x01\x02"))
    return bytes(content)


def pickled():
    class Payload:
        def __reduce__(self):
            return (exec, ("import sys; sys.modules['executed'] = sys",))

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray([Payload()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def encrypted(content, entry):
    content[entry + 8] |= 1


def unknown_method(content, entry):
    content[entry + 10] = 99


GOOD = npy(described((1,)), bytes(4))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(lambda: archive(("a.npy", pickled())), "Python objects", id="pickled objects"),
        pytest.param(lambda: pickle.dumps({"a": 1}), "not a zip file", id="a pickle"),
        pytest.param(
            lambda: archive(("a.npy", npy("__import__('sys').modules.update(executed=0)"))),
            "malformed node",
            id="code for a header",
        ),
        pytest.param(lambda: archive(("a.npy", npy(described((2**40,))))), "larger than any", id="2^40"),
        pytest.param(lambda: archive(("a.npy", npy(described((2**30,))))), "has 0 bytes", id="no data"),
        pytest.param(lambda: archive(("a.npy", npy(described((-3,))))), "no elements", id="negative"),
        pytest.param(
            lambda: archive(("a.npy", npy(described((1,), "[('x', '<f4')]"), bytes(4)))),
            "records",
            id="records",
        ),
        pytest.param(lambda: archive(("a.npy", GOOD), ("a.npy", GOOD)), "there twice", id="twice a name"),
        pytest.param(lambda: archive(("a.txt", b"hello")), "no .npy", id="something else"),
        pytest.param(
            lambda: archive(("a.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{")),
            "EOF",
            id="header of 2 GiB",
        ),
        pytest.param(
            lambda: archive(
                ("a.npy", npy(described((5 * 2**20,)), bytes(20 * 2**20))), method=zipfile.ZIP_DEFLATED
            ),
            "would expand from",
            id="bomb",
        ),
        pytest.param(lambda: archive(("a.npy", GOOD), change=encrypted), "encrypted", id="encrypted"),
        pytest.param(lambda: archive(("a.npy", GOOD), change=unknown_method), "method", id="odd method"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz(tmp_path, content, match):
    path = tmp_path / "pt.npz"
    path.write_bytes(content())
    refused(lambda: NpzSource(path), match)
    assert "executed" not in sys.modules


def test_names_that_are_paths_are_names(tmp_path):
    """Names of arrays are looked up in a table and never become files."""
    arrays = layouts.random(layouts.big_vision(layouts.TINY))
    with zipfile.ZipFile(tmp_path / "pt.npz", "w") as file:
        for name, values in [
            *arrays.items(),
            ("../../out/evil", np.ones(2, np.float32)),
            ("NaN", arrays["img/head/bias"]),
        ]:
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values)
    out = tmp_path / "out"
    refused(
        lambda: convert(tmp_path / "pt.npz", out, source="big_vision", target="vla_jax"), "2 not known: .*NaN"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vlm_config": []}, "is not of the format pi0_hf"),
        ({"vlm_config": {"vision_config": 3}}, "is not of the format pi0_hf|num_attention_heads"),
        ({"chunk_size": "many"}, "is not of the format pi0_hf"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "is not of a PI0"),
    ],
)
def test_a_config_that_holds_other_things(tmp_path, change, match):
    theirs = tmp_path / "theirs"
    pi0_hf_files(theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | change))
    refused(lambda: convert(theirs, tmp_path / "out", source="pi0_hf", target="vla_jax"), match)
    assert "evil" not in sys.modules


def test_a_preprocessor_that_names_a_file_elsewhere(tmp_path):
    theirs = tmp_path / "theirs"
    save_lerobot(theirs, layouts.random(layouts.lerobot(layouts.TINY, "pi0")), "pi0")
    file = theirs / "policy_preprocessor.json"
    said = json.loads(file.read_text())
    step = next(step for step in said["steps"] if "state_file" in step)
    (theirs / step["state_file"]).rename(tmp_path / "outside.safetensors")
    step["state_file"] = "../outside.safetensors"
    step["class"] = "evil.Step"
    file.write_text(json.dumps(said))
    refused(
        lambda: convert(theirs, tmp_path / "out", source="lerobot", target="vla_jax"),
        "not the name of a file in the same folder",
    )
    assert "evil" not in sys.modules


@pytest.fixture
def openpi(tmp_path):
    theirs = tmp_path / "theirs"
    layouts.save_openpi(theirs, layouts.random(layouts.openpi(layouts.TINY, "pi0")), value=True)
    return theirs


@pytest.mark.parametrize("values", ["evil", [1, "x"], [float("nan"), 0], [[1], [2]], {"0": 1}, [True, 0]])
def test_statistics_that_are_no_numbers(openpi, tmp_path, values):
    save_statistics(openpi)
    file = openpi / "assets/lab/robot/norm_stats.json"
    statistics = json.loads(file.read_text())
    statistics["norm_stats"]["state"]["mean"] = values
    file.write_text(json.dumps(statistics))
    refused(
        lambda: convert(openpi, tmp_path / "out", source="openpi", target="vla_jax"),
        "mean of state is not a list of finite numbers",
    )


def test_orbax_metadata(openpi, tmp_path):
    """Types that the metadata names are looked up in orbax's table; shapes are not believed beyond reason."""
    file = openpi / "params/_METADATA"
    good = json.loads(file.read_text())

    def act():
        convert(openpi, tmp_path / "out", source="openpi", target="vla_jax", options=Options(horizon=4))

    for value in ({"value_type": "evil.Type", "skip_deserialize": False}, {"value_type": 3}, []):
        bad = json.loads(json.dumps(good))
        name = next(iter(bad["tree_metadata"]))
        bad["tree_metadata"][name]["value_metadata"] = value
        file.write_text(json.dumps(bad))
        refused(act, "not a readable orbax folder|not of the format|missing|damaged")
    file.write_text("[" * 100_000)
    refused(act, "not a readable orbax folder")
    assert "evil" not in sys.modules and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"\x80\x04\x95cos\nsystem\n(S'true'\ntR."),  # a pickle
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f"),  # a piece of 4 GiB
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_tokenizer(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_tokenizer(tmp_path / name), "tokenizer|decode")
