r"""How a difference passes through a layer, and back.

Difference propagation carries, for a step h along a probe v,

.. math::

    δ = (a(x + h v) - a(x)) / h      \qquad      Γ = (G(x + h v) - G(x)) / h

where :math:`a` is an activation and :math:`G` the gradient of the loss with respect to it. The
clean pass, once per sample and in full precision, goes through `clean` and back through
`clean_gradient`, which keep what the differences will need; every probe then goes through `forward`
and back through `backward`, in whatever precision is fast.

* A linear layer acts on δ as it is, without bias, and on Γ by its transpose.
* A pointwise function φ gives δ' = (φ(a + hδ) − φ(a))/h and, on the way back,
  Γ = φ'(a + hδ) Γ' + (φ'(a + hδ) − φ'(a)) G'/h.
* For ReLU both have closed forms without a subtraction of nearly equal numbers; see
  `daskcurv.estimators.kernels`.

As no two large numbers are subtracted, a relative rounding error of the arithmetic stays a relative
error of that size in the result.

Samples are the first dimension of every tensor: N of them in the clean pass, P·N (probe by probe)
for the differences of P probes. A value is a list of *parts*, tensors whose sum it is: adding is
left to the layer that reads the sum, which can do it on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from daskcurv.estimators.kernels import Kernels, dense, layout, total

Parts = list[Tensor]


class Layer(Protocol):
    """One operation of a network; what it keeps belongs to the latest clean pass.

    An operation of several values takes the parts of each, and returns a gradient for each.
    """

    @property
    def clean(self) -> Callable[..., Tensor]:
        """Return the output, bias included."""
        ...

    @property
    def clean_gradient(self) -> Callable[[Parts], Tensor | tuple[Tensor, ...]]:
        """Return the gradient of the input, given that of the output."""
        ...

    @property
    def forward(self) -> Callable[..., Tensor]:
        """Return the difference of the output."""
        ...

    @property
    def backward(self) -> Callable[[Parts], Tensor | tuple[Tensor, ...]]:
        """Return the gradient difference of the input, given that of the output."""
        ...


class Shift:
    """A constant added to a value or subtracted from it; differences do not notice.

    Parameters
    ----------
    function : callable
        Of one tensor.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function

    def clean(self, inputs: Parts) -> Tensor:
        return self._function(total(inputs))

    def clean_gradient(self, gradients: Parts) -> Tensor:
        return total(gradients)

    def forward(self, deltas: Parts) -> Tensor:
        return total(deltas)

    backward = clean_gradient


class Linear:
    """A linear function without a weight of its own: pooling, reshaping, scaling.

    Parameters
    ----------
    function : callable
        Of one tensor, in the dtype of its argument, each sample by itself.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function

    def clean(self, inputs: Parts) -> Tensor:
        values = total(inputs)
        output = self._function(values)
        self._shape = values.shape[1:]
        self._rows = len(values), len(output)  # windows, say, of a sample
        return output

    def clean_gradient(self, gradients: Parts) -> Tensor:
        gradient = total(gradients)
        with torch.enable_grad():
            # The derivative is the same everywhere, so it is taken at 0.
            rows = len(gradient) * self._rows[0] // self._rows[1]
            origin = gradient.new_zeros((rows, *self._shape)).requires_grad_(True)
            output = self._function(origin)
        (result,) = torch.autograd.grad(output, origin, gradient)
        return result

    def forward(self, deltas: Parts) -> Tensor:
        return self._function(total(deltas))

    backward = clean_gradient


class Affine:
    """A convolution or matrix product.

    Parameters
    ----------
    weight : Tensor
    bias : Tensor or None
    dtype : torch.dtype
        Of the differences.
    settings : dict, optional
        Of a convolution: its stride, padding, dilation and groups. None for a matrix product.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        settings: dict[str, Any] | None = None,
    ):
        weight = weight.detach()
        self._weight, self._bias = dense(weight), bias
        self._low = dense(weight.to(dtype))
        self._settings = settings
        if settings is not None:
            unused = {"transposed": False, "output_padding": [0] * (weight.ndim - 2)}
            self._settings = {**settings, **unused}

    def clean(self, inputs: Parts) -> Tensor:
        values = total(inputs)
        self._shape = values.shape[1:]
        return self._apply(values, self._weight, self._bias)

    def clean_gradient(self, gradients: Parts) -> Tensor:
        return self._transpose(total(gradients), self._weight)

    def forward(self, deltas: Parts) -> Tensor:
        return self._apply(total(deltas), self._low, None)

    def backward(self, gammas: Parts) -> Tensor:
        return self._transpose(total(gammas), self._low)

    def _apply(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._settings is None:
            return F.linear(values, weight, bias)
        result: Tensor = torch.ops.aten.convolution(values, weight, bias, **self._settings)
        return result

    def _transpose(self, values: Tensor, weight: Tensor) -> Tensor:
        if self._settings is None:
            return values @ weight
        # Only the shape and layout of the input are looked at; its memory is never touched.
        shape = len(values), *self._shape
        unread = torch.empty(
            shape,
            dtype=values.dtype,
            device=values.device,
            memory_format=layout(len(shape), values.dtype, values.device),
        )
        gradient: Tensor
        gradient, _, _ = torch.ops.aten.convolution_backward(
            values, unread, weight, None, **self._settings, output_mask=[True, False, False]
        )
        return gradient


class Rectifier:
    """ReLU."""

    def __init__(self, h: float, dtype: torch.dtype, kernels: Kernels):
        self._h, self._dtype, self._kernels = h, dtype, kernels

    def clean(self, inputs: Parts) -> Tensor:
        output, self._clean_scaled = self._kernels.clean_rectify(inputs, self._h, self._dtype)
        self._scaled = dense(self._clean_scaled)
        return output

    def clean_gradient(self, gradients: Parts) -> Tensor:
        before, gradient = self._kernels.clean_rectify_gradient(
            gradients, self._clean_scaled, self._h
        )
        del self._clean_scaled
        self._gradient = dense(gradient)
        return before

    def forward(self, deltas: Parts) -> Tensor:
        self._rectified = self._kernels.rectify(deltas, self._scaled)
        return self._rectified

    def backward(self, gammas: Parts) -> Tensor:
        before = self._kernels.rectify_gradient(
            gammas, self._rectified, self._scaled, self._gradient
        )
        del self._rectified
        return before


class Pointwise:
    """A function applied to every element.

    Unlike ReLU's, its differences are taken by subtraction, in float32 if the differences are
    bfloat16 (rounding then costs about 1e-4) and in float64 otherwise.

    Parameters
    ----------
    function : callable
        Differentiable by autograd.
    h : float
    dtype : torch.dtype
        Of the differences.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], h: float, dtype: torch.dtype):
        self._function, self._h, self._dtype = function, h, dtype
        self._wide = subtraction_dtype(dtype)

    def clean(self, inputs: Parts) -> Tensor:
        values = total(inputs)
        self._values = values.to(self._wide)
        output, self._slope = self._with_slope(self._values)
        self._output = output
        return output.to(values.dtype)

    def clean_gradient(self, gradients: Parts) -> Tensor:
        gradient = total(gradients)
        self._gradient = gradient.to(self._wide) / self._h
        return (gradient * self._slope).to(gradient.dtype)

    def forward(self, deltas: Parts) -> Tensor:
        shifted = by_probe(total(deltas).to(self._wide), self._values) * self._h + self._values
        output, self._shifted_slope = self._with_slope(shifted)
        return ((output - self._output) / self._h).flatten(0, 1).to(self._dtype)

    def backward(self, gammas: Parts) -> Tensor:
        gamma = by_probe(total(gammas).to(self._wide), self._values)
        slope = self._shifted_slope
        before = slope * gamma + (slope - self._slope) * self._gradient
        return before.flatten(0, 1).to(self._dtype)

    def _with_slope(self, values: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = values.detach().requires_grad_(True)
            output = self._function(point)
        (slope,) = torch.autograd.grad(output, point, torch.ones_like(output))
        return output.detach(), slope


class MaxPool:
    """Max-pooling of images.

    The maximum of a window may pass from one pixel i to another, j. With the clean values a,
    δ' = δ_j + (a_j − a_i)/h, and on the way back Γ' and G'/h go to j, less G'/h to i.

    Parameters
    ----------
    pool : callable
        Returns the maxima and their flat positions within each image, both (N, C, H', W').
    h : float
    dtype : torch.dtype
        Of the differences.
    """

    def __init__(
        self, pool: Callable[[Tensor], tuple[Tensor, Tensor]], h: float, dtype: torch.dtype
    ):
        self._pool, self._h, self._dtype = pool, h, dtype

    def clean(self, inputs: Parts) -> Tensor:
        self._values = total(inputs)
        output, self._source = self._pool(self._values)
        self._output = output
        return output

    def clean_gradient(self, gradients: Parts) -> Tensor:
        gradient = total(gradients)
        self._gradient = gradient / self._h
        return _scatter(gradient, self._source, self._values)

    def forward(self, deltas: Parts) -> Tensor:
        delta = total(deltas).to(self._values.dtype)
        values = self._repeated(self._values, delta)
        _, self._shifted_source = self._pool(values + self._h * delta)
        rise = _gather(values, self._shifted_source) - self._repeated(self._output, delta)
        return (_gather(delta, self._shifted_source) + rise / self._h).to(self._dtype)

    def backward(self, gammas: Parts) -> Tensor:
        gamma = total(gammas).to(self._values.dtype)
        before, now = self._repeated(self._source, gamma), self._shifted_source
        # Where the maximum stayed, G/h would be added and subtracted again: leave it out.
        moved = torch.where(before == now, 0.0, self._repeated(self._gradient, gamma))
        like = self._repeated(self._values, gamma)
        result = _scatter(gamma + moved, now, like) - _scatter(moved, before, like)
        return result.to(self._dtype)

    @staticmethod
    def _repeated(clean: Tensor, like: Tensor) -> Tensor:
        return clean.repeat(len(like) // len(clean), 1, 1, 1)


def subtraction_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to subtract in where there is no closed form, given the differences'."""
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


def by_probe(values: Tensor, clean: Tensor) -> Tensor:
    """Return a view with a dimension for the probes in front, so that `clean` broadcasts."""
    return values.reshape(-1, *clean.shape)


def _gather(images: Tensor, positions: Tensor) -> Tensor:
    return images.flatten(2).gather(2, positions.flatten(2)).view_as(positions)


def _scatter(values: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    result = torch.zeros_like(like, memory_format=torch.contiguous_format).flatten(2)
    return result.scatter_add_(2, positions.flatten(2), values.flatten(2)).view(like.shape)
