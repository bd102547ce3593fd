"""The selective scan and its causal convolution, on every device."""

from .backends import available_backends as available_backends
from .backends import use_backend as use_backend
from .causal_conv import bidirectional_conv as bidirectional_conv
from .scan import bidirectional_scan as bidirectional_scan
from .scan import selective_scan as selective_scan
