"""Weights from elsewhere and for elsewhere: layers and networks of PyTorch programs, as ours."""

from ssm_jax.pretrained.inflate import inflate as inflate
from ssm_jax.pretrained.load import load_torch as load_torch
from ssm_jax.pretrained.s4nd import isotropic_from_torch as isotropic_from_torch
from ssm_jax.pretrained.s4nd import s4nd_from_torch as s4nd_from_torch
from ssm_jax.pretrained.save import save_safetensors as save_safetensors
