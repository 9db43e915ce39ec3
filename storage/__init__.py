"""The results store: creating, filling, querying and exporting it.

Imported as ``daskcurv.storage``. Nothing in it needs torch or a Dask cluster.
"""

from __future__ import annotations

from daskcurv.storage.attributes import identity_of
from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.npy.write import export_epoch, export_epochs
from daskcurv.storage.read import open_results
from daskcurv.storage.working import ResultsStore

__all__ = [
    "ResultsStore",
    "export_epoch",
    "export_epochs",
    "launcher_lock",
    "open_results",
    "identity_of",
]
