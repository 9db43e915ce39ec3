"""A run from Python, on workers of the caller's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from daskcurv.clusters.options import ClusterOptions
from daskcurv.errors import ClusterError, DaskcurvError
from daskcurv.experiment.experiment import Experiment
from daskcurv.runs.inputs import selected
from daskcurv.runs.launch import launch_experiment
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage.read import open_results

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client


def compute(
    experiment: Experiment,
    store: Path | str,
    client: Client | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    block_size: int | None = None,
    export_to: Path | str | None = None,
) -> xr.Dataset:
    """Compute what a results store lacks of an experiment, and open the store.

    If it is interrupted, the same call continues it.

    Parameters
    ----------
    experiment : Experiment
    store : Path or str
        Created if it does not exist; on a file system that the workers share.
    client : distributed.Client, optional
        Of a cluster whose workers have one thread each. By default workers are started on this
        machine, as a launch does.
    device : {"auto", "cuda", "cpu"}
        What workers compute on; with ``"auto"``, GPUs if every worker has one.
    workers : int, optional
        Without `client`: number of worker processes.
    batch_size, block_size : int, optional
        As of a launch.
    export_to : Path or str, optional
        Directory for finished epochs as npy files.

    Returns
    -------
    xarray.Dataset
        The results; see `daskcurv.open_results`.

    Raises
    ------
    DaskcurvError
        If an input cannot be used, or not all blocks could be computed.
    """
    if client is None:
        cluster = ClusterOptions(device=device, workers=workers)
    else:
        if workers is not None:
            raise ClusterError("workers is for workers on this machine; leave it out with a client")
        if device == "auto":
            device = "cuda" if all(client.run(torch.cuda.is_available).values()) else "cpu"
        address = client.scheduler_info()["address"]
        cluster = ClusterOptions(cluster="connect", scheduler=address, device=device)
    options = LaunchOptions(
        store=Path(store),
        export=export_to is not None,
        save_base_dir=Path(export_to or LaunchOptions.save_base_dir),
        batch_size=batch_size,
        block_size=block_size,
        cluster=cluster,
        estimator=experiment.estimator,
    )
    experiment = replace(experiment, estimator=selected(options)[0])
    outcome = launch_experiment(experiment, options, client=client)
    if not outcome.complete:
        raise DaskcurvError(
            f"not all of {store} could be computed: {outcome.state}; call it again to try the rest"
        )
    return open_results(Path(store))
