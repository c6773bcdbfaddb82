"""Pictures of runs and of what was learned; each function returns a matplotlib figure."""

from ssm_jax.plots.depth import by_layer as by_layer
from ssm_jax.plots.depth import contributions as contributions
from ssm_jax.plots.depth import read_maps as read_maps
from ssm_jax.plots.detections import Drawn as Drawn
from ssm_jax.plots.detections import detection_sheet as detection_sheet
from ssm_jax.plots.kernels import kernel_lines as kernel_lines
from ssm_jax.plots.kernels import kernel_sheet as kernel_sheet
from ssm_jax.plots.kernels import outer_products as outer_products
from ssm_jax.plots.kernels import spectra as spectra
from ssm_jax.plots.kernels import step_responses as step_responses
from ssm_jax.plots.runs import accuracy_by_resolution as accuracy_by_resolution
from ssm_jax.plots.runs import curves as curves
from ssm_jax.plots.runs import image_sheet as image_sheet
from ssm_jax.plots.runs import prediction_sheet as prediction_sheet
from ssm_jax.plots.runs import score_panels as score_panels
from ssm_jax.plots.runs import score_title as score_title
from ssm_jax.plots.runs import training_curves as training_curves
