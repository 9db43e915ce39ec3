"""The results store: creating, filling, querying and exporting it.

Imported as ``daskcurv.storage``. Nothing in it needs torch or a Dask cluster.
"""

from __future__ import annotations

from daskcurv.storage.attributes import identity_of
from daskcurv.storage.export import export_epoch, export_epochs
from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.query import open_results
from daskcurv.storage.store import ResultsStore

__all__ = [
    "ResultsStore",
    "export_epoch",
    "export_epochs",
    "launcher_lock",
    "open_results",
    "identity_of",
]
