"""Adding probes to a store that was filled with fewer.

A probe's signs are a function of its index, so the first probes of a larger number are those of the
smaller one, and only the others have to be computed. The result goes into a store of its own beside
the old one, which stays as it was until the new one is complete; then they change places. Every
promise about interrupted runs holds for the new store, because it is a store like any other.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from daskcurv.config import Identity
from daskcurv.errors import StoreError, StoreWriteError
from daskcurv.experiment.identity import Recorded, lacks_probes_only
from daskcurv.places import followed
from daskcurv.storage import ResultsStore
from daskcurv.storage.lock import LauncherLock, beside

log = logging.getLogger(__name__)


def recover(path: Path) -> None:
    """Put the old store back if a launcher was killed just as the two changed places."""
    previous = _previous(path)
    if previous.exists() and not path.exists():
        os.rename(previous, followed(path))


def smaller_store(
    path: Path, identity: Identity, lock: LauncherLock | None = None
) -> ResultsStore | None:
    """Return the store at `path` if it only lacks probes, else None."""
    if not path.exists():
        return None
    store = ResultsStore.open(path, lock=lock)
    return store if lacks_probes_only(store.identity, identity) else None


def probes_of(store: ResultsStore) -> int:
    """Return how many probes the results of a store are means over."""
    estimator = Recorded.of(store.identity).estimator
    return estimator.n_probes if estimator else 0


def larger_store(base: ResultsStore, n_probes: int, epochs: Iterable[int]) -> Path:
    """Return where the store with more probes is to be made.

    Raises
    ------
    StoreError
        If it would lack epochs that the old one has.
    """
    if lost := sorted(base.rows.keys() - set(epochs)):
        raise StoreError(
            f"results store {base.path} has epochs {', '.join(map(str, lost))}, which this launch "
            f"does not include; to raise n_probes to {n_probes}, include all epochs of the store"
        )
    path = beside(base.path, f".{n_probes}-probes")
    log.info(
        "adding probes %d to %d to each sample of %s, in %s until all are computed",
        probes_of(base) + 1,
        n_probes,
        base.path,
        path.name,
    )
    return path


def change_places(path: Path, larger: Path, lock: LauncherLock) -> None:
    """Put the complete larger store in the place of the old one, and remove that.

    Links to the old one lead to the larger one then.
    """
    lock.check()
    place, previous = followed(path), _previous(path)
    for store in (place, larger):
        lock.uncover(store)
    try:
        os.rename(place, previous)
        os.rename(larger, place)
        lock.cover(place)
        shutil.rmtree(previous)
    except OSError as error:
        raise StoreWriteError(
            f"cannot replace {path} with {larger}: {error.strerror}. Both are complete; run "
            "the same command again"
        ) from error
    log.info("%s now has the added probes", path)


def _previous(path: Path) -> Path:
    return beside(path, ".fewer-probes")
