"""``python -m semivim`` is the command ``semivim``."""

from semivim.cli import main

main()
