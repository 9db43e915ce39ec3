"""Compute the curvature of every sample at every epoch; see ``--help``."""

from __future__ import annotations

import sys

from daskcurv.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
