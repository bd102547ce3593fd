"""Run one of timm's own scripts with the models of this package: ``python -m semivim.timm_script validate.py ...``.

timm's train.py takes ``--device-modules semivim`` instead; validate.py, inference.py, benchmark.py and onnx_export.py
have no such flag. They are no part of the timm package: take them from the same release of its repository.
"""

import os
import runpy
import sys
from collections.abc import Sequence

import semivim  # noqa: F401  registers the models
from semivim.utils.user_error import UserError, did_you_mean_file, user_errors_end_the_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script as ``python SCRIPT ARGUMENTS`` would.

    Args:
        argv: The script and its arguments; None takes the command line's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with user_errors_end_the_program("python -m semivim.timm_script"):
        if not words or not os.path.isfile(words[0]):
            given = f"{words[0]}{did_you_mean_file(words[0])}" if words else "none"
            raise UserError(f"wanted the path of a script of timm and its arguments, got {given}")
    sys.argv[:] = words
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
