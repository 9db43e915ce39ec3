"""``python -m daskcurv`` is the ``daskcurv`` command."""

from __future__ import annotations

import sys

from daskcurv.cli import main

if __name__ == "__main__":
    sys.exit(main())
