"""MRLA: attention of a layer to the layers before it (Fang et al., 2023, arXiv:2302.03985)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage
from ssm_jax.layers.channel_attention import ECA
from ssm_jax.layers.conv import Depthwise, kaiming_normal
from ssm_jax.layers.drop_path import DropPath
from ssm_jax.layers.linear import uniform_init
from ssm_jax.layers.norm import BatchNorm, LayerNorm
from ssm_jax.ops.dtypes import at_least_float32


class MRLACell(nnx.Module):
    """What a block has for itself: its query, key and value, and the normalisation before or after."""

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None,
        residual: bool,
        decays: bool,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds them as the authors start them: for a residual network, or for a transformer."""
        self.before = None if residual else LayerNorm(channels, epsilon=1e-6, **dtypes, rngs=rngs)
        self.query = ECA(channels, kernel_size=kernel_size, **dtypes, rngs=rngs).conv
        self.key = ECA(channels, kernel_size=kernel_size, **dtypes, rngs=rngs).conv
        init = kaiming_normal if residual else uniform_init(9)
        self.value = Depthwise(channels, 3, use_bias=False, kernel_init=init, **dtypes, rngs=rngs)
        decay = jax.nn.initializers.normal(1.0)
        self.decay = nnx.Param(decay(rngs.params(), (channels,), dtypes["param_dtype"])) if decays else None
        self.after = BatchNorm(channels, **dtypes, rngs=rngs) if residual else None
        self.drop_path = DropPath()


class MRLA(Aggregation):
    """What both kinds have in common: a layer t has a query and a key for each head, and a value at every position.

        q_t, k_t = w_q * mean(X), w_k * mean(X)    convolutions along the channels, as in ECA, of the mean position
        v_t = W_v * X                              a depthwise 3 x 3 convolution
        X + BN(o_t)                                after a block of a ResNet; o_t is what t retrieves, see below
        X + o_t, with q, k, v of LN(X)             after the blocks of other networks

    X is the output of a block. A class token passes through. No layer remembers another stage.
    """

    head_dim: int
    decays: ClassVar[bool]

    def __init__(
        self,
        stage: Stage,
        *,
        head_dim: int | None = None,
        kernel_size: int | None = None,
        restart: int | None = None,
        drop_path: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what each block has for itself.

        Args:
            stage: the blocks.
            head_dim: channels of a head; None: the authors' 16, and 32 in MRLA-light of a ResNet.
            kernel_size: odd number of channels that decide on one of a query or key; None: as in `ECA`.
            restart: forget all after so many blocks; None: after 4 in a network with a class token, else never.
            drop_path: rate at which a block retrieves nothing, by example.
            dtype: dtype of convolutions.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, and for heads that do not divide the channels.
        """
        self.residual = all(hasattr(block, "residual") for block in stage.blocks)
        if head_dim is None:
            head_dim = 32 if self.residual and self.decays else 16
        if head_dim < 1 or stage.channels % head_dim:
            raise ValueError(f"head_dim must divide the stage's {stage.channels} channels, got {head_dim}.")
        if restart is not None and restart < 1:
            raise ValueError(f"restart must be at least 1, got {restart}.")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}.")
        self.head_dim, self.channels, self.prefix = head_dim, stage.channels, stage.prefix
        self.restart = 4 if restart is None and stage.prefix else restart
        self.drop_path = drop_path
        options: dict[str, Any] = {"kernel_size": kernel_size, "dtype": dtype, "param_dtype": param_dtype}
        self.cells = nnx.List(
            MRLACell(stage.channels, residual=self.residual, decays=self.decays, **options, rngs=rngs)
            for _ in stage.blocks
        )

    def __call__(
        self,
        block: Any,
        cell: Any,
        x: Float[Array, "b *axes c"],
        h: Any,
        drop_path: float | Array,
        *,
        size: tuple[int, int] | None = None,
        rngs: nnx.Rngs | None = None,
        **arguments: Any,
    ) -> tuple[Float[Array, "b *axes2 d"], Any]:
        """One layer: its output retrieves from those of the layers so far, itself among them."""
        y = block(x, drop_path, rngs=rngs, **arguments)
        o, h = self.retrieve(*self.project(cell, y[:, self.prefix :], size), cell, h)
        o = cell.drop_path(self.finish(cell, o.astype(y.dtype)), self.drop_path, rngs=rngs)
        return y + jnp.pad(o, [(0, 0), (self.prefix, 0), *[(0, 0)] * (y.ndim - 2)]), h

    def project(
        self, cell: Any, x: Float[Array, "b *axes c"], size: tuple[int, int] | None = None
    ) -> tuple[Float[Array, "b heads d"], Float[Array, "b heads d"], Float[Array, "b *axes c"]]:
        """Query, key and value of positions: those of a map, or a sequence that is a map of this `size`."""
        if x.ndim == 3 and size is None:
            raise ValueError("size must be given for a sequence of positions.")
        shape = x.shape[1:-1] if x.ndim > 3 else size
        if shape is None or len(shape) != 2:
            raise ValueError(f"x must be a map of height and width, got shape {x.shape}.")
        if cell.before is not None:
            x = cell.before(x)
        mean = x.mean(tuple(range(1, x.ndim - 1)))[..., None]
        precise = at_least_float32(x.dtype)
        query, key = (to(mean).astype(precise).reshape(x.shape[0], -1, self.head_dim) for to in (cell.query, cell.key))
        return query, key, cell.value(x.reshape(x.shape[0], *shape, -1)).reshape(x.shape)

    def retrieve(
        self,
        query: Float[Array, "b heads d"],
        key: Float[Array, "b heads d"],
        value: Float[Array, "b *axes c"],
        cell: Any,
        h: Any,
    ) -> tuple[Float[Array, "b *axes c"], Any]:
        """o_t, and the memory with layer t in it."""
        raise NotImplementedError

    def finish(self, cell: Any, o: Float[Array, "b *axes c"]) -> Float[Array, "b *axes c"]:
        """What is added to X."""
        return o if cell.after is None else cell.after(o)

    def _similarity(self, query: Array, key: Array) -> Array:
        """Of each head, q k / sqrt(d)."""
        return (query * key).sum(-1) * self.head_dim**-0.5

    def _spread(self, weights: Float[Array, "b heads"], ndim: int) -> Array:
        """A head's weight for each of its channels, at all positions."""
        by_channel = jnp.repeat(weights, self.head_dim, axis=-1)
        return by_channel.reshape(weights.shape[0], *(1,) * (ndim - 2), -1)


class MRLABase(MRLA):
    """MRLA-base, which remembers the key and the value of every layer of a stage:

        o_t = sum over s <= t of softmax_s(q_t k_s / sqrt(d)) v_s

    In a ResNet, X + ReLU(BN(o_t)). The memory grows from block to block, which no loop can carry.
    """

    loops = False
    decays = False

    def start(self, x: Float[Array, "b *axes c"], h: Any) -> tuple[()]:
        """Nothing."""
        del x, h
        return ()

    def retrieve(
        self,
        query: Float[Array, "b heads d"],
        key: Float[Array, "b heads d"],
        value: Float[Array, "b *axes c"],
        cell: Any,
        h: tuple[tuple[Array, Array], ...],
    ) -> tuple[Float[Array, "b *axes c"], tuple[tuple[Array, Array], ...]]:
        """o_t, and the pairs of keys and values so far."""
        del cell
        h = (*(() if len(h) == self.restart else h), (key, value))
        weights = jax.nn.softmax(jnp.stack([self._similarity(query, k) for k, _ in h]), axis=0)
        # A sum of maps as they lie in memory: a product would first put them into one array.
        o = sum(self._spread(w, v.ndim) * v.astype(w.dtype) for w, (_, v) in zip(weights, h, strict=True))
        return jnp.asarray(o), h

    def finish(self, cell: Any, o: Float[Array, "b *axes c"]) -> Float[Array, "b *axes c"]:
        """What is added to X."""
        return o if cell.after is None else nnx.relu(cell.after(o))


class MRLALight(MRLA):
    """MRLA-light, which remembers no more than what the layer before retrieved:

        o_t = sigmoid(q_t k_t / sqrt(d)) v_t + lambda_t o_{t-1}

    with a factor lambda for each channel of a layer: a linear recurrence over the layers. In networks other than
    ResNets, GELU(v_t).

    The authors' code has the block's input, through its shortcut, in place of o_{t-1}.
    """

    decays = True

    def start(self, x: Float[Array, "b *axes c"], h: Any) -> tuple[Float[Array, "b *axes2 d"], Array]:
        """Zero, and the number of blocks so far."""
        del h
        shape = (*x[:, self.prefix :].shape[:-1], self.channels)
        return jnp.zeros(shape, at_least_float32(x.dtype)), jnp.zeros((), jnp.int32)

    def retrieve(
        self,
        query: Float[Array, "b heads d"],
        key: Float[Array, "b heads d"],
        value: Float[Array, "b *axes c"],
        cell: Any,
        h: tuple[Array, Array],
    ) -> tuple[Float[Array, "b *axes c"], tuple[Array, Array]]:
        """o_t, which is also what is remembered, in float32."""
        o, blocks = h
        decay, new = self.coefficients(query, key, value, cell)
        if o.shape != new.shape:  # zero, of the size before a stage's first block
            o = jnp.zeros_like(new)
        if self.restart is not None:
            decay = jnp.where(blocks % self.restart == 0, jnp.zeros_like(decay), decay)
        o = decay * o + new
        return o, (o, blocks + 1)

    def coefficients(
        self,
        query: Float[Array, "b heads d"],
        key: Float[Array, "b heads d"],
        value: Float[Array, "b *axes c"],
        cell: Any,
    ) -> tuple[Float[Array, "*ones c"], Float[Array, "b *axes c"]]:
        """The factor and the term of o_t = lambda_t o_{t-1} + ..., in float32."""
        if not self.residual:
            value = jax.nn.gelu(value, approximate=False)
        gate = self._spread(jax.nn.sigmoid(self._similarity(query, key)), value.ndim)
        decay = cell.decay[...].astype(gate.dtype)
        return decay[(None,) * (value.ndim - 1)], gate * value.astype(gate.dtype)
