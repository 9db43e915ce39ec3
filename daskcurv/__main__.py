"""``python -m daskcurv`` is the ``daskcurv`` command."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

# Python searches the working directory first, where libraries would take any directory that is
# called like an optional package of theirs (sparse, jax) for that package.
# It may have been removed while the shell was in it.
with contextlib.suppress(FileNotFoundError):
    if Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

from daskcurv.cli import main

if __name__ == "__main__":
    sys.exit(main())
