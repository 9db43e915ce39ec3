"""The results store: creating, filling and exporting it; `daskcurv.storage.read` is for queries.

Imported as ``daskcurv.storage``. Nothing in it needs torch or a Dask cluster.
"""

from __future__ import annotations

from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.npy.write import export_epoch, export_epochs
from daskcurv.storage.working import ResultsStore

__all__ = ["ResultsStore", "export_epoch", "export_epochs", "launcher_lock"]
