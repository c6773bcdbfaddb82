"""State space models for vision in JAX and Flax: S4ND layers, and the networks of both papers."""

from ssm_jax.layers import S4ND as S4ND
from ssm_jax.models import create_model as create_model
from ssm_jax.models import list_models as list_models
from ssm_jax.summary import summary as summary
from ssm_jax.version import __version__ as __version__
