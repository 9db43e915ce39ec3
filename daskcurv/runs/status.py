"""The progress of a run, seen from another shell, during the run and after it.

Finished work is counted in the store; the rest is read from the run record (see
`daskcurv.runs.accounts.record`). Nothing is written.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from daskcurv.experiment.curriculum import active_samples
from daskcurv.logs import counted
from daskcurv.places import followed, listed
from daskcurv.runs.accounts.record import read_record
from daskcurv.runs.outcome import State
from daskcurv.runs.wording import STATES
from daskcurv.storage import ResultsStore
from daskcurv.storage.chunks import shown
from daskcurv.storage.finite import noted_epochs
from daskcurv.storage.integrity.lost import lost_files
from daskcurv.storage.lock import holder


def read_status(path: Path) -> dict[str, Any]:
    """Return the state of a results store and of its last run.

    Parameters
    ----------
    path : Path
        A results store, or the path where a launch is about to create one.

    Returns
    -------
    dict
        Can be written as JSON. ``holder`` is the process that holds the store's lock (``host``,
        ``pid``, ``since``), or None if no live process holds it. ``store`` has ``epochs``,
        ``blocks`` and ``samples`` (active ones), each with ``done`` and ``of``;
        ``epochs_not_finite``; and, unless a run is in progress, ``lost``, the missing files of
        finished blocks. ``store`` is None if there is no store yet. ``run`` is the record of the
        last launch, or None if there is no record; its ``state`` (words) is ``"running"``, and its
        ``state_code`` (a `State`) too, only if the process is alive.

    Raises
    ------
    StoreError
        If there is neither a results store nor a run.
    """
    # In this order: a launcher that ends meanwhile is not taken for one that was killed.
    owner = holder(path)
    run = read_record(path)
    if run is not None:
        alive = owner is not None and _is_launcher_of(owner, run)
        if run.get("state") == STATES[State.RUNNING] and not alive:
            run["state"] = STATES[State.KILLED]
        # By the words, because earlier versions recorded no more.
        run["state_code"] = next((code for code in State if STATES[code] == run.get("state")), None)
    if run is not None and not path.exists():
        return {"path": str(path), "holder": owner, "store": None, "run": run}
    alive = run is not None and run["state"] == "running"
    store = _count(_filled(path, run), alive)
    return {"path": str(path), "holder": owner, "store": store, "run": run}


def _is_launcher_of(owner: dict[str, Any], run: dict[str, Any]) -> bool:
    """Return whether the lock's holder wrote the record."""
    if owner.get("token") and run.get("lock"):
        return bool(owner["token"] == run["lock"])
    # One of them is of an earlier version, or cannot be read.
    return all(owner.get(name, run.get(name)) == run.get(name) for name in ("host", "pid"))


def _filled(path: Path, run: dict[str, Any] | None) -> ResultsStore:
    """Open the store that is being filled; with probes being added, it is one beside `path`."""
    # By its name alone: the recorded directory is another one's if store and record were copied.
    place, name = followed(path), Path((run or {}).get("store") or "").name
    if name.startswith(f"{place.name}.") and (other := place.with_name(name)).exists():
        return ResultsStore.open(other)
    return ResultsStore.open(path)


def _count(store: ResultsStore, alive: bool) -> dict[str, Any]:
    complete = store.read("complete")[: len(store.rows)]
    done = np.repeat(complete[:, None], store.num_blocks, axis=1)
    # While a run goes on, looked for on disk only where it is not on record: 4,001 directories of
    # each variable take seconds.
    for row in np.flatnonzero(~complete).tolist() if alive else range(len(complete)):
        done[row] = store.done_in(row)
    lost = lost_files(store) if store.is_compact or not (alive or done.all()) else []
    first_active = store.read("first_epoch_active")
    samples = active_samples(first_active, store.epochs, store.block_size)
    return {
        "epochs": {"done": int(done.all(axis=1).sum()), "of": len(done)},
        "blocks": {"done": int(done.sum()), "of": done.size},
        "samples": {"done": int(samples[done].sum()), "of": int(samples.sum())},
        "compute_seconds": float(store.read("compute_seconds").sum()),
        "epochs_not_finite": noted_epochs(store),
        "lost": [str(one) for one in lost],
        "remedy": store.remedy if lost else None,
    }


def describe(status: dict[str, Any], now: datetime | None = None) -> str:
    """Return a status as text for a terminal.

    Parameters
    ----------
    status : dict
        The result of `read_status`.
    now : datetime, optional
        The current time; by default that of this machine.
    """
    now = now or datetime.now().astimezone()
    lines = [f"store     {status['path']}"]
    store, run = status["store"], status["run"]
    if store is None:
        lines.append("          not created yet: inputs are being checked")
    else:
        counts = [
            f"{store[name]['done']:,} of {store[name]['of']:,} {name}"
            for name in ("epochs", "blocks", "samples")
        ]
        part = store["samples"]["done"] / store["samples"]["of"] if store["samples"]["of"] else 1
        lines.append(f"done      {', '.join(counts)} ({part:.1%})")
        if epochs := list(map(str, store.get("epochs_not_finite", ()))):
            lines.append(
                f"warning   some results are not finite numbers at epochs {listed(epochs)}; "
                "daskcurv verify counts them"
            )
        if store["lost"]:
            lines.append(
                f"damaged   {counted(len(store['lost']), 'missing file')}: {shown(store['lost'])}"
            )
            lines.append(f"          {store['remedy']}")
    if run is None:
        owner = status.get("holder")
        # A run's record lies beside the store, and not where a bind mount shows the store alone.
        lines.append(
            f"run       no record here, but process {owner.get('pid')} on "
            f"{owner.get('host')} has been working on it since {owner.get('since')}"
            if owner
            else "run       no record"
        )
        return "\n".join(lines)
    where = f"job {run['job']} on {run['host']}" if run.get("job") else f"{run['host']}"
    lines.append(f"run       {run['state']}" + (f": {run['reason']}" if "reason" in run else ""))
    began, updated = (datetime.fromisoformat(run[name]) for name in ("began", "updated"))
    alive = run["state"] == "running"
    span = (
        f"since {began:%Y-%m-%d %H:%M:%S %z}, as of {_ago(now - updated)}"
        if alive
        else f"from {began:%Y-%m-%d %H:%M:%S %z} to {updated:%Y-%m-%d %H:%M:%S %z}"
    )
    lines.append(f"          {span}, process {run['pid']}, {where}")
    if "blocks" in run:
        lines += _progress(run, alive, updated)
    if alive and run.get("devices"):
        lines += _devices(run["devices"])
    if run.get("failed"):
        lines.append(f"failed    {counted(len(run['failed']), 'block')}, set aside; last one:")
        lines.append("          {block}: {reason}".format(**run["failed"][-1]))
    for number, message in enumerate(run.get("messages", [])):
        time = datetime.fromisoformat(message["time"])
        label = "messages" if number == 0 else ""
        lines.append(f"{label:<10}{time:%H:%M:%S %z} {message['level'].lower()}: {message['text']}")
    if run.get("log"):
        lines.append(f"log       {run['log']}")
    if alive and run.get("dashboard"):
        lines.append(f"dashboard {run['dashboard']}")
    if not alive and store and store["blocks"]["done"] < store["blocks"]["of"]:
        lines.append("continue  run the same launch command again")
    return "\n".join(lines)


def _progress(run: dict[str, Any], alive: bool, updated: datetime) -> list[str]:
    blocks = run["blocks"]
    text = f"{blocks['done']:,} of {blocks['of']:,} blocks of this run"
    if not alive:
        return [f"          {text}"]
    left = run["seconds_left"]
    lines = [f"progress  {text}, {run.get('running', 0)} running, {len(run['failed'])} failed"]
    if left is None:
        lines.append("rate      unknown so far")
    else:
        end = updated + timedelta(seconds=left)
        lines.append(
            f"rate      {run['samples_per_second']:,.1f} samples/s, "
            f"{timedelta(seconds=round(left))} left, until {end:%Y-%m-%d %H:%M %z}"
        )
    lines.append(f"workers   {run['workers'] or 'none yet'}")
    return lines


def _devices(devices: dict[str, dict[str, Any]]) -> list[str]:
    width = max(map(len, devices))
    return [
        f"          {name:<{width}}  "
        + (f"job {of['job']}, " if of.get("job") else "")
        + f"{of['device']}, {counted(of['blocks'], 'block')}, last one ({of['last_block']}) in "
        f"{of['last_seconds']:.1f} s"
        for name, of in sorted(devices.items())
    ]


def _ago(span: timedelta) -> str:
    seconds = max(0, round(span.total_seconds()))
    return "now" if seconds < 5 else f"{timedelta(seconds=seconds)} ago"
