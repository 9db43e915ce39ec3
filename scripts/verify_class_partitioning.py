"""Print which classes are active when, and check the class order; see ``--help``."""

from __future__ import annotations

import sys

from daskcurv.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify_class_partitioning", *sys.argv[1:]]))
