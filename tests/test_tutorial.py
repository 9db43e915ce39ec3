"""The tutorial, run as it stands on the demo's store."""

from __future__ import annotations

import re
from typing import Any

from sklearn.metrics import roc_auc_score

from tests.conftest import REPOSITORY

STEPS = re.findall(
    r"```python\n(.*?)```\n```text\n(.*?)```",
    (REPOSITORY / "docs" / "tutorial.md").read_text(),
    re.DOTALL,
)


def without_numbers(text: str) -> str:
    """Return a text with all numbers alike: trained elsewhere, weights differ a little."""
    return re.sub(r" +", " ", re.sub(r"[+-]?\d[\d.]*", "0", text))


def test_the_tutorial_prints_what_it_shows_and_finds_what_it_says(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo[0])
    found: dict[str, Any] = {}
    assert len(STEPS) == 5
    for code, shown in STEPS:
        capsys.readouterr()
        exec(compile(code, "tutorial.md", "exec"), found)
        assert without_numbers(capsys.readouterr().out) == without_numbers(shown)

    flipped = found["flipped"]
    for score in found["scores"].values():
        assert roc_auc_score(flipped, score) > 0.9
    assert flipped[found["suspects"]].mean() > 0.8
    learned, trained_on = found["learned"], found["trained_on"]
    assert learned[flipped & trained_on].mean() < 0.5
    assert learned[~flipped & trained_on].mean() > 0.95
    curvature = found["trained"].curvature.sel(epoch=12)
    wrong, right = (curvature[kind & trained_on].median() for kind in (flipped, ~flipped))
    assert wrong > 10 * right
    old, new, before = found["old"], found["new"], found["before"]
    assert abs(float(found["change"][0, 0])) < 0.5 * before
    assert new[5] > 2 * before
    assert new[7] < 2 * old[7]
