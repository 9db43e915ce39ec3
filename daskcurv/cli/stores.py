"""The commands around a results store."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcurv.cli.options import flag, options, verb
from daskcurv.config import check_positive
from daskcurv.errors import ConfigError, StoreError
from daskcurv.logs import counted
from daskcurv.places import exists
from daskcurv.runs.options import LaunchOptions

if TYPE_CHECKING:
    from daskcurv.storage import ResultsStore

log = logging.getLogger(__name__)

_SHOWN = 20
WATCH_SECONDS = 2.0


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_verify(verb(verbs, "verify", _verify, "check everything that a results store holds"))
    _add_compact(verb(verbs, "compact", _compact, "rewrite a finished store for fast reads"))
    _add_status(
        verb(verbs, "status", _status, "show a run's progress, during the run or afterwards")
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    flag(parser, "repair", "mark damaged blocks as missing; the next launch computes them again")
    parser.add_argument(
        "--model_dir",
        type=Path,
        help="also compare the checkpoints in this directory with the store's record",
    )
    parser.add_argument(
        "--recompute",
        type=int,
        metavar="K",
        help="also compute K random results again, in float64, from the checkpoints in --model_dir",
    )
    options(
        parser,
        checkpoints="instead of --model_dir: the pattern of the launch",
        data_path=f"with --recompute: the data set (default: {LaunchOptions.data_path})",
        image_size="with --recompute: as in the launch",
        model="with --recompute: where the network's file is, path/net.py:factory",
    )


def _verify(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore, launcher_lock
    from daskcurv.storage.finite import told
    from daskcurv.storage.group import strangers
    from daskcurv.storage.integrity.verify import repair, verify

    check_positive(recompute=args.recompute)
    from_files = bool(args.model_dir or "checkpoints" in args)
    if args.recompute and not from_files:
        raise ConfigError(
            "--recompute needs the checkpoints; name them: --model_dir, or --checkpoints"
        )
    mend = "repair" in args
    opened = ResultsStore.open(args.store)
    if mend:
        opened.refuse_if_compact()
        if not opened.can_be_launched:
            raise StoreError(
                f"{opened.path} was imported, so no launch would compute again what --repair marks "
                f"as missing. {opened.remedy}"
            )
    with launcher_lock(args.store) if mend else nullcontext() as lock:
        store = ResultsStore.open(args.store, lock=lock)
        found = verify(store)
        for damage in found.damage[:_SHOWN]:
            log.error("%s: %s", damage.where, damage.what)
        if len(found.damage) > _SHOWN:
            log.error("… and %d more", len(found.damage) - _SHOWN)
        log.info(
            "%s: %d blocks checked, %d not computed yet, %d damaged%s",
            args.store,
            found.blocks,
            found.missing,
            len(found.damage),
            f"; {found.leftovers} files left by interrupted writes" if found.leftovers else "",
        )
        if found.not_finite:
            log.error(
                "%d results are not finite numbers, at epochs %s: the network overflows there. "
                "Leave these epochs out of analyses",
                sum(found.not_finite.values()),
                told(found.not_finite),
            )
        if found.missing and store.can_be_launched:
            log.info("not complete: the launch command that began it goes on with it")
        if strange := strangers(args.store):
            log.info("not the store's, and not looked at: %s", ", ".join(strange))
        if mend:
            repair(store, found.damage)
            if beyond := [one for one in found.damage if not one.can_be_repaired]:
                log.error("%d could not be repaired: %s", len(beyond), beyond[0].where)
                return 1
            if found.damage:
                log.info("marked as missing; the next launch computes and restores it")
        elif found.damage:
            log.error(
                "add --repair to mark what is damaged as missing, then launch again"
                if store.can_be_launched
                else store.remedy
            )
            return 1
    from_checkpoints = _has_its_origin(args) if from_files else True
    return int(bool(found.not_finite) or not from_checkpoints)


def _has_its_origin(args: argparse.Namespace) -> bool:
    """Report whether the store's results are what its checkpoints give."""
    from daskcurv.audit import provenance
    from daskcurv.experiment.data import read_dataset
    from daskcurv.experiment.data.preparation import decoded_before
    from daskcurv.experiment.identity import Recorded
    from daskcurv.experiment.naming import Naming
    from daskcurv.experiment.search import discover, find
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.lock import beside

    store = ResultsStore.open(args.store)
    index = provenance.experiment_index(store)
    given = vars(args)
    if args.recompute and (missing := _not_named(store, given)):
        raise ConfigError(
            f"--recompute needs more than the checkpoints: add {' and '.join(missing)}"
        )
    if pattern := given.get("checkpoints"):
        place, checkpoints = pattern, find(*Naming.of(pattern), experiment=index)
    else:
        place, checkpoints = args.model_dir, discover(args.model_dir, index)
    damage, absent = provenance.checkpoint_damage(store, checkpoints)
    for one in damage[:_SHOWN]:
        log.error("%s: %s", one.where, one.what)
    if damage:
        log.info(
            "%s: %s damaged or not matching the record",
            place,
            counted(len(damage), "file"),
        )
    else:
        log.info("%s: every checkpoint matches the record", place)
    if absent:
        log.info("without a file: %s, the first %d", counted(len(absent), "epoch"), absent[0])
    if damage or not args.recompute:
        return not damage
    recorded = Recorded.of(store.identity).dataset
    dataset = read_dataset(
        given.get("data_path", LaunchOptions.data_path),
        mean=recorded["mean"],
        std=recorded["std"],
        image_size=given.get("image_size"),
    )
    dataset = decoded_before(dataset, beside(args.store, ".inputs"))
    directory = None
    if "model" in args:
        file = Path(args.model)
        directory = file.absolute().parent
        made_by = Recorded.of(store.identity).network.get("factory", "the program's own ResNet-18")
        if file.name != made_by:
            raise ConfigError(
                f"model is {args.model}, but the network of {args.store} is made by {made_by}"
            )
    results = provenance.recompute(store, checkpoints, dataset, args.recompute, directory)
    errors = [one.error for one in results]
    log.info(
        "%d results computed again in float64: curvature differs by %.1e (median), %.1e (worst)",
        len(results),
        statistics.median(errors),
        max(errors),
    )
    if problem := provenance.disagreement(results):
        log.error("%s", problem)
    return not problem


def _not_named(store: ResultsStore, given: Mapping[str, Any]) -> list[str]:
    """Return the options without which no result of a store can be computed again."""
    from daskcurv.experiment.identity import Recorded

    made_by = Recorded.of(store.identity).network.get("factory", "")
    missing = []
    if "data_path" not in given and not exists(LaunchOptions.data_path, "data set"):
        missing.append(f"--data_path (there is no data set at {LaunchOptions.data_path})")
    if ".py:" in made_by and "model" not in given:
        missing.append(f"--model PATH/{made_by} (the file of the network)")
    return missing


def _add_compact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store, finished")
    parser.add_argument("out", type=Path, help="where to write it anew; must not exist")


def _compact(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.compact import compact

    compact(ResultsStore.open(args.store), args.out)
    return 0


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    flag(parser, "watch", "refresh every few seconds until the run ends")
    flag(parser, "json", "print JSON, with --watch an object on each line")


def _status(args: argparse.Namespace) -> int:
    from daskcurv.runs.status import describe, read_status

    watch, as_json = "watch" in args, "json" in args
    while True:
        status = read_status(args.store)
        alive = status["run"] is not None and status["run"]["state"] == "running"
        if as_json:
            print(json.dumps(status, indent=None if watch else 2), flush=True)
        else:
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(describe(status), flush=True)
        if not (watch and alive):
            return 0
        time.sleep(WATCH_SECONDS)
