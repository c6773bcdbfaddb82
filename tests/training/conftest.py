"""A network small enough to compile in a second, and everything needed to train it."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ssm_jax.data.resolution import normalize, resample
from ssm_jax.models import create_model
from ssm_jax.training.optimizer import make_optimizer, param_groups
from ssm_jax.training.schedules import learning_rate
from ssm_jax.training.sharding import batch_sharding, put_batch, replicated, state_shardings
from ssm_jax.training.steps import TrainState, init_state, make_eval_step, make_train_step
from ssm_jax.training.tasks import Classification, loss_of_logits, rows_of_logits

FAST = {"xla_backend_optimization_level": 0}
"""Halves the time to compile; what devices exchange is decided before."""


def optax_promotion():
    """Lets integers meet floats, as optax relies on in `1 - decay**count`; the project's code does without."""
    return jax.numpy_dtype_promotion("standard")


@functools.cache
def _initial(network, width):
    """Parameters and other variables; compiled once for all tests, as that takes seconds."""
    model = Tiny(network=network, width=width).model
    return jax.device_get(jax.jit(lambda: nnx.split(model(), nnx.Param, ...)[1:])())


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """Training of a tiny network on random 8 x 8 images, on `mesh` or, without one, on one device."""

    width: int = 8
    dropout: float = 0.0
    dtype: Any = None
    label_smoothing: float = 0.0
    optimizer: optax.GradientTransformation | None = None
    ema: Any = 0.0
    accumulate: int = 1
    seed: int = 0
    mesh: jax.sharding.Mesh | None = None
    network: Any = None

    def model(self):
        if self.network is not None:
            return self.network(nnx.Rngs(0))
        return create_model(
            "isotropic_s4nd",
            num_classes=10,
            in_channels=1,
            d_model=self.width,
            n_layers=1,
            dropout=self.dropout,
            dtype=self.dtype,
            mixer={"d_state": 4},
            rngs=nnx.Rngs(0),
        )

    @functools.cached_property
    def abstract_model(self):
        return nnx.eval_shape(self.model)

    @functools.cached_property
    def tx(self):
        labels = param_groups(nnx.state(self.abstract_model, nnx.Param))
        tx = self.optimizer or make_optimizer(
            labels,
            lambda peak: learning_rate(peak, total_steps=100),
            lr=1e-2,
            ssm_lr=1e-3,
            weight_decay=0.05,
        )
        return optax.GradientTransformation(tx.init, optax_promotion()(tx.update))

    @property
    def task(self):
        return Classification(num_classes=10, label_smoothing=self.label_smoothing)

    def prepare(self, images):
        return resample(normalize(images, (0.3,), (0.4,)), 8)

    def augment(self, images, targets, key):
        """Nothing random, by default."""
        return self.prepare(images), targets

    def _init(self):
        return init_state(self.model(), self.tx, ema=bool(self.ema))

    @functools.cached_property
    def abstract_state(self):
        abstract = jax.eval_shape(self._init)
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            state_shardings(abstract, self.mesh),
        )

    @property
    def shardings(self):
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def context(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def init(self) -> TrainState:
        model = nnx.merge(nnx.graphdef(self.abstract_model), *_initial(self.network, self.width))
        return jax.device_put(init_state(model, self.tx, ema=bool(self.ema)), self.shardings)

    @functools.cached_property
    def jitted(self):
        graphdef = nnx.graphdef(self.abstract_model)
        step = make_train_step(
            graphdef,
            loss_of_logits(self.task, self.augment),
            self.tx,
            seed=self.seed,
            accumulate=self.accumulate,
            ema_decay=self.ema if callable(self.ema) else (lambda step: self.ema) if self.ema else None,
        )
        out_shardings = None if self.mesh is None else (self.shardings, replicated(self.mesh))
        return jax.jit(step, out_shardings=out_shardings, compiler_options=FAST)

    def step(self, state, batch):
        with self.context():
            return self.jitted(state, batch)

    @functools.cached_property
    def _eval(self):
        graphdef = nnx.graphdef(
            nnx.view(self.abstract_model, deterministic=True, use_running_average=True, raise_if_not_found=False)
        )
        return jax.jit(make_eval_step(graphdef, rows_of_logits(self.task, self.prepare)), compiler_options=FAST)

    def eval(self, params, rest, batch):
        with self.context():
            return self._eval(params, rest, batch)

    def logits(self, state, batch):
        return self.eval(state.params, state.rest, batch | {"mask": jnp.ones(len(batch["label"]), bool)})["logits"]

    def batch(self, seed=0, count=16):
        rng = np.random.default_rng(seed)
        batch = {
            "image": rng.integers(0, 256, (count, 8, 8, 1), np.uint8),
            "label": rng.integers(0, 10, count).astype(np.int32),
        }
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        return put_batch(batch, batch_sharding(self.mesh))

    def losses(self, count):
        """The losses of the first steps, each on a batch of its own."""
        state, losses = self.init(), []
        for seed in range(count):
            state, metrics = self.step(state, self.batch(seed))
            losses.append(float(metrics["loss"]))
        return losses


@pytest.fixture(scope="session")
def tiny():
    """The class `Tiny`, to be made with what a test needs."""
    return Tiny


def _assert_same(first, second, **tolerance):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture(scope="session")
def assert_same():
    """Compares two trees of arrays leaf by leaf, exactly or to a tolerance."""
    return _assert_same
