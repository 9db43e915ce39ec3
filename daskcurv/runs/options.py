"""What a launch can be asked for.

Imports nothing heavy, so that the command line starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcurv.clusters.options import ClusterOptions, cluster_options
from daskcurv.config import HEADS, OUTPUTS, EstimatorConfig, check_positive
from daskcurv.declared import check_choices, documented, setting, settings_of
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.experiment.data.cifar import DIRECTORY
from daskcurv.experiment.held_out import first_of_each_class

if TYPE_CHECKING:
    import torch

RESNET18 = "resnet18-lop"
EPOCH_MEANS = ("finished", "last")
RESULTS = Path("results2/base_deep_learning_system")


@documented
@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of a launch.

    `estimator`, `schedule` and `cluster` hold the settings that are declared there.
    """

    epochs: str | None = setting(
        None,
        "comma-separated epochs, or all: every checkpoint (default: 0,200,...,4000; also see "
        "--start_epoch)",
    )
    start_epoch: int = setting(0, "first epoch")
    end_epoch: int = setting(4000, "last epoch")
    step: int = setting(200, "interval between epochs")
    skip_missing: bool = setting(False, "skip epochs that have no checkpoint")
    data_path: Path = setting(
        Path("data") / DIRECTORY,
        "training set, in CIFAR-100's or another format",
    )
    download: bool = setting(False, "download CIFAR-100 if data_path does not contain it")
    model_dir: Path = setting(RESULTS / "model_parameters", "directory with the checkpoints")
    checkpoints: str | None = setting(
        None,
        "files of the weights, such as 'runs/net-{epoch}.pt', quoted; * stands for anything "
        "(default: the names of the documented run, in model_dir)",
    )
    task: int | None = setting(
        None,
        "which task, where every task has files of its own and its epochs count from 0; its "
        "classes are active throughout",
    )
    weights_key: str | None = setting(
        None, "where the weights are in a file, such as state_dict (default: found)"
    )
    strip_prefix: str | None = setting(
        None, "what the weights' names begin with, to be left out, such as module. (default: found)"
    )
    model: str = setting(
        RESNET18,
        "network: resnet18-lop (that of the documented run), torchvision:NAME, timm:NAME, "
        "package.module:factory or path/net.py:factory",
    )
    model_args: str | None = setting(
        None, "keyword arguments of the network's factory, as a JSON object"
    )
    mean: str | None = setting(
        None,
        "mean of each channel in the training run, comma-separated, of pixels scaled to 0 ... 1 "
        "(default: CIFAR-100's, for its format only)",
    )
    std: str | None = setting(None, "standard deviation of each channel, like mean")
    image_size: int | None = setting(
        None, "resize images to this size, and crop the centre, as torchvision does"
    )
    class_order: Path | None = setting(
        None,
        "class order file, or regenerate: draw it from the experiment index, whatever files there "
        "are (default: class_order/index-I.npy beside model_dir)",
    )
    experiment_index: int = setting(0, "index of the training run, as in its file names")
    epoch_means: str = setting(
        "finished",
        "what the number in a file's name counts: epochs finished, or the last one, from 0",
        choices=EPOCH_MEANS,
    )
    validation_per_class: int | None = setting(
        None,
        "number of samples per class, from the first on, that training held out (default: 50 in "
        "the documented run, else none)",
    )
    held_out: str | None = setting(
        None,
        "samples that training held out: first:N (of each class, as validation_per_class), or an "
        ".npy file of bool, one for each sample, or of sample numbers",
    )
    class_schedule: str | None = setting(
        None,
        "none: all classes from the start; or a CSV file with the columns epoch and classes "
        "(default: initial_classes, then class_increment more every class_frequency epochs)",
    )
    task_sizes: str | None = setting(
        None, "number of classes of each task, comma-separated, for tasks of unequal size"
    )
    task_epochs: int | None = setting(None, "with task_sizes: number of epochs per task")
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    head: str = setting("all", "outputs of the network that take part in the loss", choices=HEADS)
    outputs: str = setting(
        "labels",
        "what output j of the network is: class j (labels), or the j-th class of the class order "
        "(class_order), as in training code that numbers classes as they are added",
        choices=OUTPUTS,
    )
    schedule: Schedule = field(default_factory=Schedule)
    store: Path = setting(RESULTS / "curvature.zarr", "results store (Zarr)")
    save_base_dir: Path = setting(
        RESULTS / "per_image_curvature_full",
        "directory to which finished epochs are exported as npy files",
    )
    export: bool = setting(True, "export npy files")
    batch_size: int | None = setting(
        None, "samples per forward pass (default: measured on a GPU, 32 on a CPU)"
    )
    block_size: int | None = setting(None, "samples per block of a new store (default: 5000)")
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_positive(
            batch_size=self.batch_size, block_size=self.block_size,
            image_size=self.image_size, task_epochs=self.task_epochs,
        )  # fmt: skip
        check_choices(self)
        if self.class_schedule and self.task_sizes:
            raise ConfigError(
                "class_schedule and task_sizes both say when classes become active; use one of them"
            )
        if bool(self.task_sizes) != bool(self.task_epochs):
            raise ConfigError("task_sizes and task_epochs go together; set both")
        if self.model_args and self.model == RESNET18:
            raise ConfigError(f"model_args are for other networks than {RESNET18}; set --model")
        if self.held_out is not None:
            first_of_each_class(self.held_out)
        if self.held_out is not None and self.validation_per_class is not None:
            raise ConfigError(
                "held_out and validation_per_class both say which samples were held out; use one "
                "of them"
            )
        if self.validation_per_class is not None and self.validation_per_class < 0:
            raise ConfigError(
                f"validation_per_class is {self.validation_per_class}; expected 0 or more"
            )

    @property
    def documented(self) -> bool:
        """Whether it is the training run that the documentation describes, going by its names."""
        return self.checkpoints is None and self.model == RESNET18

    @property
    def device(self) -> torch.device:
        """What workers compute on; this host need not have one."""
        import torch

        from daskcurv.clusters.local import visible_gpus

        if self.cluster.device != "auto":
            return torch.device(self.cluster.device)
        gpus = self.cluster.cluster != "local" or visible_gpus()
        return torch.device("cuda" if gpus else "cpu")


SETTINGS = settings_of(LaunchOptions, EstimatorConfig, Schedule, ClusterOptions)
"""All settings of a launch, by the names of their options."""


def launch_options(given: Mapping[str, Any]) -> LaunchOptions:
    """Return the options of a launch: those given, the site's for the cluster, then defaults.

    Parameters
    ----------
    given : mapping
        By option; names that are no settings are passed over.

    Raises
    ------
    ConfigError
        For values that cannot be used, and options that do not go together.
    """

    def chosen(kind: type) -> dict[str, Any]:
        return {name: given[name] for name in settings_of(kind) if name in given}

    return LaunchOptions(
        **chosen(LaunchOptions),
        estimator=EstimatorConfig(**chosen(EstimatorConfig)),
        schedule=Schedule(**chosen(Schedule)),
        cluster=cluster_options(given),
        dry_run=given.get("dry_run", False),
    )


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
