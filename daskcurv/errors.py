"""Errors that end in one message for the user.

Every mistake a user can make (a wrong option, a damaged file, a full disk) is raised as a
:class:`DaskcurvError` whose text names the file, field or value, what was expected, and what to
do. The command line prints that text and nothing else. Any other exception is an error in the
program, whose traceback goes to a file.
"""

from __future__ import annotations


class DaskcurvError(Exception):
    """Base of all errors whose text is meant for the user.

    Parameters
    ----------
    text : str
    option : str, optional
        Option that chooses what the text ends with; added by commands that have the option.
    """

    def __init__(self, text: str, *, option: str | None = None):
        super().__init__(text)
        self.option = option


class ConfigError(DaskcurvError, ValueError):
    """An option or argument has a value that cannot be used."""


class DataError(DaskcurvError):
    """The data set, the class order or results to import cannot be read or do not fit."""


class CheckpointError(DaskcurvError):
    """A checkpoint is missing, damaged, or does not belong to the network."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint is not the file that the run was planned with."""


class StoreError(DaskcurvError):
    """The results store cannot be created, opened, read or written."""


class StoreWriteError(StoreError):
    """Nothing more can be written (disk full, quota, permissions): the run has to stop."""


class ClusterError(DaskcurvError):
    """Workers cannot be had, or not safely."""


class ExportError(DaskcurvError):
    """The requested export cannot be made without losing or misrepresenting something."""
