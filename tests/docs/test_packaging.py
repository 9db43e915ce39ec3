"""What a distribution says about itself agrees with what it is."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_citation_file_names_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    package = metadata("daskcurv")
    assert (citation["title"], citation["version"], citation["license"]) == (
        package["Name"],
        package["Version"],
        package["License-Expression"],
    )
