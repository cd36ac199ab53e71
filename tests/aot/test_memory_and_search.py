"""What a pod is told when something does not fit, and in which order alternatives are tried."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from configs import pi0_pretrain, pi05_pretrain
from tests.aot import tiny
from vla_jax.aot import parse, search
from vla_jax.aot.memory import DoesNotFit
from vla_jax.aot.programs import abstract_batch, check_sizes, plan, prefix_tokens
from vla_jax.aot.report import Report, too_large
from vla_jax.aot.schedule import Timeline
from vla_jax.sharding import MeshConfig, make_mesh
from vla_jax.train.flops import train_flops

GIB = 2**30


def lowered(state, **mesh):
    sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh
    return SimpleNamespace(placement=SimpleNamespace(device_bytes=state), mesh=SimpleNamespace(shape=sizes))


@pytest.mark.parametrize(
    ("state", "mesh", "changes", "advice"),
    [
        (12 * GIB, {"data": 4, "fsdp": 4}, {}, "mesh.fsdp=16"),
        (20 * GIB, {"fsdp": 16}, {}, "use more chips"),
        (1 * GIB, {"fsdp": 16}, {"remat": "none"}, "model.remat=nothing_saveable, or halve the microbatch"),
        (1 * GIB, {"fsdp": 16}, {}, "halve the microbatch with train.accumulate=2"),
        (1 * GIB, {"fsdp": 32}, {}, "split the prefix with mesh.sequence=2"),
    ],
)
def test_a_program_that_does_not_fit_says_by_how_much_and_what_to_change(state, mesh, changes, advice):
    config = tiny.get_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    topology = parse("v5e:4x4")
    error = too_large(config, topology, lowered(state, **mesh), 21 * GIB, 15.75 * GIB, "train")
    assert isinstance(error, DoesNotFit) and error.over == 5.25 * GIB
    assert "train does not fit v5e:4x4: it needs 21.00 GiB of 15.75 GiB per chip, 5.25 GiB too much" in str(
        error
    )
    assert advice in str(error) and "\n" not in str(error)


def test_sizes_that_only_a_data_set_knows_are_asked_for():
    config = tiny.get_config()
    check_sizes(config)
    without = dataclasses.replace(
        config.model,
        backbone=dataclasses.replace(
            config.model.backbone, text=dataclasses.replace(config.model.backbone.text, vocab=0)
        ),
    )
    with pytest.raises(
        ValueError,
        match=r"model.backbone.text.vocab is left to the data set.*--model.backbone.text.vocab 257152",
    ):
        check_sizes(dataclasses.replace(config, model=without))


@pytest.mark.parametrize(("module", "tokens", "further"), [(pi0_pretrain, 816, 0), (pi05_pretrain, 968, 256)])
def test_pretraining_configs_need_no_data(module, tokens, further):
    config = module.get_config()
    check_sizes(config)
    assert prefix_tokens(config) == tokens
    assert config.model.expert.horizon == 50 and config.model.expert.action_dim == 32
    draws = 1 if config.objective.action_weight else 0
    logits = (further + config.data.max_target_tokens) * 2048 * 257_152 if config.objective.text else 0
    roughly = 6 * (1.98e9 * (tokens + further) + 412e6 * 768 + draws * 311e6 * 51 + logits)
    assert train_flops(config) == pytest.approx(roughly, rel=0.1)  # 6 · parameters · tokens


def test_pi05_pretraining_learns_tokens_with_the_backbone_alone():
    """CE + α · flow matching with α = 0; see the config's docstring."""
    config = pi05_pretrain.get_config()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = plan(config, abstract_batch(config, mesh), mesh).shapes
    assert config.chunk_tokens == "beside" and config.objective.text and config.objective.action_weight == 0
    assert set(state.params) == {"backbone"} and set(state.frozen) == {"expert"}


def test_meshes_divide_the_model_and_the_pod():
    config, topology = pi0_pretrain.get_config(), parse("v5e:16x16", slices=2)
    found = list(search.meshes(topology, config))
    for mesh in found:
        assert mesh.data * mesh.fsdp * mesh.tensor == 512 and mesh.data % 2 == 0
        assert 1152 % mesh.fsdp == 0 and 8 % mesh.tensor == 0
    assert {mesh.fsdp for mesh in found if mesh.tensor == 1} == {1, 2, 4, 8, 16, 32, 64, 128}


def test_candidates_keep_the_batch_and_leave_out_the_hopeless():
    config, topology = pi0_pretrain.get_config(), parse("v5e:16x16")
    found = search.candidates(config, topology)
    assert found == sorted(found, key=lambda c: c.seconds)
    assert {c.config.train.batch_size for c in found} == {2048}
    assert all(c.config.mesh.fsdp * c.config.mesh.tensor >= 4 for c in found)  # 65 GB of state and gradients
    # Gathering the parameters once per microbatch cannot be faster.
    same = [
        c for c in found if c.config.mesh == found[0].config.mesh and c.config.model == found[0].config.model
    ]
    assert [c.config.train.accumulate for c in same] == sorted(c.config.train.accumulate for c in same)


def report(config, mfu):
    line = Timeline(matrix=1.0 / mfu)
    return Report(
        program="train",
        topology=parse("v5e:4x4"),
        mesh={"data": 1, "fsdp": 16},
        model="",
        batch=config.train.batch_size,
        memory=SimpleNamespace(total=GIB, headroom=14 * GIB),
        unsharded=0.0,
        sample_flops=1.97e14 * 16 / config.train.batch_size,
        timeline=line,
        seconds_to_compile=0.0,
    )


def test_search_passes_over_what_must_be_too_large_and_ranks_by_mfu(monkeypatch):
    tried = []

    def measure(config, topology):
        tried.append((config.mesh.fsdp, config.model.remat, config.train.accumulate))
        if config.model.remat == "none":
            raise DoesNotFit("too large", 2 * GIB)
        return report(config, 0.5 if config.model.remat == "nothing_saveable" else 0.7)

    monkeypatch.setattr(search, "measure", measure)
    ranked = search.search(tiny.get_config(), parse("v5e:4x4"), compiles=6, say=lambda line: None)
    assert len(tried) == len(set(tried)) == 6
    assert [r.mfu for _, r in ranked] == sorted((r.mfu for _, r in ranked), reverse=True)
    assert "none" not in {c.config.model.remat for c, _ in ranked}
    assert search.options(ranked[0][0]).startswith("--mesh.data ")
    monkeypatch.setattr(search, "measure", lambda *_: (_ for _ in ()).throw(DoesNotFit("too large", 1.0)))
    with pytest.raises(ValueError, match="none of the 2 candidates compiled for v5e:4x4 fits"):
        search.search(tiny.get_config(), parse("v5e:4x4"), compiles=2, say=lambda line: None)


def test_search_passes_over_meshes_that_cannot_be_made_and_says_how_many(monkeypatch):
    tried, said = [], []

    def measure(config, topology):
        tried.append(config.mesh)
        if config.mesh.tensor > 1:
            raise ValueError(f"mesh.tensor={config.mesh.tensor} cannot be laid out")
        return report(config, 0.5)

    monkeypatch.setattr(search, "measure", measure)
    config, topology = tiny.get_config(), parse("v5e:4x4")
    ordered = search.candidates(config, topology)
    ranked = search.search(config, topology, compiles=len(ordered), say=said.append)
    possible = [c for c in ordered if c.config.mesh.tensor == 1]
    assert len(ranked) == len(possible) < len(ordered)
    impossible = {c.config.mesh for c in ordered if c.config.mesh.tensor > 1}
    assert [tried.count(mesh) for mesh in impossible] == [1] * len(impossible)
    assert said[-1] == (
        f"{len(impossible)} meshes ({len(ordered) - len(possible)} candidates) were passed over"
    )
    monkeypatch.setattr(search, "measure", lambda *_: (_ for _ in ()).throw(ValueError("cannot be laid out")))
    with pytest.raises(ValueError, match=r"no mesh of v5e:4x4 goes with this model; .*cannot be laid out"):
        search.search(config, topology, compiles=2, say=said.append)


def test_predictions_of_a_report():
    config = tiny.get_config()
    found = report(config, 0.5)
    assert found.mfu == pytest.approx(0.5)
    assert found.samples_per_second_per_chip == pytest.approx(config.train.batch_size / 16 / 2)
    slow = dataclasses.replace(found, timeline=Timeline(matrix=2.0, host=1.5e10 * 4))
    assert slow.seconds == pytest.approx(4) and "host" in slow.limit()
    waiting = dataclasses.replace(found, timeline=Timeline(matrix=1.1, other=0.2, waiting=0.9))
    assert waiting.limit() == "waiting for the network"
