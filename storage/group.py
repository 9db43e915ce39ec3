"""The Zarr group of a results store: opening it, and creating its arrays."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from daskcurv.errors import StoreError, StoreWriteError
from daskcurv.places import followed
from daskcurv.storage import schema

log = logging.getLogger(__name__)

_MEMBER = re.compile("[a-z][a-z0-9_]*")
_HARMLESS = re.compile(
    r"\..*|.*~|Thumbs\.db|[Dd]esktop\.ini|lost\+found|@eaDir|.*conflicted copy.*"
)
"""What file managers, editors, file systems and synchronisers leave in any directory."""

CODECS = (ZstdCodec(level=3), Crc32cCodec())
"""Without the checksum, most flipped bits pass through zstd unnoticed."""


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array, so that chunks of nothing but fill values are written too."""
    node = group[name]
    if not isinstance(node, zarr.Array):
        raise StoreError(f"{name} is not an array")
    # Not remembered in the metadata. Without it a block of nothing but inactive samples would
    # leave no chunk of its measures.
    return node.with_config({"write_empty_chunks": True})


def create_array(
    group: zarr.Group,
    variable: schema.Variable,
    num_samples: int,
    block_size: int,
    num_digests: int,
) -> None:
    """Create a variable of a working store, without epochs; a block has so many digests."""
    blocks = -(-num_samples // block_size)
    shapes = {"epoch": 0, "sample": num_samples, "block": blocks, "variable": num_digests}
    chunks = {"epoch": 1, "sample": block_size, "block": 1, "variable": num_digests}
    if variable in schema.COLUMNS:
        # Each column has chunks of another length, so that none decodes in another's place.
        number = schema.COLUMNS.index(variable)
        chunks = {"epoch": schema.EPOCH_CHUNK + number, "sample": num_samples + number}
    group.create_array(
        variable.name,
        shape=[shapes[dim] for dim in variable.dims],
        chunks=tuple(chunks[dim] for dim in variable.dims),
        dtype=variable.dtype,
        fill_value=variable.fill,
        dimension_names=variable.dims,
        attributes=variable.attrs,
        compressors=CODECS,
    )


def numpy_dtype(variable: schema.Variable) -> Any:
    """Return the type of a variable's values in memory."""
    return object if variable.dtype == "str" else variable.dtype


def open_group(path: Path) -> zarr.Group:
    """Open a store's group after checking that it is one.

    Raises
    ------
    StoreError
    """
    metadata = path / "zarr.json"
    if not metadata.exists():
        if not path.exists():
            example = path.with_name(f"{path.stem}.zarr")
            such = "" if example == path else f" such as {example}"
            raise StoreError(f"{path} does not exist; expected a results store{such}")
        what = "it has no zarr.json" if path.is_dir() else "it is a file"
        raise StoreError(
            f"{path} is not a daskcurv results store: {what}; choose another store",
            option="--store",
        )
    try:
        # A process can change its directory, and a link be changed, while the store is open.
        group = zarr.open_group(followed(path), mode="r+", use_consolidated=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreError(
            f"{metadata} cannot be read as a Zarr group with consolidated metadata: {error}. If "
            "this is a results store, restore that file from a copy; else name another path"
        ) from error
    version = group.attrs.get("daskcurv_format")
    if not isinstance(version, int):
        raise StoreError(
            f"{path} is a Zarr group made by something other than daskcurv; name another path"
        )
    if version > schema.FORMAT_VERSION:
        raise StoreError(
            f"results store {path} has format {version}; this daskcurv reads up to "
            f"{schema.FORMAT_VERSION}. Use the newer daskcurv that made it"
        )
    needed = ["identity", "fingerprint", "block_size", "epochs"]
    if version > 1:
        needed.append(schema.MEASURES)
    if lost := [name for name in needed if name not in group.attrs]:
        raise StoreError(
            f"results store {path} is damaged: its zarr.json lacks {', '.join(lost)}. Restore that "
            "file from a copy, or choose another store",
            option="--store",
        )
    return group


def consolidate(path: Path) -> None:
    """Write one ``zarr.json`` that describes a group and all of its arrays."""
    with warnings.catch_warnings():
        # zarr warns that other implementations may not read consolidated v3 metadata; they fall
        # back to the arrays' own metadata, which says the same.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        zarr.consolidate_metadata(_Members(path))
    if strange := strangers(path):
        log.warning("%s holds what is not the store's; left alone: %s", path, ", ".join(strange))


class _Members(LocalStore):
    """A directory in which other programs have left files, of which Zarr would warn one by one.

    A copy of an array under another name ("curvature (conflicted copy)") would become a variable.
    """

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in super().list_dir(prefix):
            if name == "zarr.json" or _is_member(self.root / prefix / name):
                yield name


def _is_member(path: Path) -> bool:
    return bool(_MEMBER.fullmatch(path.name)) and (path / "zarr.json").exists()


def strangers(path: Path) -> list[str]:
    """Return the names in a store's directory that are neither its own nor known to be harmless."""
    names = sorted(entry.name for entry in path.iterdir() if not _is_member(entry))
    return [name for name in names if name != "zarr.json" and not _HARMLESS.fullmatch(name)]


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn the operating system's refusals into one message."""
    try:
        yield
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {what}: {error.strerror or error}. What was finished is kept; free "
            "space or permissions, then run the same command again"
        ) from error
