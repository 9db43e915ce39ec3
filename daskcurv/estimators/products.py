r"""How a difference passes through products, softmax, normalisation and concatenation.

The rules complete those of `daskcurv.estimators.layers`, in its notation: clean values a, b with
differences δa, δb (the perturbed value is a + hδa), the clean gradient G of the output and its
difference Γ.

* A product y = ab of two values, elementwise or of matrices, has δy = a δb + δa (b + hδb), and on
  the way back Γa = (b + hδb) Γ + δb G, and the same with a and b exchanged. Neither subtracts
  nearly equal numbers.
* Softmax p, with p' = p + hδp: δp = p (e^{hδ} − 1 − E) / (1 + E) / h with E the mean of e^{hδ} − 1
  under p, and back p' (Γ − ⟨p', Γ⟩) + δp (G − ⟨p, G⟩) − p' ⟨δp, G⟩.
* A normalisation over the values of one sample is a smooth function of them; its differences are
  taken by subtraction, in a wide dtype, as for `~daskcurv.estimators.layers.Pointwise`.

What each keeps between passes: a product the clean values, the clean gradient and the differences
of both operands; softmax p, G and δp; a normalisation its clean input and output, and autograd's
record of the perturbed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from daskcurv.estimators.kernels import total, wide
from daskcurv.estimators.layers import Parts, by_probe, subtraction_dtype


class Product:
    """Elementwise product of two values of the same number of dimensions, broadcast.

    Parameters
    ----------
    h : float
    dtype : torch.dtype
        Of the differences.
    """

    def __init__(self, h: float, dtype: torch.dtype):
        self._h, self._dtype = h, dtype

    def clean(self, left: Parts, right: Parts) -> Tensor:
        self._left, self._right = total(left), total(right)
        return self._left * self._right

    def clean_gradient(self, gradients: Parts) -> tuple[Tensor, Tensor]:
        self._gradient = total(gradients)
        return (
            (self._gradient * self._right).sum_to_size(self._left.shape),
            (self._gradient * self._left).sum_to_size(self._right.shape),
        )

    def forward(self, left: Parts, right: Parts) -> Tensor:
        self._delta_left = by_probe(total(left), self._left)
        self._delta_right = by_probe(total(right), self._right)
        rise_left, rise_right = wide(self._delta_left), wide(self._delta_right)
        result = self._left * rise_right + rise_left * (self._right + self._h * rise_right)
        return result.flatten(0, 1).to(self._dtype)

    def backward(self, gammas: Parts) -> tuple[Tensor, Tensor]:
        gamma = wide(by_probe(total(gammas), self._gradient))
        rise_left, rise_right = wide(self._delta_left), wide(self._delta_right)
        of_left = (self._right + self._h * rise_right) * gamma + rise_right * self._gradient
        of_right = (self._left + self._h * rise_left) * gamma + rise_left * self._gradient
        return self._summed(of_left, self._left), self._summed(of_right, self._right)

    def _summed(self, values: Tensor, like: Tensor) -> Tensor:
        """Return values summed over the dimensions in which `like` was broadcast."""
        summed = values.sum_to_size((len(values), *like.shape))
        return summed.flatten(0, 1).to(self._dtype)


class MatrixProduct:
    """Product of two batches of matrices, (N, …, K, L) and (N, …, L, M); see `Product`."""

    def __init__(self, h: float, dtype: torch.dtype):
        self._h, self._dtype = h, dtype

    def clean(self, left: Parts, right: Parts) -> Tensor:
        self._left, self._right = total(left), total(right)
        self._low = self._left.to(self._dtype), self._right.to(self._dtype)
        return self._left @ self._right

    def clean_gradient(self, gradients: Parts) -> tuple[Tensor, Tensor]:
        gradient = total(gradients)
        self._gradient = gradient.to(self._dtype)
        return gradient @ self._right.mT, self._left.mT @ gradient

    def forward(self, left: Parts, right: Parts) -> Tensor:
        self._delta_left = by_probe(total(left), self._left)
        self._delta_right = by_probe(total(right), self._right)
        self._shifted_left = self._shifted(self._left, self._delta_left)
        self._shifted_right = self._shifted(self._right, self._delta_right)
        parts = [self._low[0] @ self._delta_right, self._delta_left @ self._shifted_right]
        return total(parts).flatten(0, 1)

    def backward(self, gammas: Parts) -> tuple[Tensor, Tensor]:
        gamma = by_probe(total(gammas), self._gradient)
        of_left = [gamma @ self._shifted_right.mT, self._gradient @ self._delta_right.mT]
        of_right = [self._shifted_left.mT @ gamma, self._delta_left.mT @ self._gradient]
        return total(of_left).flatten(0, 1), total(of_right).flatten(0, 1)

    def _shifted(self, clean: Tensor, delta: Tensor) -> Tensor:
        return (clean + self._h * wide(delta)).to(self._dtype)


class Softmax:
    """Softmax over one dimension of each sample.

    Parameters
    ----------
    dim : int
        Negative, counted from the last dimension.
    h : float
    dtype : torch.dtype
        Of the differences.
    """

    def __init__(self, dim: int, h: float, dtype: torch.dtype):
        self._dim, self._h, self._dtype = dim, h, dtype

    def clean(self, inputs: Parts) -> Tensor:
        self._chance = total(inputs).softmax(self._dim)
        return self._chance

    def clean_gradient(self, gradients: Parts) -> Tensor:
        self._gradient = total(gradients)
        # G − ⟨p, G⟩, which the differences need too.
        self._centred = self._gradient - self._mean(self._chance * self._gradient)
        return self._chance * self._centred

    def forward(self, deltas: Parts) -> Tensor:
        rise = torch.expm1(wide(by_probe(total(deltas), self._chance)) * self._h)
        mean = self._mean(self._chance * rise)
        self._delta = self._chance * (rise - mean) / (1 + mean) / self._h
        return self._delta.flatten(0, 1).to(self._dtype)

    def backward(self, gammas: Parts) -> Tensor:
        gamma = wide(by_probe(total(gammas), self._chance))
        shifted = self._chance + self._h * self._delta
        moved = self._mean(shifted * gamma + self._delta * self._gradient)
        result = shifted * (gamma - moved) + self._delta * self._centred
        return result.flatten(0, 1).to(self._dtype)

    def _mean(self, values: Tensor) -> Tensor:
        return values.sum(self._dim, keepdim=True)


class Smooth:
    """A smooth function of each sample's values, such as a normalisation.

    Parameters
    ----------
    function : callable
        Of one tensor, each sample by itself; differentiable by autograd.
    h : float
    dtype : torch.dtype
        Of the differences.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], h: float, dtype: torch.dtype):
        self._function, self._h, self._dtype = function, h, dtype
        self._wide = subtraction_dtype(dtype)

    def clean(self, inputs: Parts) -> Tensor:
        values = total(inputs)
        self._point, self._output = self._recorded(values.to(self._wide))
        return self._output.detach().to(values.dtype)

    def clean_gradient(self, gradients: Parts) -> Tensor:
        gradient = total(gradients)
        self._gradient = gradient.to(self._wide)
        (before,) = torch.autograd.grad(self._output, self._point, self._gradient)
        self._before = before
        self._point, self._output = self._point.detach(), self._output.detach()
        return before.to(gradient.dtype)

    def forward(self, deltas: Parts) -> Tensor:
        delta = by_probe(total(deltas).to(self._wide), self._point)
        shifted = (self._point + self._h * delta).flatten(0, 1)
        self._shifted, self._shifted_output = self._recorded(shifted)
        change = by_probe(self._shifted_output.detach(), self._output) - self._output
        return (change / self._h).flatten(0, 1).to(self._dtype)

    def backward(self, gammas: Parts) -> Tensor:
        gamma = by_probe(total(gammas).to(self._wide), self._gradient)
        gradient = (gamma + self._gradient / self._h).flatten(0, 1)
        (after,) = torch.autograd.grad(self._shifted_output, self._shifted, gradient)
        del self._shifted, self._shifted_output
        result = by_probe(after, self._before) - self._before / self._h
        return result.flatten(0, 1).to(self._dtype)

    def _recorded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = values.detach().requires_grad_(True)
            return point, self._function(point)


class Concatenate:
    """Values joined along a dimension other than that of the samples.

    Parameters
    ----------
    dim : int
        Negative, counted from the last dimension.
    constants : sequence of Tensor or None
        One for each piece: None for a value, else its constant row, (1, …).
    """

    def __init__(self, dim: int, constants: Sequence[Tensor | None]):
        self._dim, self._constants = dim, constants

    def clean(self, *inputs: Parts) -> Tensor:
        values = [total(parts) for parts in inputs]
        pieces = self._pieces(values)
        self._ends = [0, *accumulate(piece.shape[self._dim] for piece in pieces)]
        return torch.cat(pieces, self._dim)

    def forward(self, *deltas: Parts) -> Tensor:
        values = [total(parts) for parts in deltas]
        return torch.cat(self._pieces(values, moving=True), self._dim)

    def clean_gradient(self, gradients: Parts) -> tuple[Tensor, ...]:
        gradient = total(gradients)
        return tuple(
            gradient.narrow(self._dim, start, end - start)
            for (start, end), constant in zip(pairwise(self._ends), self._constants, strict=True)
            if constant is None
        )

    backward = clean_gradient

    def _pieces(self, values: Sequence[Tensor], moving: bool = False) -> list[Tensor]:
        left = iter(values)
        pieces = []
        for constant in self._constants:
            if constant is None:
                pieces.append(next(left))
                continue
            row = constant.to(values[0].dtype)
            row = torch.zeros_like(row) if moving else row
            pieces.append(row.expand(len(values[0]), *row.shape[1:]))
        return pieces
