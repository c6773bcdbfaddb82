"""Flax NNX modules, one method or section of a paper each."""

from ssm_jax.layers.aggregation import Aggregation as Aggregation
from ssm_jax.layers.aggregation import Stage as Stage
from ssm_jax.layers.mrla import MRLABase as MRLABase
from ssm_jax.layers.mrla import MRLALight as MRLALight
from ssm_jax.layers.rla import RLA as RLA
from ssm_jax.layers.s4nd import S4ND as S4ND
from ssm_jax.layers.s6la import S6LAConv as S6LAConv
from ssm_jax.layers.s6la_token import S6LAToken as S6LAToken
from ssm_jax.layers.ssm_kernel import DPLRKernel as DPLRKernel
from ssm_jax.layers.ssm_kernel import S4DKernel as S4DKernel
from ssm_jax.layers.ssm_kernel import SSMParam as SSMParam
