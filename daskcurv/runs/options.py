"""What a launch can be asked for.

Imports nothing heavy, so that the command line starts at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from daskcurv.clusters.options import ClusterOptions
from daskcurv.config import HEADS, EstimatorConfig, check_positive
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.experiment.data.cifar import DIRECTORY

if TYPE_CHECKING:
    import torch

RESULTS = Path("results2/base_deep_learning_system")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of a launch; the fields are the options of the command line.

    Attributes
    ----------
    epochs : str, optional
        ``"all"`` or a comma-separated list; replaces `start_epoch`, `end_epoch` and `step`.
    start_epoch, end_epoch, step : int
        The epochs `start_epoch`, `start_epoch` + `step`, … up to and including `end_epoch`.
    data_path : Path
        CIFAR-100-format directory.
    download : bool
        Fetch CIFAR-100 if `data_path` does not have it.
    model_dir : Path
        Directory of the checkpoints.
    class_order : Path, optional
        By default ``class_order/index-{i}.npy`` beside `model_dir`. ``regenerate`` draws the order
        from `experiment_index`, whatever files there are.
    experiment_index : int
        The training run's index, in the names of its files.
    skip_missing : bool
        Skip epochs without a checkpoint.
    estimator : EstimatorConfig
    head : {"all", "active"}
        Outputs that take part in the loss.
    schedule : Schedule
    validation_per_class : int
        Samples of each class that the training run held out.
    store : Path
    save_base_dir : Path
        Directory for the export of finished epochs.
    export : bool
        Whether finished epochs are exported.
    batch_size, block_size : int, optional
    cluster : ClusterOptions
        Options of the cluster that runs the workers.
    dry_run : bool
        Check everything and print the plan, without computing.
    """

    epochs: str | None = None
    start_epoch: int = 0
    end_epoch: int = 4000
    step: int = 200
    data_path: Path = Path("data") / DIRECTORY
    download: bool = False
    model_dir: Path = RESULTS / "model_parameters"
    class_order: Path | None = None
    experiment_index: int = 0
    skip_missing: bool = False
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    head: str = "all"
    schedule: Schedule = field(default_factory=Schedule)
    validation_per_class: int = 50
    store: Path = RESULTS / "curvature.zarr"
    save_base_dir: Path = RESULTS / "per_image_curvature_full"
    export: bool = True
    batch_size: int | None = None
    block_size: int | None = None
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, block_size=self.block_size)
        if self.head not in HEADS:
            raise ConfigError(f"head is {self.head!r}; expected one of {HEADS}")
        if self.validation_per_class < 0:
            raise ConfigError(
                f"validation_per_class is {self.validation_per_class}; expected 0 or more"
            )

    @property
    def device(self) -> torch.device:
        """What workers compute on; this host need not have one."""
        import torch

        from daskcurv.clusters.local import visible_gpus

        if self.cluster.device != "auto":
            return torch.device(self.cluster.device)
        gpus = self.cluster.cluster != "local" or visible_gpus()
        return torch.device("cuda" if gpus else "cpu")


def parse_epochs(text: str) -> list[int]:
    """Parse a comma-separated list of epochs into a sorted list.

    Raises
    ------
    ConfigError
        Naming the item that is not a number, negative, or repeated.
    """
    epochs: list[int] = []
    for item in text.split(","):
        try:
            epoch = int(item)
        except ValueError:
            raise ConfigError(
                f"epochs has {item.strip()!r}; expected numbers like 0,500,1000"
            ) from None
        if epoch < 0:
            raise ConfigError(f"epochs has {epoch}; expected numbers from 0")
        if epoch in epochs:
            raise ConfigError(f"epochs has {epoch} twice; name each epoch once")
        epochs.append(epoch)
    return sorted(epochs)
