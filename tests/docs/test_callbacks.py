"""The callbacks of the documentation, in the libraries that call them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daskcurv.experiment.naming import Naming
from daskcurv.experiment.payload import find_payload, weights_in
from daskcurv.experiment.search import find
from daskcurv.experiment.weight_files import read_content
from tests.support.project import REPOSITORY

TEXT = (REPOSITORY / "docs" / "your-run.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
EPOCHS = 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The libraries' own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def callback(library: str) -> Any:
    """Return the class that the documentation has for a library."""
    (code,) = (code for code in CODE if f"from {library} import" in code)
    found: dict[str, Any] = {}
    exec(compile(code, "your-run.md", "exec"), found)
    return found["Keep"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


IMAGES, LABELS = torch.randn(16, 3, 2, 2), torch.arange(16) % 3


def check(directory: Path, trained: nn.Module, before: dict[str, Tensor]) -> None:
    """Every epoch's weights are there, the first untrained, and load into the bare network."""
    files = find(*Naming.of(str(directory / "epoch-{epoch}.safetensors")))
    assert list(files) == list(range(EPOCHS + 1))
    names = network().state_dict().keys()
    kept = []
    for path in files.values():
        content, _ = read_content(path)
        kept.append(weights_in(content, find_payload(content, path, names), path))
    after = trained.state_dict()
    assert all(torch.equal(kept[0][name], before[name]) for name in names)
    assert all(torch.equal(kept[-1][name], after[name]) for name in names)
    for one, next_one in pairwise(kept):
        assert not torch.equal(one["1.weight"], next_one["1.weight"])


def test_lightning_keeps_every_epoch(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    module = Module()
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback("lightning.pytorch")(tmp_path / "weights")],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    check(tmp_path / "weights", module.net, before)


def test_hugging_face_s_trainer_keeps_every_epoch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"pixel_values": i, "labels": n} for i, n in zip(IMAGES, LABELS, strict=True)]
    model = Model()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=EPOCHS, use_cpu=True,
        per_device_train_batch_size=5, learning_rate=0.1, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=rows,
        callbacks=[callback("transformers")(tmp_path / "weights")],
    )  # fmt: skip
    trainer.train()
    check(tmp_path / "weights", model.net, before)
