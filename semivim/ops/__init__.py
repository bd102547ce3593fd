"""The selective scan, its causal convolution and RMS norm, on every device.

`scan`, `causal_conv` and `rms_norm` are in the modules of their names, such as `semivim.ops.scan`.
"""

from .backends import BackendState as BackendState
from .backends import available_backends as available_backends
from .backends import use_backend as use_backend
from .scan import selective_scan as selective_scan
from .scan_reference import Direction as Direction
