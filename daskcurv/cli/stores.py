"""The commands around a results store."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from daskcurv.cli.options import flag, verb

log = logging.getLogger(__name__)

_SHOWN = 20


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_verify(verb(verbs, "verify", _verify, "check everything that a results store holds"))
    _add_compact(verb(verbs, "compact", _compact, "write a finished store anew, for reading"))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    flag(parser, "repair", "mark what is damaged as missing, so that the next launch redoes it")


def _verify(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore, launcher_lock
    from daskcurv.storage.verify import repair, verify

    mend = "repair" in args
    opened = ResultsStore.open(args.store)
    if mend:
        opened.refuse_if_compact()
    with launcher_lock(args.store) if mend else nullcontext():
        store = ResultsStore.open(args.store)
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
        if not mend:
            if found.damage and store.is_compact:
                log.error("make it again with daskcurv compact from the store it was made from")
            elif found.damage:
                log.error("add --repair to mark what is damaged as missing, then launch again")
            return int(bool(found.damage))
        repair(store, found.damage)
        if beyond := [one for one in found.damage if not one.can_be_repaired]:
            log.error("%d could not be repaired: %s", len(beyond), beyond[0].where)
            return 1
        if found.damage:
            log.info("marked as missing; the next launch computes and restores it")
        return 0


def _add_compact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store, finished")
    parser.add_argument("out", type=Path, help="where to write it anew; must not exist")


def _compact(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.compact import compact

    compact(ResultsStore.open(args.store), args.out)
    return 0
