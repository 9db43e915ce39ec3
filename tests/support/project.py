"""A directory with a small training run's files, and the program run in it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from daskcurv.cli import main

REPOSITORY = Path(__file__).parents[2]


class Project:
    """A directory with a small training run's files, to launch the program in.

    Parameters
    ----------
    root : Path
    environment : dict, optional
        Of the programs that are run; by default this process's.
    """

    def __init__(self, root: Path, environment: dict[str, str] | None = None):
        self.root = root
        self.environment = environment
        self.data = root / "cifar-100-python"
        self.models = root / "model_parameters"
        self.store = root / "curvature.zarr"
        self.tree = root / "tree"

    def launch_arguments(self, *extra: str) -> list[str]:
        """Arguments of a launch in which classes arrive 4, 8, 10 at epochs 0, 2, 4.

        On one local worker, which starts soonest, unless told otherwise.
        """
        local = () if "--cluster" in extra else ("--workers", "1")
        return [
            "--data_path", str(self.data), "--model_dir", str(self.models),
            "--store", str(self.store), "--save_base_dir", str(self.tree),
            "--initial_classes", "4", "--class_increment", "4", "--class_frequency", "2",
            "--n_probes", "2", "--batch_size", "8", "--epochs", "all", *local, *extra,
        ]  # fmt: skip

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Start one of the scripts in a session of its own."""
        return subprocess.Popen(
            [sys.executable, REPOSITORY / "scripts" / f"{script}.py", *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts to its end; stdout and stderr are joined in ``stdout``."""
        process = self.start(script, *arguments)
        try:
            # The demo takes two minutes where bfloat16 is fast, and eight on an older processor.
            output, _ = process.communicate(timeout=1200)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def launch(self, *extra: str) -> subprocess.CompletedProcess[str]:
        """Launch and wait for the end.

        Without an environment of its own in this process, as a process needs seconds to import all.
        """
        arguments = self.launch_arguments(*extra)
        if self.environment is not None:
            return self.run("launch", *arguments)
        output = io.StringIO()
        with contextlib.chdir(self.root), redirect_stdout(output), redirect_stderr(output):
            code = main(["launch", *arguments])
        return subprocess.CompletedProcess(arguments, code, output.getvalue(), "")
