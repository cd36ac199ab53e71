"""Reading compiled text, and predicting from it: by hand on programs of a few lines. Needs no TPU compiler."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from vla_jax.aot import parse
from vla_jax.aot.chips import CHIPS
from vla_jax.aot.collectives import Collective, collective, groups
from vla_jax.aot.hlo import VMEM, Program, arrays
from vla_jax.aot.network import Network
from vla_jax.aot.schedule import Player

V5E = CHIPS["v5e"]

TEXT = """HloModule step, is_scheduled=true

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %bound = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%matmul (a: bf16[8,128], b: bf16[128,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[128,128]{1,0} parameter(1)
  ROOT %c = bf16[8,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%p.1), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i.1, %two)
  %shard = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %gather-start = (bf16[32,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %before = bf16[8,128]{1,0} fusion(%x, %x), kind=kOutput, calls=%matmul, backend_config={"estimated_cycles":"1500"}
  %gather = bf16[128,128]{1,0} all-gather-done(%gather-start)
  %y = bf16[8,128]{1,0} fusion(%before, %gather), kind=kOutput, calls=%matmul, backend_config={"window_config":{"estimated_cycles":"3000"}}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%next, %y)
}

ENTRY %main (arg: bf16[8,128]) -> bf16[8,128] {
  %arg = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(1)
  %copy = s32[] copy(%zero)
  %init = (s32[], bf16[8,128]{1,0}) tuple(%copy, %arg)
  %loop = (s32[], bf16[8,128]{1,0}) while(%init), condition=%cond, body=%body
  %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = bf16[8,128]{1,0} all-reduce(%out), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}
"""  # noqa: E501


def mesh_of(**sizes):
    """8 chips of two rows of 4, without the compiler."""
    count = int(np.prod(list(sizes.values())))
    devices = np.array(
        [
            SimpleNamespace(coords=(i // 4, i % 4, 0), slice_index=0, process_index=i // 4)
            for i in range(count)
        ]
    )
    return SimpleNamespace(shape=sizes, devices=devices.reshape(tuple(sizes.values())))


def test_loops_are_counted_from_their_start_bound_and_stride():
    program = Program(TEXT)
    loop = program.by_name("main")["loop"]
    assert program.trips("main", loop) == 3  # 1, 3, 5
    faster = Program(TEXT.replace("constant(2)", "constant(1)"))
    assert faster.trips("main", faster.by_name("main")["loop"]) == 6
    known = Program(TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'))
    assert known.trips("main", known.by_name("main")["loop"]) == 9


def test_a_loop_that_cannot_be_counted_is_reported_and_not_guessed():
    mesh = mesh_of(data=2, fsdp=4)
    odd = TEXT.replace("add(%i.1, %two)", "multiply(%i.1, %two)")
    line = Player(Program(odd), mesh, Network(parse("v5e:2x4"), mesh)).play()
    assert "loop" in str(line.unknown)


def test_types():
    one, two = arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[3])")
    assert (one.dtype, one.shape, one.space, one.bytes) == ("bf16", (8, 128), VMEM, 2048)
    assert two.bytes == 3
    assert arrays("f32[]")[0].bytes == 4 and arrays("f8e4m3fn[10]")[0].bytes == 10


def test_playing_a_program():
    """Three rounds of: gather 3/4 of 32 KiB while 1 µs is computed, wait for the rest, compute 2 µs; then a sum."""
    mesh = mesh_of(data=2, fsdp=4)
    topology = parse("v5e:2x4")
    line = Player(Program(TEXT), mesh, Network(topology, mesh)).play()
    gather, total = line.traffic["all-gather", ("fsdp",)], line.traffic["all-reduce", ("data",)]
    assert (gather.count, total.count) == (3, 1)
    assert gather.bytes == 3 * 3 / 4 * 128 * 128 * 2
    assert total.bytes == 2 * 1 / 2 * 8 * 128 * 2
    assert line.matrix == pytest.approx(3 * 4500 / V5E.clock)
    one = max(3 / 4 * 32768 / V5E.link, 3 * V5E.hop)  # a line of 4
    assert gather.seconds == pytest.approx(3 * one)
    assert gather.waiting == pytest.approx(3 * (one - 1500 / V5E.clock))
    assert line.waiting == pytest.approx(gather.waiting + total.seconds)
    assert line.seconds == pytest.approx(line.matrix + line.waiting, abs=1e-9)  # and a scalar's addition


def test_a_fused_collective_counts_once_from_its_first_stage_to_its_last():
    """TPU programs spread one gather over several fusions that compute in the meantime; all name its channel."""
    gather = "  ROOT %g = bf16[128,128]{1,0} all-gather(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}"
    stage = "\n".join(
        ["%stage (q: bf16[32,128]) -> bf16[128,128] {", "  %q = bf16[32,128]{1,0} parameter(0)", gather, "}"]
    )
    done = "  %gather = bf16[128,128]{1,0} all-gather-done(%gather-start)"
    start = next(line for line in TEXT.splitlines() if "gather-start =" in line)
    fusion = (
        "  %{} = bf16[128,128]{{1,0}} fusion(%shard), kind=kCustom, calls=%stage, "
        'backend_config={{"estimated_cycles":"{}"}}'
    )
    text = TEXT.replace(start, fusion.format("first", 15)).replace(done, fusion.format("gather", 30))
    text = text.replace("%body (p.1", f"{stage}\n\n%body (p.1")
    mesh = mesh_of(data=2, fsdp=4)
    line = Player(Program(text), mesh, Network(parse("v5e:2x4"), mesh)).play()
    found = line.traffic["all-gather", ("fsdp",)]
    assert found.count == 3 and found.bytes == 3 * 3 / 4 * 32768
    one = max(3 / 4 * 32768 / V5E.link, 3 * V5E.hop)
    assert found.waiting == pytest.approx(3 * (one - (15 + 1500 + 30) / V5E.clock))


@pytest.mark.parametrize("name", ["fusion.9", "all-reduce-scatter.1"])
@pytest.mark.parametrize("called", ["all-reduce-scatter.2.clone.1", "fused_computation.3"])
def test_a_sum_of_which_each_keeps_its_part_is_a_scatter(name, called):
    """TPU programs have such sums as fusions; the compiler says it by the name of one of the two."""
    cycles = 'backend_config={"estimated_cycles":"9"}'
    text = f"""HloModule step, is_scheduled=true

%{called} (q: bf16[128,128]) -> bf16[32,128] {{
  %q = bf16[128,128]{{1,0}} parameter(0)
  %r = bf16[128,128]{{1,0}} all-reduce(%q), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = bf16[32,128]{{1,0}} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={{32,128}}
}}

ENTRY %main (arg: bf16[128,128]) -> bf16[32,128] {{
  %arg = bf16[128,128]{{1,0}} parameter(0)
  ROOT %{name} = bf16[32,128]{{1,0}} fusion(%arg), kind=kCustom, calls=%{called}, {cycles}
}}
"""
    mesh = mesh_of(data=2, fsdp=4)
    line = Player(Program(text), mesh, Network(parse("v5e:2x4"), mesh)).play()
    scattered = "all-reduce-scatter" in name + called
    ((key, found),) = line.traffic.items()
    assert key == ("reduce-scatter" if scattered else "all-reduce", ("fsdp",))
    assert found.bytes == (1 if scattered else 2) * 3 / 4 * 128 * 128 * 2


def test_of_a_stack_that_a_fusion_slices_inside_only_the_slice_is_traffic():
    """A layer's product reads its part of what all layers kept, by way of a bitcast and of a fusion in the fusion."""
    text = """HloModule step, is_scheduled=true

%cut (s: bf16[18,64,128], i: s32[]) -> bf16[64,128] {
  %s = bf16[18,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %layer = bf16[1,64,128]{2,1,0} dynamic-slice(%s, %i, %z, %z), dynamic_slice_sizes={1,64,128}
  ROOT %b = bf16[64,128]{1,0} bitcast(%layer)
}

%outer (stack: bf16[18,8192], w: bf16[128,32], i: s32[]) -> bf16[64,32] {
  %stack = bf16[18,8192]{1,0} parameter(0)
  %w = bf16[128,32]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %again = bf16[18,64,128]{2,1,0} bitcast(%stack)
  %one = bf16[64,128]{1,0} fusion(%again, %i.1), kind=kLoop, calls=%cut
  ROOT %c = bf16[64,32]{1,0} convolution(%one, %w), dim_labels=bf_io->bf
}

ENTRY %main (arg: bf16[18,8192], w: bf16[128,32]) -> bf16[64,32] {
  %arg = bf16[18,8192]{1,0} parameter(0)
  %w.1 = bf16[128,32]{1,0} parameter(1)
  %five = s32[]{:S(6)} constant(5)
  ROOT %out = bf16[64,32]{1,0} fusion(%arg, %w.1, %five), kind=kOutput, calls=%outer, backend_config={"estimated_cycles":"900"}
}
"""  # noqa: E501
    mesh = mesh_of(data=2, fsdp=4)
    line = Player(Program(text), mesh, Network(parse("v5e:2x4"), mesh)).play()
    assert line.hbm == 2 * (64 * 128 + 128 * 32 + 64 * 32)


def played(text):
    mesh = mesh_of(data=2, fsdp=4)
    return Player(Program(text), mesh, Network(parse("v5e:2x4"), mesh)).play()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("estimated_cycles", "cycle_estimate", "before has no estimate of its cycles"),
        ('"estimated_cycles":"3000"', '"cycles":"3000"', "y has no estimate of its cycles"),
        ("bf16[32,128]", "q7[32,128]", "the size of the type 'q7'"),
        ("bf16[32,128]", "bf24[32,128]", "the size of the type 'bf24'"),
        ("is_scheduled=true", "is_scheduled=false", "in the order in which they run"),
        ("ENTRY", "MAIN", "no ENTRY computation"),
        ("all-gather-start(%shard)", "all-gather-start(%lost)", "gather-start takes 'lost'"),
        ("fusion(%before, %gather)", "fusion(%before, %gone)", "y takes 'gone'"),
        ("calls=%matmul", "calls=%elsewhere", "before calls 'elsewhere'"),
        ("condition=%cond, ", "", "no condition"),
        ("replica_groups=[2,4]<=[8], ", "", "replica groups of an unknown form"),
    ],
)
def test_what_cannot_be_read_is_refused_and_not_guessed(old, new, said):
    """As after an update of the compiler; today's text, with one word changed, gave another number in silence."""
    assert played(TEXT).seconds > 9e-6
    assert old in TEXT
    with pytest.raises(ValueError, match=said) as caught:
        played(TEXT.replace(old, new))
    assert "\n" not in str(caught.value) and "known of libtpu 0.0.42.1, installed is" in str(caught.value)


def test_a_program_without_any_estimate_is_refused():
    text = (
        TEXT.replace("calls=%matmul", "calls=%sum").replace("%matmul", "%sum").replace("convolution", "add")
    )
    played(text)
    with pytest.raises(ValueError, match="no instruction has an estimate"):
        played(text.replace("estimated_cycles", "cycle_estimate"))


def test_custom_calls_that_are_not_known_are_named():
    body = '%x, %x), kind=kOutput, calls=%matmul, backend_config={"estimated_cycles":"1500"}'
    assert body in TEXT
    line = played(TEXT.replace(f"fusion({body}", 'custom-call(%x), custom_call_target="Sort"'))
    assert line.unknown == {"the work of custom calls of Sort (their memory traffic is counted)"}


SLICES = """HloModule step, is_scheduled=true

ENTRY %main (arg: f32[1000000]) -> f32[1000000] {
  %arg = f32[1000000]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[1000000]{0}, u32[], token[]) send(%arg, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[1000000]{0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2
  %received = (f32[1000000]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = f32[1000000]{0} get-tuple-element(%received), index=0
}
"""  # noqa: E501


def test_what_travels_between_slices_takes_their_network():
    """TPU programs write the part of a sum that crosses slices as a send and a receipt by the host."""
    mesh = torus((4, 4), slices=2)
    mesh.shape = {"data": 2, "fsdp": 16}
    line = Player(Program(SLICES), mesh, Network(parse("v5e:4x4", slices=2), mesh)).play()
    ((key, found),) = line.traffic.items()
    assert key == ("all-reduce", ("data",)) and found.dcn and found.count == 1
    assert found.bytes == 4e6  # twice half of what each has
    assert line.waiting == found.seconds == pytest.approx(4e6 / (2.5e10 / 4))
    with pytest.raises(ValueError, match="does not say what it sends between slices"):
        Player(
            Program(SLICES.replace("megascale", "kiloscale")), mesh, Network(parse("v5e:4x4", slices=2), mesh)
        ).play()


KERNELS = """HloModule step, is_scheduled=true

ENTRY %main (q: bf16[2,8,896,256], k: bf16[2,896,256]) -> bf16[2,8,896,256] {
  %q = bf16[2,8,896,256]{3,2,1,0} parameter(0)
  %k = bf16[2,896,256]{2,1,0} parameter(1)
  %splash_mqa_dkv_segmented_no_residuals.1 = (bf16[2,896,256]{2,1,0}, bf16[2,896,256]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  %small = bf16[8,128]{1,0} constant({...})
  %mine.2 = bf16[8,128]{1,0} custom-call(%small), custom_call_target="tpu_custom_call"
  ROOT %splash_mqa_fwd_segmented_residuals.1 = bf16[2,8,896,256]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_attention_kernels_take_their_products_where_those_are_longer_than_their_traffic():
    mesh = mesh_of(data=2, fsdp=4)
    line = Player(Program(KERNELS), mesh, Network(parse("v5e:2x4"), mesh)).play()
    one = 2 * 2 * 8 * 896 * 896 * 256  # one product of queries and keys, over batch and heads
    traffic = 2 * 8 * 128 * 2 / V5E.hbm_bandwidth  # of a kernel whose work nobody knows
    assert line.kernel == pytest.approx((2 + 4) * one / V5E.flops + traffic)
    assert line.kernels == 3 and line.unknown == {
        "FLOPs of the kernel mine.2 (its memory traffic is counted)"
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_replica_groups(text, expected):
    assert groups(text, 8).tolist() == expected


def test_groups_of_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        groups("spiral(8)", 8)
    program = Program(TEXT.replace("[2,4]<=[8]", "spiral"))
    mesh = mesh_of(data=2, fsdp=4)
    with pytest.raises(ValueError, match="unknown form"):
        collective(program.by_name("body")["gather-start"], mesh, 1.0)


def torus(sides, slices=1, chips_per_host=4):
    """The devices of a whole pod and a mesh of one axis over them."""
    places = [(s, *p, 0) for s in range(slices) for p in np.ndindex(*sides)]
    devices = np.array(
        [
            SimpleNamespace(coords=p[1:4], slice_index=p[0], process_index=i // chips_per_host)
            for i, p in enumerate(places)
        ]
    )
    return SimpleNamespace(shape={"fsdp": len(devices)}, devices=devices)


def test_times_on_the_torus():
    """The scaling book's rules: gathering V takes V / (2 link) on a ring, twice that on a line, half over two sides."""
    topology, v = parse("v5e:16x16"), 1e9
    network = Network(topology, torus((16, 16)))

    def seconds(kind, group):
        return network.seconds(Collective(kind, ("fsdp",), tuple(group), v))

    row, every, four = range(16), range(256), range(4)
    assert seconds("all-gather", row) == pytest.approx(v / 9e10)
    assert seconds("all-gather", every) == pytest.approx(v / 18e10)
    assert seconds("all-gather", four) == pytest.approx(v / 4.5e10)
    assert seconds("all-to-all", row) == pytest.approx(4 * v / 9e10)  # each byte goes 4 links on average
    assert seconds("collective-permute", (0, 1)) == pytest.approx(v / 4.5e10)
    assert network.seconds(Collective("all-gather", ("fsdp",), tuple(row), 1.0)) == pytest.approx(
        8e-6
    )  # hops


def test_slices_meet_over_the_hosts_network_cards():
    network = Network(parse("v5e:16x16", slices=2), torus((16, 16), slices=2))
    between = Collective("all-reduce", ("data",), (0, 256), 1e9)
    assert network.crosses(between)
    assert network.seconds(between) == pytest.approx(1e9 / (2.5e10 / 4))
    everywhere = Collective("all-reduce", ("data",), tuple(range(512)), 1e9)
    assert network.seconds(everywhere) == pytest.approx(1e9 / 18e10 + 1e9 / 256 / (2.5e10 / 4))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is not CHIP:SIDExSIDE"),
        ("v9:4x4", "no figures for chip 'v9'; there are v5e, v5p, v6e"),
        ("v5p:4x4", "torus of 3 dimensions, e.g. v5p:4x4x4"),
    ],
)
def test_topologies_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)
    with pytest.raises(ValueError, match="slices=0"):
        parse("v5e:4x4", 0)
    assert dataclasses.replace(parse("v5e:4x4"), slices=3).chips == 48
