"""Text streams that do not fail when their target fails.

A closed terminal, ``| head``, a full disk or Ctrl-S must not stop a computation. The command line
replaces its standard streams with the ones defined here; its log file is one of them too.

Writes are not buffered, so nothing can fail when the interpreter exits.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STALL_SECONDS = 1.0
"""How long a message waits for a terminal that is stopped, or a pipe that is full."""

STANDARD_OUTPUT = "standard output"

_PLAIN = {
    "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "²": "^2", "‖": "||",
    "→": "->", "≥": ">=", "≤": "<=", "’": "'", "“": '"', "”": '"', "\xa0": " ", "\u202f": " ",
}  # fmt: skip
_PLAIN_ERRORS = "daskcurv.plain"


class Output(io.FileIO):
    """A file descriptor to write to.

    Parameters
    ----------
    fd : int
    closefd : bool
        Whether closing this closes the file descriptor.
    lost : callable, optional
        Called with the error when a write fails, and not again until one has succeeded. What could
        not be written is dropped. If None, a failed write raises ``OSError``.
    patience : float, optional
        Seconds to wait if nothing can be written at the moment; after that the write counts as
        failed. By default without limit.
    label : str, optional
        Named by the ``OSError`` as its file.
    """

    def __init__(
        self,
        fd: int,
        *,
        closefd: bool = False,
        lost: Callable[[OSError], None] | None = None,
        patience: float | None = None,
        label: str | None = None,
    ):
        super().__init__(fd, "w", closefd=closefd)
        self._label = label
        self.lost = lost
        self._patience = patience
        self._failing = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of `data`; returns its length, which may have been dropped."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                self._wait()
                # A pipe that is ready takes this much without blocking. None: not ready after all.
                rest = rest[super().write(rest[: select.PIPE_BUF]) or 0 :]
        except OSError as error:
            if self.lost is None:
                raise OSError(error.errno, error.strerror, self._label) from error
            first, self._failing = not self._failing, True
            if first:
                self.lost(error)
        else:
            self._failing = False
        return size

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        # Waiting once is enough: the computation does not wait again at every message.
        patience = 0.0 if self._failing else self._patience
        if not poll.poll(None if patience is None else 1000 * patience):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it at the moment")


def text_output(output: Output, encoding: str, errors: str) -> io.TextIOWrapper:
    """Return a text stream; characters that it cannot encode are written in a plain form."""
    if errors in ("strict", "surrogateescape", "backslashreplace"):
        errors = _PLAIN_ERRORS
    # Like python -u: every write is passed on at once.
    return io.TextIOWrapper(output, encoding=encoding, errors=errors, write_through=True)


@contextmanager
def standard_streams(lost: Callable[[str, OSError], None]) -> Iterator[None]:
    """Replace standard output and standard error by streams that are not buffered.

    Standard error drops what it cannot write. Standard output raises, until `keep_computing` is
    called. Streams that somebody else put in their place (a test, a notebook) stay.

    Parameters
    ----------
    lost : callable
        Called with the stream's name and the error when writes begin to fail.
    """
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _replacement(sys.stdout, Output(1, label=STANDARD_OUTPUT))
    if sys.stderr is sys.__stderr__:
        tolerant = Output(
            2, lost=lambda error: lost("standard error", error), patience=STALL_SECONDS
        )
        sys.stderr = _replacement(sys.stderr, tolerant)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def keep_computing(lost: Callable[[str, OSError], None]) -> None:
    """Have standard output drop what it cannot write, as standard error does."""
    output = getattr(sys.stdout, "buffer", None)
    if isinstance(output, Output):
        output.lost = lambda error: lost(STANDARD_OUTPUT, error)


def _replacement(stream: TextIO | None, output: Output) -> io.TextIOWrapper:
    if stream is None:
        return text_output(output, "utf-8", "strict")
    stream.flush()
    return text_output(output, stream.encoding, stream.errors or "strict")


def _fill_closed_descriptors() -> None:
    """Open the standard file descriptors that the process was started without.

    Otherwise the next files that it opens get these numbers, and whoever writes to standard error,
    a library or a worker process, writes into them.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return
        os.set_inheritable(fd, True)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        # A byte of a file name that is no text: written as it is.
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
    return plain, error.start + 1


codecs.register_error(_PLAIN_ERRORS, _plain)
