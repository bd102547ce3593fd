"""Tests of kernels whose package a platform may lack."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*_triton.py"]
