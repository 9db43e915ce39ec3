"""Old results in: a tree of npy files becomes a results store.

What the tree does not have (the loss, say) is NaN in the store, `split` is 0 throughout, and the
identity says that the results were imported. The text of each ``metadata.json`` is kept, so that
the export of an import is the tree again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.atomic import discard_drafts, whole_directory
from daskcurv.config import check_positive
from daskcurv.errors import StoreError
from daskcurv.places import check_writable
from daskcurv.storage.group import consolidate, writing
from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.npy.layout import IMPORTED_METADATA, batch_factors
from daskcurv.storage.npy.read import EpochFiles, Tree, read_tree, read_values
from daskcurv.storage.work import do_all, processes_for
from daskcurv.storage.working import ResultsStore

log = logging.getLogger(__name__)

_EPOCHS_AT_ONCE = 32


def import_tree(tree_path: Path, path: Path, multiply_by: int = 1) -> ResultsStore:
    """Make a results store of a tree of npy files.

    Parameters
    ----------
    tree_path : Path
        Holds ``epoch_…`` directories as `daskcurv.storage.npy.layout` says, with all samples
        or (``per_image_sample_ids.npy``) active ones only.
    path : Path
        Of the store; must not exist.
    multiply_by : int
        The batch size that gradients were divided by, to be multiplied by it; squares are
        multiplied by its square.

    Returns
    -------
    ResultsStore

    Raises
    ------
    DataError
        If the tree is not as documented.
    StoreError
        If `path` exists or cannot be written.
    """
    check_positive(multiply_by=multiply_by)
    if path.exists():
        raise StoreError(f"{path} exists; name another path for the results store")
    check_writable(path, directory=True, parents=True)
    tree = read_tree(tree_path)
    if multiply_by & (multiply_by - 1):
        log.warning(
            "%d is no power of two: exports can differ from %s in the last bit",
            multiply_by,
            tree_path,
        )
    with writing(f"results store {path}"):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with launcher_lock(path) as lock, writing(f"results store {path}"):
        discard_drafts(path)
        with whole_directory(path.absolute()) as building:
            building.rmdir()  # in its place comes the store
            store = _create(building, tree, multiply_by)
            starts = range(0, len(tree.epochs), _EPOCHS_AT_ONCE)
            parts = [tree.epochs[start : start + _EPOCHS_AT_ONCE] for start in starts]
            pieces = [(building, replace(tree, epochs=part), multiply_by) for part in parts]
            do_all(_fill, pieces, description="importing", at_once=processes_for(store))
            lock.check()
    return ResultsStore.open(path)


def _create(path: Path, tree: Tree, multiply_by: int) -> ResultsStore:
    order = tree.order
    position = np.argsort(order)
    known = tree.labels >= 0
    digest = hashlib.sha256("".join(files.text for files in tree.epochs).encode()).hexdigest()
    store = ResultsStore.create(
        path,
        identity={
            # Over how many probes the means are, the tree does not say.
            "estimator": {"method": "imported", "n_probes": 1},
            "classes": {"order": order},
            "imported": {"metadata_sha256": digest, "multiplied_by": multiply_by},
        },
        samples={
            "sample": np.arange(len(known)),
            "label": tree.labels,
            "split": np.zeros(len(known)),
            "class_position": np.where(known, position[tree.labels], -1),
            "first_epoch_active": tree.first_active,
        },
        epochs=_epoch_columns(tree.epochs),
        attrs={
            "title": "curvature of the loss around training samples, imported",
            "imported": {
                "inactive": tree.inactive,
                "divided_by": multiply_by,
                "extras": list(tree.extras),
            },
        },
    )
    texts = np.array([files.text for files in tree.epochs], dtype=object)
    store.add_array(IMPORTED_METADATA, texts, "text of the metadata.json that was imported")
    consolidate(path)
    return ResultsStore.open(path)


def _epoch_columns(epochs: Sequence[EpochFiles]) -> dict[str, list[Any]]:
    sizes = [len(files.classes) for files in epochs]
    tasks = np.cumsum(np.diff(sizes, prepend=sizes[0]) > 0).tolist()

    def noted(name: str, kind: type, default: Any) -> list[Any]:
        found = [files.metadata.get(name) for files in epochs]
        return [value if type(value) is kind else default for value in found]

    return {
        "epoch": [files.epoch for files in epochs],
        "task": tasks,
        "num_active_classes": sizes,
        "checkpoint": noted("checkpoint", str, ""),
        "checkpoint_sha256": noted("checkpoint_sha256", str, ""),
        "checkpoint_size": [-1] * len(epochs),
        "checkpoint_mtime_ns": [-1] * len(epochs),
        "complete": [True] * len(epochs),
        "compute_seconds": noted("compute_time_seconds", float, 0.0),
        "num_workers": noted("num_gpus", int, 0),
        "method": noted("method", str, "imported"),
    }


def _fill(path: Path, tree: Tree, multiply_by: int) -> None:
    """Write the blocks of a tree's epochs."""
    store = ResultsStore.open(path)
    for files in tree.epochs:
        found = read_values(tree, files)
        factors = batch_factors(store.measures, multiply_by)
        values: dict[str, NDArray[Any]] = {
            variable.name: np.full(store.num_samples, variable.fill, variable.dtype)
            for variable in store.measured
        }
        for name, column in found.items():
            values[name] = column * factors[name] if name in factors else column
        for block in range(store.num_blocks):
            part = slice(*store.bounds(block))
            store.write_block(
                store.rows[files.epoch], block, {name: values[name][part] for name in values}
            )
