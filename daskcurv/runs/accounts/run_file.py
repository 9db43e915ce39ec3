"""The settings of a launch, as a file beside its store that ``daskcurv launch FILE`` runs again.

It is YAML: one key for each option of the command line, under the same name. What a site's
configuration sets is not in it, as it applies again; so a launch elsewhere can use that site's.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

import daskcurv
from daskcurv.atomic import replace_note
from daskcurv.clusters.options import ClusterOptions, options_for, site_settings
from daskcurv.declared import settings_of
from daskcurv.errors import ConfigError
from daskcurv.experiment.class_order import REGENERATE
from daskcurv.experiment.held_out import first_of_each_class
from daskcurv.runs.curricula import NONE
from daskcurv.runs.events import Event, Opened
from daskcurv.runs.options import SETTINGS, LaunchOptions
from daskcurv.storage.lock import beside

log = logging.getLogger(__name__)

SUFFIX = ".run.yaml"

_RANGE = {"start_epoch", "end_epoch", "step"}
_INSTEAD = (
    ({"epochs"}, _RANGE),
    (_RANGE, {"epochs"}),
    ({"workers"}, {"gpus"}),
    ({"held_out"}, {"validation_per_class"}),
    ({"validation_per_class"}, {"held_out"}),
)
"""Options that replace others."""

_CLUSTER = settings_of(ClusterOptions).keys()


class RunFile:
    """Observer that writes the settings of a launch beside its store.

    Parameters
    ----------
    options : LaunchOptions
        As the launch uses them; with the method and precision that were chosen.
    """

    def __init__(self, options: LaunchOptions):
        self._options = options

    def __call__(self, event: Event) -> None:
        """Write the file when the store is open; if this fails, the run continues."""
        if not isinstance(event, Opened):
            return
        path = beside(self._options.store, SUFFIX)
        text = (
            f"# Settings of the last launch on this store, by daskcurv {daskcurv.__version__}.\n"
            f"# To run it again: daskcurv launch {shlex.quote(str(path))}\n"
            f"{yaml.safe_dump(to_mapping(self._options), sort_keys=False, allow_unicode=True)}"
        )
        try:
            replace_note(path, text)
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror)


def to_mapping(options: LaunchOptions) -> dict[str, Any]:
    """Return the settings of a launch by option, as YAML has them; paths are absolute."""
    parts = (options, options.estimator, options.schedule, options.cluster)
    every = {name: getattr(part, name) for part in parts for name in settings_of(type(part))}
    kind = options.cluster.cluster
    site = site_settings() if kind in ("slurm", "allocation") else {}
    left_out = _CLUSTER - options_for(kind, submitted=False)
    left_out |= {name for name, value in site.items() if every[name] == value}
    if options.epochs is not None:
        left_out |= _RANGE
    return {
        name: _plain(name, value)
        for name, value in every.items()
        if name not in left_out and value not in (None, ())
    }


def _plain(name: str, value: Any) -> Any:
    if (path := _path_in(name, value)) is not None:
        return str(path.absolute())
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _path_in(name: str, value: Any) -> Path | None:
    """Return a setting as the path that it is or begins with, or None if it is no path."""
    if isinstance(value, Path):
        return None if value == REGENERATE else value
    is_path = name == "checkpoints" or (name == "class_schedule" and value != NONE)
    is_path = is_path or (name == "held_out" and first_of_each_class(value) is None)
    return Path(value) if is_path or (name == "model" and ".py:" in value) else None


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the settings in a run file.

    Raises
    ------
    ConfigError
        Naming the key that is no option, or whose value cannot be used.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(
            f"run file {path} cannot be read: {error.strerror}; expected a file like the "
            f"*{SUFFIX} beside a store"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"run file {path} has no settings; expected lines like n_probes: 10")
    found = {}
    for key, value in content.items():
        if key not in SETTINGS:
            close = get_close_matches(str(key), SETTINGS, n=1)
            hint = f"did you mean {close[0]}?" if close else "daskcurv launch --help_all lists them"
            raise ConfigError(f"run file {path}: {key} is not an option of a launch; {hint}")
        found[key] = SETTINGS[key].read(value, f"run file {path}: {key}")
        if (named := _path_in(key, found[key])) is not None:
            if not (full := named.expanduser()).is_absolute():
                raise ConfigError(
                    f"run file {path}: {key} is {str(named)!r}; expected an absolute path, as the "
                    "file can be used from any directory"
                )
            found[key] = SETTINGS[key].kind(full)
    if "epochs" in found and (clash := _RANGE & found.keys()):
        raise ConfigError(
            f"run file {path}: epochs and {min(clash)} both select the epochs; use one of them"
        )
    return found


def overridden(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file together with those of the command line, which win.

    What the file sets and the chosen cluster has no use for is left out, and said.

    Parameters
    ----------
    file, given : mapping
        `given` can hold more than settings.
    """
    kept = dict(file)
    for these, others in _INSTEAD:
        if these & given.keys():
            kept = {name: value for name, value in kept.items() if name not in others}
    cluster = given.get("cluster", kept.get("cluster", ClusterOptions.cluster))
    useful = options_for(cluster, submitted="submit" in given)
    if unused := [name for name in kept if name in _CLUSTER and name not in useful]:
        log.info("--cluster %s does not use the run file's %s", cluster, ", ".join(unused))
    return {**{name: kept[name] for name in kept if name not in unused}, **given}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, where YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} is there twice", node.start_mark
                )
        content: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return content
