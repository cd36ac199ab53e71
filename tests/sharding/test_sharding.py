"""Meshes, rules and placement: refused where they cannot work, equal to one device where they can."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vla_jax.layers.axes import constrain, mesh_axes
from vla_jax.layers.mlp import GeGLU
from vla_jax.sharding import (
    RULES,
    MeshConfig,
    activate,
    check_batch,
    check_prefix,
    check_unsharded,
    make_mesh,
    placement,
    shardings,
)
from vla_jax.sharding import mesh as mesh_module


def mesh_of(**sizes):
    """A mesh of any size without the devices."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def boxed(names, shape):
    init = nn.with_logical_partitioning(nn.initializers.zeros, names)
    return jax.eval_shape(lambda: {"layer": {"w": init(jax.random.key(0), shape)}})


def on_eight_devices(module):
    # Unoptimised code compiles several times faster, and runs long enough for these sizes.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def eight():
    return on_eight_devices("tests.sharding.eight")


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "2x2x2"])
def test_sharded_equals_one_device(eight, mesh):
    found = eight[mesh]
    assert found["init"] == 0  # bit for bit: random bits do not depend on the sharding
    assert found["loss"] < 1e-6
    assert found["params"] < 1e-5


@pytest.fixture(scope="module")
def eight_vla():
    return on_eight_devices("tests.sharding.eight_vla")


def test_real_model_on_any_mesh_has_the_loss_and_gradient_of_one_device(eight_vla):
    found = eight_vla
    for mesh in ("8x1x1", "1x8x1", "2x2x2"):
        assert found[mesh]["loss"] < 1e-5
        # Of the largest gradient. The time's embedding has angles up to 1,600, so that its rounding is 1e-4 in places.
        assert found[mesh]["gradient"] < 1e-4
        assert found[mesh]["constraints"] >= 10
    assert found["1x8x1"]["unsharded"] < 0.02 and found["2x2x2"]["unsharded"] < 0.02


def test_a_model_without_a_language_model_is_sharded_too(eight_vla):
    """An image encoder and a dit, whose axes' names are all that the rules know of them."""
    for mesh in ("8x1x1", "1x8x1", "2x2x2", "2x2x2x1"):
        found = eight_vla["encoder"][mesh]
        assert found["loss"] < 1e-5 and found["gradient"] < 1e-5 and found["constraints"] >= 10
        assert mesh == "8x1x1" or found["unsharded"] < 0.03
    assert eight_vla["encoder"]["8x1x1"]["collectives"] == ["all-reduce"]


@pytest.fixture(scope="module")
def eight_losses():
    return on_eight_devices("tests.sharding.eight_cross_entropy")


@pytest.mark.parametrize("mesh", ["8x1x1x1", "1x8x1x1", "2x2x1x2", "1x2x2x2"])
def test_the_vocabulary_split_over_devices_has_the_same_cross_entropy(eight_losses, mesh):
    """In pieces and at once, 202 tokens over 1 to 8 devices; also samples that no mesh divides."""
    for found in eight_losses[mesh]["cases"].values():
        assert found["loss"] < 1e-6 and found["gradient"] < 1e-6 and found["correct"] == 0


def test_pieces_of_a_cross_entropy_exchange_hidden_vectors_only(eight_losses):
    """No collective of a piece is as large as the table, or as what one device has of it where data sums gradients."""
    for mesh in ("1x8x1x1", "2x2x1x2"):
        pieces = eight_losses[mesh]["pieces"]
        assert pieces["loops"] and 0 < pieces["largest"] <= pieces["hidden"] < pieces["table"]


def test_a_batch_that_is_split_stays_where_it_is(eight_vla):
    """Where every device has all parameters, only gradients are exchanged: no image, token or activation moves."""
    assert eight_vla["8x1x1"]["collectives"] == ["all-reduce"]


def test_parameters_and_moments_are_split_by_the_rules(eight):
    assert eight["8x1x1"]["kernel"] == [16, 32]
    assert eight["1x8x1"]["kernel"] == eight["1x8x1"]["moment"] == [2, 32]
    assert eight["2x2x2"]["kernel"] == eight["2x2x2"]["moment"] == [8, 16]
    assert eight["8x1x1"]["unsharded"] == 1 and eight["2x2x2"]["unsharded"] < 0.01


def test_constraints_are_in_the_lowered_program(eight):
    # Two activations, forward and backward. Outside `activate` they mean nothing, hence the count above 0.
    assert all(eight[mesh]["constraints"] >= 2 for mesh in ("8x1x1", "1x8x1", "2x2x2"))
    assert eight["outside"] == 0


def test_a_checkpoint_is_restored_onto_another_mesh(eight):
    for mesh in ("1x8x1", "2x2x2"):
        assert eight[mesh]["restored"] == 0
        assert eight[mesh]["restored_shards"]
    assert eight["whole"] == 0 and eight["whole_devices"] == 1


def test_layers_of_divided_stacks_lie_apart_on_the_disk(eight):
    """64 KiB of a layer on a device are enough: whoever reads it must not read all layers of that part."""
    assert eight["on_disk"] == {"chunk": [1, 8, 2048], "gap": 0}


def test_prefix_split_over_devices_changes_nothing(eight_vla):
    """sequence=2 has fewer samples per device, and the prefix in two parts."""
    assert eight_vla["2x2x2x1"]["loss"] < 1e-5
    assert eight_vla["2x2x2x1"]["gradient"] < 1e-5
    assert eight_vla["2x2x2x1"]["unsharded"] < 0.02
    assert eight_vla["2x2x2x1"]["prefix_shards"] == 2


def test_weights_of_others_go_straight_to_their_shards(eight_vla):
    """`convert.load` gives each device its part of each array, and nothing more."""
    found = eight_vla["converted"]
    assert not found["wrong"] and found["arrays"] == 0
    assert found["shards"]["llm/layers/mlp/linear"] == [3, 20, 24]
    assert found["shards"]["llm/embedder/input_embedding"] == [32, 24]
    assert 0.25 <= found["share"] < 0.4


def test_splash_on_a_mesh_is_splash_on_one_device(eight_vla):
    """Samples over data × fsdp, heads over tensor, queries over sequence."""
    assert eight_vla["splash"] < 1e-5


def test_rules_name_each_axis_once():
    names = [name for name, _ in RULES]
    assert len(names) == len(set(names))
    for name in (
        "layers",
        "embed",
        "mlp",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab",
        "patch",
        "action",
        "batch",
        "prefix",
        "length",
    ):
        assert name in names


def test_misspelt_axis_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"layer/w: axis 'emded' .* did you mean 'embed'\?"):
        shardings(boxed(("emded", "mlp"), (4, 4)), mesh_of(data=1, fsdp=2, tensor=1))


@pytest.mark.parametrize("lay", [lambda x, names: constrain(x, names), lambda x, names: mesh_axes(names)])
def test_misspelt_axis_of_an_activation_is_refused_too(lay):
    """Flax would copy it to every device. Without rules the names mean nothing, and everything passes."""
    x = jnp.zeros((2, 4, 4))

    def trace(first):
        jax.jit(lambda x: (lay(x, (first, "length", "act_embed")), x)[1])(x)

    trace("bacth")
    with activate(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        trace("batch")
        with pytest.raises(ValueError, match=r"axis 'bacth' is not in .* did you mean 'batch'\?"):
            trace("bacth")


def test_a_model_with_a_misspelt_axis_does_not_trace():
    model = GeGLU(8, 8)
    x = jnp.zeros((2, 4, 8))
    params = model.init(jax.random.key(0), x)
    with activate(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        with pytest.raises(ValueError, match=r"'batch', 'prefx', 'act_mlp'.* did you mean 'prefix'\?"):
            jax.eval_shape(lambda p, x: model.apply(p, x, length="prefx"), params, x)
        with pytest.raises(ValueError, match=r"\(2, 4, 8\) has 3 axes, but 2 names"):
            constrain(x, ("batch", "length"))


NAMING = {
    "constrain", "mesh_axes", "_on_mesh", "with_logical_partitioning", "fan_in", "kernel", "normal", "zeros", "ones",
    "sincos_2d", "dct_2d", "Einsum", "dense", "Projection",
}  # fmt: skip
"""Functions and modules that are given the names of axes."""


def axis_names(path):
    """(line, name) of every axis that a source file names: in tuples given to `NAMING`, and as a `length`."""
    for node in ast.walk(ast.parse(path.read_text())):
        given = []
        if isinstance(node, ast.Call):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            values = [*node.args, *(k.value for k in node.keywords)] if function in NAMING else []
            given = [
                one for value in values for t in ast.walk(value) if isinstance(t, ast.Tuple) for one in t.elts
            ]
            for keyword in node.keywords:
                given += [keyword.value] if keyword.arg == "length" else []
                given += keyword.value.elts if keyword.arg == "names" and function == "dict" else []
        elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "length":
            given = [node.value]
        elif isinstance(node, ast.arguments):
            named = zip([a.arg for a in node.kwonlyargs], node.kw_defaults)
            given = [default for name, default in named if name == "length"]
        elif isinstance(node, ast.Dict):
            given = [v for k, v in zip(node.keys, node.values) if getattr(k, "attr", "") == "PARTITION_NAME"]
        for one in given:
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                yield one.lineno, one.value


def test_every_axis_that_the_source_names_is_in_the_rules():
    root = Path(__file__).parents[2] / "vla_jax"
    known, found = {name for name, _ in RULES}, set()
    for path in sorted(root.rglob("*.py")):
        for line, name in axis_names(path):
            assert name in known, f"{path}:{line}: axis '{name}' is not in vla_jax/sharding/rules.py"
            found.add(name)
        if path.parent.name != "sharding" and path.name != "axes.py":
            assert not re.search(r"nn\.(with_logical_constraint|logical_to_mesh)", path.read_text()), path
    assert found == known  # so this test finds them, and no rule is idle


def test_unnamed_parameter_is_refused():
    with pytest.raises(ValueError, match="names no axes"):
        shardings({"w": jax.ShapeDtypeStruct((4,), jnp.float32)}, mesh_of(data=1, fsdp=2, tensor=1))


def test_indivisible_axis_is_refused_with_what_would_work():
    with pytest.raises(
        ValueError, match=r"axis 'heads' of 6 is not divisible by mesh.tensor=4; use mesh.tensor=2"
    ):
        shardings(boxed(("embed", "heads"), (8, 6)), mesh_of(data=1, fsdp=2, tensor=4))


def test_a_mesh_axis_is_used_once_per_array():
    tree = shardings(boxed(("embed", "mlp"), (8, 8)), mesh_of(data=2, fsdp=2, tensor=2))
    assert tree["layer"]["w"].spec == PartitionSpec("fsdp", "tensor")


def test_sequence_splits_parameters_like_fsdp():
    mesh = mesh_of(data=1, fsdp=2, sequence=2, tensor=2)
    tree = shardings(boxed(("embed", "mlp"), (8, 8)), mesh)
    assert tree["layer"]["w"].spec == PartitionSpec(("fsdp", "sequence"), "tensor")
    alone = shardings(boxed(("embed", "mlp"), (8, 8)), mesh_of(data=1, fsdp=1, sequence=2, tensor=1))
    assert alone["layer"]["w"].spec == PartitionSpec("sequence", "tensor")
    with pytest.raises(
        ValueError, match=r"not divisible by mesh.fsdp=2 × mesh.sequence=2; use mesh.sequence=1"
    ):
        shardings(boxed(("embed", None), (6, 8)), mesh)


def test_sequence_must_divide_the_prefix():
    mesh = mesh_of(data=1, fsdp=1, sequence=4, tensor=1)
    check_prefix(816, 256, mesh)
    with pytest.raises(
        ValueError, match=r"mesh.sequence=4 does not divide the prefix, 818 .* mesh.sequence=2"
    ):
        check_prefix(818, 256, mesh)


def devices_of(slices, sides=(2, 2)):
    """TPU-like devices with coordinates; more cannot be had here, and `make_mesh` asks for no more."""
    return [
        SimpleNamespace(
            id=s * 4 + x * 2 + y, slice_index=s, coords=(x, y, 0), core_on_chip=0, platform="cpu",
            device_kind="none", process_index=s,
        )
        for s in range(slices)
        for x in range(sides[0])
        for y in range(sides[1])
    ]  # fmt: skip


def test_only_data_crosses_slices(monkeypatch):
    made = {}
    monkeypatch.setattr(
        mesh_module, "Mesh", lambda devices, names, **_: made.update(zip(names, devices.shape)) or devices
    )
    devices = make_mesh(MeshConfig(data=4, fsdp=2), devices_of(2))
    assert made == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    slices = [[d.slice_index for d in row] for row in devices.reshape(4, 2)]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"mesh.data=1 is not divisible by the 2 slices, .* use mesh.data=2"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices_of(2))


def test_axes_may_be_parts_of_torus_sides(monkeypatch):
    """4×4 chips as 2 × 8: no side has 2, and jax.make_mesh would refuse it for this chip."""
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, names, **_: devices)
    chips = [
        SimpleNamespace(
            id=4 * x + y, coords=(x, y, 0), core_on_chip=0, platform="tpu", device_kind="TPU v6 lite"
        )
        for x in range(4)
        for y in range(4)
    ]
    placed = make_mesh(MeshConfig(data=2, fsdp=8), chips)
    assert placed.shape == (2, 8, 1, 1)
    assert {chip.id for chip in placed.flat} == set(range(16))


def test_a_mesh_that_does_not_tile_the_torus(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 0")

    monkeypatch.setattr(mesh_module.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(ValueError, match=r"mesh.fsdp=4.* cannot be laid out on a torus of 2×2×1 chips"):
        make_mesh(MeshConfig(fsdp=4), devices_of(1))


def test_too_much_unsharded_is_refused():
    mesh = mesh_of(data=2, fsdp=4, tensor=2)
    tree = {"w": boxed(("embed", "mlp"), (8, 6))["layer"]["w"], "norm": boxed((None,), (10,))["layer"]["w"]}
    table = placement(nn.unbox(tree), shardings(tree, mesh), mesh)
    check_unsharded(table, 0.2)
    with pytest.raises(ValueError, match=r"17.2% of the state .*norm \(40 B\).*mesh.max_unsharded=0.18"):
        check_unsharded(table, 0.02)
    data_only = mesh_of(data=8, fsdp=1, tensor=1)
    check_unsharded(placement(nn.unbox(tree), shardings(tree, data_only), data_only), 0.0)


def fake_devices(n):
    return [SimpleNamespace(id=i) for i in range(n)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), r"3 does not divide the 8 devices; .*\[1, 2, 4, 8\]"),
        (MeshConfig(data=2, fsdp=2, tensor=1), r"needs 4 devices, but there are 8"),
    ],
)
def test_impossible_meshes(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, fake_devices(8))


@pytest.mark.parametrize(
    "values", [{"data": 0}, {"fsdp": -2}, {"data": -1, "fsdp": -1}, {"max_unsharded": 1.5}]
)
def test_mesh_config_is_checked(values):
    with pytest.raises(ValueError, match="mesh"):
        MeshConfig(**values)


def test_batch_must_divide():
    mesh = mesh_of(data=4, fsdp=2, tensor=1)
    check_batch(32, 2, mesh)
    with pytest.raises(
        ValueError, match=r"batch 30 is not divisible by 8 batch shards .*use train.batch_size=32"
    ):
        check_batch(30, 1, mesh)
    with pytest.raises(ValueError, match="2 microbatches"):
        check_batch(24, 2, mesh)


def test_placement_counts_bytes_by_hand():
    mesh = mesh_of(data=2, fsdp=4, tensor=2)
    tree = {
        "w": boxed(("embed", "mlp"), (8, 6))["layer"]["w"],
        "norm": boxed((None,), (10,))["layer"]["w"],
    }
    places = shardings(tree, mesh)
    table = placement(nn.unbox(tree), places, mesh)
    assert table.bytes == 8 * 6 * 4 + 10 * 4
    assert table.device_bytes == 2 * 3 * 4 + 10 * 4
    assert table.unsharded_share == pytest.approx(40 / (192 + 40))
    assert "fsdp, tensor" in table.table()
    assert "17.2% not sharded" in table.summary()
