"""Where workers come from."""

from __future__ import annotations

from daskcurv.clusters.local import local_cluster

__all__ = ["local_cluster"]
