"""Vision models of state-space blocks, registered in timm."""

import timm

from semivim.models.dyvm import DyVM as DyVM
from semivim.models.vim import Vim as Vim
from semivim.models.vmamba import VMamba as VMamba


def list_models() -> list[str]:
    """Names of the models of this package, those for tests included, as ``timm.create_model`` takes them."""
    names = timm.list_models()
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith(f"{__name__}.")]
