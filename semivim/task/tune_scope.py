"""Which parameters a run trains."""

import re

from torch import nn

from semivim.utils.user_error import UserError

TUNE_SCOPES = ("all", "ssm", "head")
# parameters of a selective scan: A, D, and the projections that give B, C and the step sizes, of every direction
_SCAN = re.compile(r"\.(A_(b_)?logs?|D|D_b|Ds|x_proj\w*|dt_proj\w*)(\.|$)")
_CLASS_TOKEN = "cls_token"


def limit_training(model: nn.Module, scope: str) -> None:
    """Take parameters outside a scope out of training, in place (``requires_grad = False``).

    Args:
        model: A timm model.
        scope: ``all``; ``ssm``, the scans, the class token and the head; or ``head`` alone.

    Raises:
        UserError: For ``ssm`` where the model has no scan.

    Source: Semi-ViM section 4.3, whose second stage updates the forward and backward SSMs and the class token.
    """
    if scope == "all":
        return
    head = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    scans = {name for name, _ in model.named_parameters() if _SCAN.search(name)}
    if scope == "ssm" and not scans:
        raise UserError(f"--tune-scope ssm trains scans, and {type(model).__name__} has none: name all or head")
    for name, parameter in model.named_parameters():
        in_scope = scope == "ssm" and (name in scans or name == _CLASS_TOKEN)
        parameter.requires_grad_(in_scope or id(parameter) in head)
