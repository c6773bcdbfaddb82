"""State space models for vision in JAX and Flax: S4ND layers and networks."""

from ssm_jax.layers import S4ND as S4ND
from ssm_jax.models import create_model as create_model
from ssm_jax.models import list_models as list_models

__version__ = "0.1.0"
