"""The names of timm's private modules that an external model needs, in one place."""

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._input import update_model_args as update_model_args
from timm.models._input import update_model_input_size as update_model_input_size
