"""The selective scan and its causal convolution, on every device.

`scan` and `causal_conv` are in the modules of their names, `semivim.ops.scan` and `semivim.ops.causal_conv`.
"""

from .backends import BackendState as BackendState
from .backends import available_backends as available_backends
from .backends import use_backend as use_backend
from .scan import selective_scan as selective_scan
from .scan_reference import Direction as Direction
