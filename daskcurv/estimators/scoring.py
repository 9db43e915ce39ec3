"""Scores samples in micro-batches of one size, halved when memory runs out."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from daskcurv import measures as table
from daskcurv import surroundings
from daskcurv.config import EstimatorConfig, check_positive
from daskcurv.errors import ConfigError
from daskcurv.estimators.arguments import (
    check_classes,
    check_parameters,
    device_of,
    images_of,
    integers_of,
    private_copy,
)
from daskcurv.estimators.base import Measures, SampleLoss
from daskcurv.estimators.logits import logits_of, relative_error
from daskcurv.estimators.precision import lowered_precision, true_float32
from daskcurv.estimators.selection import check_itself, make_estimator, resolve
from daskcurv.estimators.tracing import first_line

log = logging.getLogger(__name__)

_SAME = 1e-3
"""Of the largest logit: more than rounding does, less than another function would."""
_COMPARED = 4
"""Images whose logits are compared, of two calls."""

CPU_BATCH_SIZE = 32
CUDA_BATCH_SIZE = 512
CUDA_BATCH_SIZES = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class SampleScores:
    """The measures of N samples, by the names of the results store's variables.

    ``scores["loss"]`` and ``scores.loss`` are the same; measures without a field are had by name
    only.

    Attributes
    ----------
    curvature : ndarray of float64, shape (N,)
        Mean over probes of ‖Δg‖₂, where Δg is the change of the input gradient of the sample's
        own loss over a step h along the probe.
    curvature_sq : ndarray of float64, shape (N,)
        Mean over probes of ‖Δg‖₂².
    directional_eig : ndarray of float64, shape (N,)
        Mean over probes of (h v)·Δg.
    loss : ndarray of float64, shape (N,)
        Cross-entropy of the sample, in nats.
    grad_norm : ndarray of float64, shape (N,)
        ‖∇ₓL‖₂ at the sample.
    prediction : ndarray of int64, shape (N,)
        The class with the largest logit.
    further : mapping
        Arrays of shape (N,) of the measures that have no field, by name.
    """

    curvature: NDArray[np.float64]
    curvature_sq: NDArray[np.float64]
    directional_eig: NDArray[np.float64]
    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    prediction: NDArray[np.int64]
    further: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return the measure called `name`; a `KeyError` if there is none."""
        if name in self.further:
            return self.further[name]
        if name not in _FIELDS:
            raise KeyError(name)
        values: NDArray[Any] = getattr(self, name)
        return values


_FIELDS = tuple(field.name for field in fields(SampleScores) if field.name != "further")


class Scorer:
    """One model, ready to score batches of samples.

    Micro-batches have one fixed size and the last is padded, so that the arithmetic done for a
    sample does not depend on how many others come with it.

    Parameters
    ----------
    model : nn.Module
        Copied; the original is left as it is (mode, gradients, device).
    config : EstimatorConfig
    classes : sequence of int, optional
        Outputs that take part in the loss; None means all.
    device : torch.device or str
    batch_size : int, optional
        Samples per micro-batch; by default 32 on a CPU and 512 on a GPU. Halved permanently when
        the device runs out of memory.
    dtype : torch.dtype
        Floating type of the model and images, float32 or float64.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EstimatorConfig,
        *,
        classes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_positive(batch_size=batch_size)
        self.device = torch.device(device)
        self.batch_size = default_batch_size(self.device) if batch_size is None else batch_size
        self._dtype = dtype
        # PyTorch says so on a backward pass in a thread that has not used the GPU, and sees to it.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
        self._model = private_copy(model, self.device, dtype)
        if dtype == torch.float32 and (lowered := lowered_precision(self.device)):
            raise ConfigError(
                f"float32 {lowered} on this {self.device.type} are computed in a lower precision, "
                "which makes differences of gradients wrong; start Python without the "
                f"environment variable that causes this ({surroundings.suspects()})"
            )
        loss = SampleLoss(config.temperature, classes)
        config, _ = resolve(config, self.device, dtype=dtype)
        self._estimate = make_estimator(self._model, loss, config)
        self._probes = range(config.n_probes)

    def score(
        self,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        probes: Sequence[int] | None = None,
    ) -> SampleScores:
        """Score samples.

        Parameters
        ----------
        images : Tensor of float, shape (N, *input)
            Normalised.
        labels : Tensor of int64, shape (N,)
        sample_ids : Tensor of int64, shape (N,)
            They select the probes.
        probes : sequence of int, optional
            Indices of the probes to take means over; by default the settings' first `n_probes`.

        Returns
        -------
        SampleScores
            Arrays of length N.
        """
        # All of it goes to the device at once and comes back at once: in between, the host only
        # queues work.
        batch = (
            images.to(self.device, self._dtype), labels.to(self.device), sample_ids.to(self.device)
        )  # fmt: skip
        probes = self._probes if probes is None else probes
        parts: list[Measures] = []
        start = 0
        while start < len(images):
            measures = self._try_micro_batch(start, *batch, probes)
            if measures is None:
                self._shrink()
                continue
            parts.append(measures)
            start += self.batch_size
        return _scores(parts)

    def choose_method(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
        """With method ``"auto"``, choose by a self-check on these samples, not the first scored."""
        with true_float32(self.device):
            check_itself(
                self._estimate,
                images.to(self.device, self._dtype),
                labels.to(self.device),
                sample_ids.to(self.device),
            )

    def tune_batch_size(
        self,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        candidates: Sequence[int] = CUDA_BATCH_SIZES,
    ) -> None:
        """Measure how fast batches of several sizes are, and keep the best size.

        Parameters
        ----------
        images, labels, sample_ids : Tensor
            Samples to measure with, repeated to fill a batch.
        candidates : sequence of int
            In ascending order. The search ends when a size does not fit, or gains less than 3 %.
        """
        best, best_rate = candidates[0], 0.0
        for size in candidates:
            self.batch_size = size
            rows = torch.arange(size, device=images.device) % len(images)
            batch = images[rows], labels[rows], sample_ids[rows]
            self.score(*batch)  # allocates memory, compiles, picks algorithms
            started = time.perf_counter()
            self.score(*batch)
            rate = size / (time.perf_counter() - started)
            if self.batch_size < size or rate < 1.03 * best_rate:
                break
            best, best_rate = size, rate
        self.batch_size = best

    @property
    def method(self) -> str:
        """The method in use, with its precision; empty while ``"auto"`` has not chosen."""
        return self._estimate.method

    def check_model(self, images: Tensor) -> int:
        """Check that the model is a function of each image alone; return its number of logits.

        Parameters
        ----------
        images : Tensor, shape (N, *input)
            The first few are checked. A warning is logged if the logits of the first depend on
            the others.

        Raises
        ------
        ConfigError
            If the model cannot take them, returns something other than logits, fewer than two, or
            different ones each time.
        """
        alone = self._look(images[:1])
        if alone.shape[1] < 2:
            raise ConfigError(
                "the model has one logit, over which every softmax is 1 and every loss 0; for a "
                "binary classifier, wrap it to return [0, logit] for the classes 0 and 1"
            )
        # With several images, a random model is unlikely to give the same logits by chance.
        few = self._look(images[:_COMPARED])
        if relative_error(self._look(images[:_COMPARED]), few) > _SAME:
            raise ConfigError(
                f"{type(self._model).__name__} gives different logits for the same image each "
                "time: dropout that ignores eval mode, or a module that counts its calls? "
                "Curvature is only defined for a fixed function"
            )
        if relative_error(few[:1], alone) > _SAME:
            log.warning(
                "the logits of a sample depend on the others in its batch (a normalisation over "
                "the batch?), and so do its results"
            )
        return alone.shape[1]

    def _look(self, images: Tensor) -> Tensor:
        images = images.to(self.device, self._dtype)
        try:
            with true_float32(self.device), torch.no_grad():
                return logits_of(self._model, images)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # A model's own code can fail in any way.
            raise ConfigError(
                f"{type(self._model).__name__} cannot take images of shape {tuple(images.shape)} "
                f"and dtype {images.dtype}: {first_line(error)}"
            ) from error

    def _try_micro_batch(
        self,
        start: int,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        probes: Sequence[int],
    ) -> Measures | None:
        """Return the measures from `start` on, or None if the device ran out of memory."""
        # The last sample is repeated to fill the batch; the copies' results are cut off below.
        end = start + self.batch_size
        rows = torch.arange(start, end, device=self.device).clamp(max=len(images) - 1)
        try:
            with true_float32(self.device):
                measures = self._estimate(images[rows], labels[rows], sample_ids[rows], probes)
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            return None
        keep = len(images) - start
        return {name: values[:keep] for name, values in measures.items()}

    def _shrink(self) -> None:
        # Called after the exception is gone: while it lives, its traceback keeps the failed
        # batch's tensors alive, and no memory could be returned.
        self.batch_size //= 2
        log.warning("%s is out of memory; batch size is now %d", self.device, self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _scores(parts: list[Measures]) -> SampleScores:
    """Return the measures of all batches, in host memory."""
    found: dict[str, NDArray[Any]] = {}
    for measure in table.MEASURES:
        dtype = np.int64 if measure.is_integer else np.float64
        values = [part[measure.name] for part in parts]
        joined = torch.cat(values).cpu().numpy() if values else np.empty(0)
        found[measure.name] = joined.astype(dtype, copy=False)
    fields_of = {name: found.pop(name) for name in _FIELDS}
    return SampleScores(**fields_of, further=found)


def default_batch_size(device: torch.device) -> int:
    """Return the default number of samples per micro-batch."""
    return CUDA_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE


def score_samples(
    model: nn.Module,
    images: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    h: float = 1e-3,
    n_probes: int = 10,
    temperature: float = 1.0,
    seed: int = 0,
    sample_ids: ArrayLike | Tensor | None = None,
    method: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    classes: Sequence[int] | None = None,
) -> SampleScores:
    """Compute the curvature of the loss around each sample, for any classifier.

    The model is used in eval mode, on a copy; TF32, autocast and the like are switched off for the
    duration. Float64 images are computed in float64, which gives a reference for float32 results.

    Parameters
    ----------
    model : nn.Module
        Maps ``(N, *input)`` to logits ``(N, C)``.
    images : array_like or Tensor of float, shape (N, *input)
        Already normalised as the model expects; for images ``(N, C, H, W)``.
    labels : array_like or Tensor of int, shape (N,)
    h : float
        Step of the finite difference, in units of the normalised input.
    n_probes : int
        Random directions per sample.
    temperature : float
        The logits are divided by it.
    seed : int
        Seed of the probes.
    sample_ids : array_like or Tensor of int, shape (N,), optional
        Each sample's index in its training set, which selects its probes; by default 0 … N−1.
    method : {"auto", "difference-propagation", "finite-difference", "zeroth-order"}
        Estimator. ``"auto"`` is difference propagation where the model allows it and a self-check
        on the first samples passes, else direct finite differences (always, if images are float64,
        or on a CPU without fast bfloat16 if `precision` is left to ``"auto"``).
        ``"zeroth-order"`` takes second differences of the loss alone and leaves `directional_eig`
        and `grad_norm` NaN.
    precision : {"auto", "bfloat16", "tf32", "float32"}
        Of the differences in difference propagation; ``"auto"`` is bfloat16 if the device
        supports it fast, else float32.
    batch_size : int, optional
        Samples per micro-batch.
    device : torch.device or str, optional
        By default the device of the model's parameters.
    classes : sequence of int, optional
        Outputs that take part in the softmax (and in the prediction); by default all.

    Returns
    -------
    SampleScores
        Arrays of length N.

    Raises
    ------
    ConfigError
        For settings or arrays that cannot be used; the text names the argument.
    """
    config = EstimatorConfig(
        method=method,
        precision=precision,
        h=h,
        n_probes=n_probes,
        temperature=temperature,
        seed=seed,
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    inputs = images_of(images)
    targets = integers_of("labels", labels, len(inputs))
    ids = torch.arange(len(inputs), device="cpu") if sample_ids is None else sample_ids
    ids = integers_of("sample_ids", ids, len(inputs))
    place = device_of(device, model)
    if batch_size is None:
        batch_size = min(default_batch_size(place), max(len(inputs), 1))
    scorer = Scorer(
        model, config, classes=classes, device=place, batch_size=batch_size, dtype=inputs.dtype
    )
    if len(inputs):
        check_parameters(model)
        check_classes(targets, classes, scorer.check_model(inputs[:2]))
    scores = scorer.score(inputs.detach(), targets, ids)
    broken = ~(np.isfinite(scores.loss) & np.isfinite(scores.curvature))
    if broken.any():
        log.warning(
            "the results of %d of %d samples are not finite numbers, first those of sample %d: "
            "their logits overflow, or an operation has no gradient there",
            broken.sum(),
            len(broken),
            broken.argmax(),
        )
    return scores
