"""``python -m lightning_plugins``: the command ``lightning-plugins``."""

from __future__ import annotations

import sys

from lightning_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
