"""Reading programs: those that XLA makes here for eight devices, and lines as its compiler for TPUs writes them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.compiled import Collective, collectives, memory, open_loops, scheduled_cycles
from ssm_jax.training.sharding import make_mesh

N = 8


def program(mesh, fn, *arguments, in_specs, out_specs):
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile().as_text() or ""


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ring(axis_size):
    return [(i, (i + 1) % axis_size) for i in range(axis_size)]


@pytest.mark.parametrize(
    ("fn", "out_specs", "kind", "size", "devices", "sent"),
    [
        # What goes in is (1, 40) of (8, 40), 160 bytes on each device.
        (lambda x: jax.lax.psum(x, "data"), P(), "all-reduce", 160, N, 2 * 160 * 7 / 8),
        (lambda x: jax.lax.all_gather(x, "data"), P(), "all-gather", N * 160, N, N * 160 * 7 / 8),
        (
            lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
            P("data"),
            "reduce-scatter",
            160,
            N,
            160 * 7 / 8,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "data", split_axis=1, concat_axis=0, tiled=True),
            P("data"),
            "all-to-all",
            160,
            N,
            160 * 7 / 8,
        ),
        (lambda x: jax.lax.ppermute(x, "data", ring(N)), P("data"), "collective-permute", 160, None, 160),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute"],
)
def test_collectives_are_found_with_their_bytes(mesh, fn, out_specs, kind, size, devices, sent):
    text = program(mesh, fn, floats(N, 40), in_specs=P("data"), out_specs=out_specs)
    (found,) = collectives(text)
    assert found[:4] == (kind, size, devices, 1)
    assert found.sent == pytest.approx(sent)


def test_collectives_tell_where_they_are_from(mesh):
    def fn(x):
        with jax.named_scope("here"):
            return jax.lax.psum(x, "data")

    (found,) = collectives(program(mesh, fn, floats(N, 3), in_specs=P("data"), out_specs=P()))
    assert "here" in found.op_name


def test_a_part_of_the_mesh_is_its_group():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    for axes, size in (("data", 2), ("fsdp", 4), (("data", "fsdp"), 8)):
        (found,) = collectives(
            program(mesh, lambda x, axes=axes: jax.lax.psum(x, axes), floats(3), in_specs=P(), out_specs=P())
        )
        assert found.devices == size


def test_collectives_in_loops_run_as_often_as_these(mesh):
    def fn(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "data")), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, length=5)[0]
            return jax.lax.ppermute(x, "data", ring(N)), None

        return jax.lax.scan(outer, x, length=3)[0]

    text = program(mesh, fn, floats(N, 7), in_specs=P("data"), out_specs=P("data"))
    counts = {found.kind: found.count for found in collectives(text)}
    assert counts == {"all-reduce": 15, "collective-permute": 3}


def test_of_a_loop_of_unknown_length_the_count_is_unknown(mesh):
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "data"), x)

    text = program(mesh, fn, floats(N, 7), in_specs=P("data"), out_specs=P("data"))
    assert all(math.isnan(found.count) for found in collectives(text))
    assert collectives(text)


def test_branches_are_looked_into(mesh):
    def fn(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "data"), lambda x: x, x)

    text = program(mesh, fn, floats(N, 7), in_specs=P("data"), out_specs=P("data"))
    assert [found.kind for found in collectives(text)] == ["all-reduce"]


def test_programs_without_exchange_have_none(mesh):
    text = program(mesh, jnp.sin, floats(N, 7), in_specs=P("data"), out_specs=P("data"))
    assert collectives(text) == ()


def test_memory_is_that_of_one_device(mesh):
    divided = NamedSharding(mesh, P("data"))

    def step(state, batch):
        return state + batch.sum(0), batch[:, :5]

    compiled = (
        jax.jit(step, donate_argnums=0, out_shardings=(NamedSharding(mesh, P()), divided))
        .lower(floats(100), jax.ShapeDtypeStruct((N, 100), jnp.float32, sharding=divided))
        .compile()
    )
    taken = memory(compiled)
    assert taken.arguments == 400 + 400
    assert taken.donated == 400
    assert taken.results - taken.donated - 20 in range(64)  # a tuple's pointers
    assert taken.total == taken.arguments + taken.results - taken.donated + taken.temporary + taken.code


ON_TPU = """\
HloModule jit_step, is_scheduled=true

%add.clone (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %a = bf16[]{:T(256)} add(%x, %y)
}

%async_start (param_0: bf16[32,16]) -> (bf16[32,16], bf16[128,16], s32[2]) {
  %all-gather.31 = bf16[128,16]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=6, replica_groups=mesh['axis_0'=4,\
'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}, dimensions={0}, use_global_device_ids=true, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/gather"}, backend_config={"flag_configs":[],\
"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (bf16[32,16]{1,0}, bf16[128,16]{1,0}, s32[2]{0:S(4)}) custom-call(%all-gather.31), \
custom_call_target="AsyncCollectiveStart"
}

%async_step (param_1: bf16[32,16]) -> bf16[8,8] {
  %all-gather.33 = bf16[128,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_1), channel_id=6, replica_groups=mesh['axis_0'\
=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(step)/gather"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %convolution.1 = bf16[8,8]{1,0} convolution(%p, %p)
}

%all-reduce-scatter.1 (input: bf16[128,16]) -> bf16[32,16] {
  %input = bf16[128,16]{1,0} parameter(0)
  %all-reduce.9 = bf16[128,16]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}\
}, use_global_device_ids=true, to_apply=%add.clone
  ROOT %dynamic-slice.1 = bf16[32,16]{1,0} dynamic-slice(%all-reduce.9, %i, %z), dynamic_slice_sizes={32,16}
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %collective-permute-start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice), \
channel_id=1, source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/halo"}
  %c = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"20"}
  %collective-permute-done = f32[8]{0} collective-permute-done(%collective-permute-start)
  ROOT %t = (s32[], f32[8]) tuple(%i, %collective-permute-done)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

ENTRY %main.1 (u: f32[8]) -> f32[8] {
  %fusion.1 = (bf16[32,16]{1,0}, bf16[128,16]{1,0}, s32[2]{0:S(4)}) fusion(%u), kind=kCustom, calls=%async_start
  %fusion.2 = bf16[8,8]{1,0} fusion(%u), kind=kOutput, calls=%async_step, backend_config={"estimated_cycles":"1000"}
  %fusion.3 = bf16[32,16]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name=\
"jit(step)/transpose"}
  %all-reduce.3 = (f32[4,2]{1,0}, /*index=1*/bf16[3]{0:T(256)}) all-reduce(%a, %b), channel_id=9, replica_groups=[2,8]\
<=[16], to_apply=%add.clone, metadata={op_name="jit(step)/all-reduce(loss)"}
  %get-tuple-element.4 = f32[4,2]{1,0} get-tuple-element(%all-reduce.3), index=0
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  ROOT %e = f32[8]{0} copy(%d), backend_config={"estimated_cycles":"4000"}
}
"""


def test_programs_of_tpus_are_read_as_they_run():
    assert collectives(ON_TPU) == (
        Collective("all-gather", 128 * 16 * 2, 4, 1, "jit(step)/gather"),  # in two fusions
        Collective("reduce-scatter", 128 * 16 * 2, 4, 1, "jit(step)/transpose"),
        Collective("all-reduce", 4 * 2 * 4 + 3 * 2, 8, 1, "jit(step)/all-reduce(loss)"),
        Collective("collective-permute", 8 * 4, None, 5, "jit(step)/halo"),
    )


def test_cycles_are_those_that_run():
    assert scheduled_cycles(ON_TPU) == 1000 + 4000 + 5 * 20


def test_the_length_of_a_loop_is_what_its_line_says():
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    text = ON_TPU.replace("body=%body", f"body=%body{known}")
    assert scheduled_cycles(text) == 1000 + 4000 + 3 * 20


@pytest.mark.parametrize(
    "line", ["%five = s32[] parameter(0)", "%one = s32[] constant(1)\n  %five = s32[] constant(5)"]
)
def test_cycles_of_a_loop_of_unknown_length_are_unknown(line):
    endless = ON_TPU.replace("%five = s32[]{:T(128)} constant(5)", line)
    assert (open_loops(ON_TPU), open_loops(endless)) == (0, 1)
    once = ON_TPU.replace("%five = s32[]{:T(128)} constant(5)", "%five = s32[]{:T(128)} constant(1)")
    assert scheduled_cycles(endless) == scheduled_cycles(once) < scheduled_cycles(ON_TPU)
