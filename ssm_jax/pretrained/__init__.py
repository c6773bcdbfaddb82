"""Weights from elsewhere: layers and networks of other programs, as ours."""

from ssm_jax.pretrained.s4nd import isotropic_from_torch as isotropic_from_torch
from ssm_jax.pretrained.s4nd import s4nd_from_torch as s4nd_from_torch
