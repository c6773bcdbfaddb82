import jax

from ssm_jax.ops.backend import target_backend, traced_for
from ssm_jax.ops.conv import choose


def test_programs_are_for_the_backend_in_use_unless_said_otherwise():
    assert target_backend() == jax.default_backend() == "cpu"
    with traced_for("tpu"):
        assert target_backend() == "tpu"
        assert choose(196) == choose(196, "tpu") != choose(196, "cpu")
    assert target_backend() == "cpu"


def test_a_program_that_was_traced_for_another_backend_is_not_used_again():
    compiled = jax.jit(jax.checkpoint(lambda x: x + (1 if target_backend() == "cpu" else 2)))
    for _ in range(2):
        assert compiled(0.0) == 1.0
        with traced_for("tpu"):
            assert compiled(0.0) == 2.0
