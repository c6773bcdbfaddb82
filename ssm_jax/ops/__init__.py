"""Pure functions on arrays: everything that the layers compute, usable from any JAX program."""

from ssm_jax.ops.batch_local import batch_local as batch_local
from ssm_jax.ops.conv import conv as conv
from ssm_jax.ops.discretize import discretize as discretize
from ssm_jax.ops.dplr import dplr_discretize as dplr_discretize
from ssm_jax.ops.dplr import dplr_kernel as dplr_kernel
from ssm_jax.ops.dplr import truncate as truncate
from ssm_jax.ops.kernel import bandlimit_mask as bandlimit_mask
from ssm_jax.ops.kernel import s4d_kernel as s4d_kernel
from ssm_jax.ops.kernel import vandermonde as vandermonde
from ssm_jax.ops.recurrence import Recurrence as Recurrence
from ssm_jax.ops.recurrence import dplr_recurrence as dplr_recurrence
from ssm_jax.ops.recurrence import recurrent_scan as recurrent_scan
from ssm_jax.ops.recurrence import recurrent_step as recurrent_step
from ssm_jax.ops.recurrence import s4d_recurrence as s4d_recurrence
from ssm_jax.ops.scan import linear_recurrence as linear_recurrence
from ssm_jax.ops.scan import selective_discretize as selective_discretize
from ssm_jax.ops.scan import selective_scan as selective_scan
from ssm_jax.ops.scan import selective_states as selective_states
from ssm_jax.ops.scan import selective_step as selective_step
from ssm_jax.ops.state_matrices import diagonalize as diagonalize
from ssm_jax.ops.state_matrices import hippo as hippo
from ssm_jax.ops.state_matrices import state_matrices as state_matrices
