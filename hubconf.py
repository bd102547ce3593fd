"""Entry points for `torch.hub`: every model of semivim, by the name timm knows it under.

`torch.hub.load("OWNER/REPO", "vim_tiny_patch16_224", pretrained=True, trust_repo=True)`, or with `source="local"` and
the path of a checkout. Keywords are those of `timm.create_model`.
"""

import timm as _timm

import semivim.models as _models  # registers them in timm

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numba"]

globals().update({_name: _timm.model_entrypoint(_name) for _name in _models.list_models()})
