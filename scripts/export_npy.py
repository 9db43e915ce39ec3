"""Export a results store as npy files; see ``--help``."""

from __future__ import annotations

import sys

from daskcurv.cli import main

if __name__ == "__main__":
    sys.exit(main(["export_npy", *sys.argv[1:]]))
