r"""Eigenvalues, singular values and spectral densities of matrices that are only known by their products with vectors.

Lanczos' recursion builds an orthonormal basis Q of the Krylov space of a symmetric H and the tridiagonal T = Q' H Q:

    w_j = H q_j - beta_{j-1} q_{j-1} - alpha_j q_j,    alpha_j = q_j' H q_j,    beta_j = ||w_j||,    q_{j+1} = w_j / beta_j

Rounding makes Q lose its orthogonality as soon as an eigenvalue has converged, and copies of it appear in T; so every new vector
is orthogonalised twice against all earlier ones. With T = U diag(theta) U':

    spectrum    theta_i are eigenvalues of H for as many steps as H has rows, and its extreme ones long before
    quadrature  v' f(H) v = ||v||^2 sum_i U_{1i}^2 f(theta_i), exactly for polynomials of degree 2m - 1; sum_i U_{1i}^2 = 1
    density     (1/R) sum_r sum_i U_{1i}^2 N(t; theta_i, sigma^2) over R random starts

A block of starts finds multiple eigenvalues too, which a single start cannot.

Shapes: products map (B, n) -> (B, n), a vector per row.

Source: Golub, Meurant, Matrices, Moments and Quadrature, 2010; Golub, Kahan 1965; Ghorbani et al. 2019, arXiv 1901.10159;
Yao et al., PyHessian, arXiv 1912.07145 (power iteration, its stopping rule, the width of the density).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.errors import InputError

__all__ = ["Extremes", "block_lanczos", "density", "golub_kahan", "lanczos", "power_iteration", "quadrature", "width"]

Products = Callable[[Tensor], Tensor]
"""(B, n) -> (B, n): every row times the matrix."""


@dataclass(frozen=True)
class Extremes:
    """The eigenvalues of largest magnitude, signed, largest magnitude first.

    Attributes:
        values: (k,) eigenvalues.
        vectors: (k, n) unit eigenvectors.
        residuals: (k,) ||H v - lambda v||: each value is within it of an eigenvalue of H.
        products: vectors that were multiplied.
        converged: whether the relative change fell below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def lanczos(products: Products, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the tridiagonal matrices of Lanczos' recursion: alpha (R, m) and beta (R, m - 1), one run per start.

    A run whose Krylov space is exhausted goes on with beta = 0 there: its later nodes have weight 0.

    Args:
        products: of a symmetric matrix.
        start: (R, n), not zero; each row is a run of its own.
        steps: m; more than n are cut to n.

    Raises:
        InputError: a zero start or no steps.
    """
    if steps < 1:
        raise InputError(f"Lanczos needs at least one step, not {steps}")
    norms = start.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise InputError("a start vector of Lanczos is zero")
    runs, n = start.shape
    steps = min(steps, n)
    basis = start.new_zeros(runs, steps, n)
    basis[:, 0] = start / norms
    alpha, beta = start.new_zeros(runs, steps), start.new_zeros(runs, max(steps - 1, 0))
    scale = start.new_zeros(runs)
    for j in range(steps):
        w = products(basis[:, j])
        alpha[:, j] = (w * basis[:, j]).sum(1)
        scale = torch.maximum(scale, w.norm(dim=1))
        if j + 1 == steps:
            break
        known = basis[:, : j + 1]
        for _ in range(2):
            w = w - (known.transpose(1, 2) @ (known @ w[:, :, None]))[:, :, 0]
        b = w.norm(dim=1)
        # What is left of an exhausted space is rounding. A zero vector in its place keeps T block diagonal.
        alive = b > 64 * n**0.5 * torch.finfo(w.dtype).eps * scale
        beta[:, j] = torch.where(alive, b, 0)
        basis[:, j + 1] = torch.where(alive[:, None], w / b.clamp(min=torch.finfo(w.dtype).tiny)[:, None], 0)
    return alpha, beta


def quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nodes theta (R, m), ascending, and weights U_{1i}^2 (R, m) of Gauss quadrature for each run's spectral measure."""
    T = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    theta, U = torch.linalg.eigh(T.double())
    return theta, U[:, 0].square()


def width(nodes: Tensor, sigma2: float | None = None) -> float:
    """Return sigma^2 of the density's Gaussians: as given, or 1e-5 max(1, range of the nodes), PyHessian's choice."""
    if sigma2 is not None:
        if not (math.isfinite(sigma2) and sigma2 > 0):
            raise InputError(f"sigma2 must be a positive number, not {sigma2!r}")
        return float(sigma2)
    return 1e-5 * max(1.0, float(nodes.max() - nodes.min()))


def density(nodes: Tensor, weights: Tensor, t: Tensor, sigma2: float) -> Tensor:
    """Return (1/R) sum_r sum_i w_ri N(t; theta_ri, sigma^2) at every t: shape of t."""
    z = (t.reshape(-1, 1) - nodes.reshape(1, -1)).square() / (2 * sigma2)
    values = torch.exp(-z) @ weights.reshape(-1) / (len(nodes) * math.sqrt(2 * math.pi * sigma2))
    return values.reshape(t.shape)


def power_iteration(
    products: Products,
    start: Tensor,
    tolerance: float = 1e-3,
    iterations: int = 100,
) -> Extremes:
    """Return the eigenvalues of largest magnitude by power iteration, each orthogonal to those found before (deflation).

    v <- H v / ||H v||, lambda = v' H v, until |lambda - last lambda| <= tolerance |last lambda|.

    It keeps one vector per eigenvalue; `block_lanczos` needs fewer products and all its vectors.

    Args:
        products: of a symmetric matrix.
        start: (k, n), one start per eigenvalue wanted.
        tolerance: relative change at which an eigenvalue counts as found.
        iterations: at most, for each eigenvalue.
    """
    found: list[Tensor] = []
    values, residuals, count, converged = [], [], 0, True
    for first in start[: start.shape[1]]:
        v = _unit(_orthogonal(first, found))
        value = residual = float("nan")
        done = False
        for _ in range(iterations):
            w = _orthogonal(products(v[None])[0], found)
            count += 1
            last, value = value, float(v @ w)
            residual = float((w - value * v).norm())
            done = abs(value - last) <= tolerance * abs(last)  # False for the first, whose last is NaN
            if done or not bool(w.norm() > 0):
                done = True
                break
            v = _unit(w)
        found.append(v)
        values.append(value)
        residuals.append(residual)
        converged &= done
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    make = start.new_tensor
    return Extremes(make(values)[order], torch.stack(found)[order], make(residuals)[order], count, converged)


def block_lanczos(
    products: Products,
    start: Tensor,
    tolerance: float = 1e-3,
    iterations: int = 100,
) -> Extremes:
    """Return the k eigenvalues of largest magnitude from the Krylov space of a block of k starts (Rayleigh-Ritz).

    Stops when no value changed by more than `tolerance` of the largest since the last step, and no value's residual
    ||H v - lambda v|| exceeds sqrt(tolerance) of the largest: the error of a value is at most residual^2 / gap.

    Args:
        products: of a symmetric matrix.
        start: (k, n), one start per eigenvalue wanted.
        tolerance: see above; 0 goes on until the space is exhausted.
        iterations: at most; each multiplies k vectors.
    """
    last: Extremes | None = None
    for last in _blocks(products, start, tolerance, iterations):  # noqa: B007
        pass
    assert last is not None
    return last


def _blocks(products: Products, start: Tensor, tolerance: float, iterations: int) -> Iterator[Extremes]:
    if iterations < 1 or start.dim() != 2 or not len(start):
        raise InputError(
            f"expected at least one iteration and starts (k, n); got {iterations} and {tuple(start.shape)}"
        )
    k, n = min(start.shape), start.shape[1]
    eps = torch.finfo(start.dtype).eps
    block = _basis(start[:k], start[:0], 0.0)
    kept = start.new_empty(2, min(8 * k, n), n)  # Q and H Q, in memory that grows by doubling
    used = 0
    last: Tensor | None = None
    T = start.new_zeros(0, 0, dtype=torch.float64)
    for step in range(iterations):
        if used + len(block) > kept.shape[1]:
            kept = torch.cat([kept, torch.empty_like(kept)], 1)
        kept[0, used : used + len(block)], kept[1, used : used + len(block)] = block, products(block)
        used += len(block)
        Q, HQ = kept[:, :used]
        new = (Q @ HQ[-len(block) :].T).double()  # the new columns of Q' H Q; the others are known
        old = len(T)
        T = torch.cat([torch.cat([T, new[:old].T]), new], 1)
        T[old:, old:] = (T[old:, old:] + T[old:, old:].T) / 2
        theta, U = torch.linalg.eigh(T)
        order = theta.abs().argsort(descending=True)[:k]
        values, mix = theta[order], U[:, order].T.to(start.dtype)
        vectors = mix @ Q
        residuals = (mix @ HQ - values.to(start.dtype)[:, None] * vectors).norm(dim=1)
        scale = max(float(values.abs().max()), torch.finfo(start.dtype).tiny)
        settled = len(values) == k and last is not None and float((values - last).abs().max()) <= tolerance * scale
        small = float(residuals.max()) <= math.sqrt(tolerance) * scale
        done = tolerance > 0 and settled and small
        if not done:  # the space stops growing where all of it is known; then the values are exact
            block = _basis(HQ[-len(block) :], Q, 256 * eps * max(scale, float(HQ.norm(dim=1).max())))
            done = len(Q) >= n or not len(block)
        if done or step + 1 == iterations:
            yield Extremes(values.to(start.dtype), vectors, residuals, len(Q), done)
            return
        block = block[: n - len(Q)]
        last = values if len(values) == k else None


def _basis(rows: Tensor, known: Tensor, threshold: float) -> Tensor:
    """Return orthonormal rows that span `rows` outside of `known` (orthonormal), without what is below the threshold."""
    rows = rows - (rows @ known.T) @ known
    out: list[Tensor] = []
    for row in rows:
        before = row.norm()
        for _ in range(2):
            for q in out:
                row = row - (row @ q) * q
            row = row - (known @ row) @ known
        norm = row.norm()
        if float(norm) > max(threshold, 1e-3 * torch.finfo(row.dtype).eps ** 0.5 * float(before)):
            out.append(row / norm)
    return torch.stack(out) if out else rows[:0]


def golub_kahan(forward: Products, backward: Products, start: Tensor, steps: int) -> Tensor:
    """Return singular values (R, m), descending, of R matrices A_r (p x q) at once, from m steps of bidiagonalisation.

    alpha_j v_j = A' u_j - beta_{j-1} v_{j-1},  beta_j u_{j+1} = A v_j - alpha_j u_j,  with full re-orthogonalisation; they are the
    singular values of the bidiagonal matrix of alpha and beta, all of them for m = min(p, q). Where the space is exhausted, as by
    multiple singular values, it goes on from a random vector outside of it.

    Args:
        forward: (R, q) -> (R, p), row r times A_r.
        backward: (R, p) -> (R, q), row r times A_r'.
        start: (R, p), a start on the output side for each matrix.
        steps: m.
    """
    runs, p = start.shape
    eps = torch.finfo(start.dtype).eps
    g = torch.Generator().manual_seed(0)
    U = [_rows(start)[0]]
    V: list[Tensor] = []
    alpha, beta = start.new_zeros(runs, steps), start.new_zeros(runs, steps)
    scale = start.new_zeros(runs)
    for j in range(steps):
        v, alpha[:, j] = _rows(_outside(backward(U[-1]), V), 64 * p**0.5 * eps * scale)
        V.append(_fresh(v, V, g))
        scale = torch.maximum(scale, alpha[:, j])
        u, beta[:, j] = _rows(_outside(forward(V[-1]), U), 64 * p**0.5 * eps * scale)
        U.append(_fresh(u, U, g))
        scale = torch.maximum(scale, beta[:, j])
    # A' U = V B' with B lower bidiagonal, (m + 1) x m: alpha on the diagonal, beta below it.
    B = start.new_zeros(runs, steps + 1, steps)
    at = torch.arange(steps)
    B[:, at, at], B[:, at + 1, at] = alpha, beta
    return torch.linalg.svdvals(B.double())


def _fresh(w: Tensor, basis: list[Tensor], g: torch.Generator) -> Tensor:
    """Return rows w with every zero row replaced by a random unit one outside of its basis: the space goes on elsewhere.

    The product with it has no part along what is known already, so the matrix stays bidiagonal.
    """
    gone = w.norm(dim=1) == 0
    if not bool(gone.any()) or len(basis) >= w.shape[1]:
        return w
    other = _rows(_outside(torch.randn(w.shape, generator=g, dtype=torch.float64).to(w), basis))[0]
    return torch.where(gone[:, None], other, w)


def _outside(w: Tensor, basis: list[Tensor]) -> Tensor:
    """Return rows w (R, n) without their parts along each run's basis, a list of (R, n)."""
    if basis:
        known = torch.stack(basis, 1)
        for _ in range(2):
            w = w - (known.transpose(1, 2) @ (known @ w[:, :, None]))[:, :, 0]
    return w


def _rows(w: Tensor, threshold: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return rows of unit length and their norms; rows below the threshold become zero."""
    norm = w.norm(dim=1)
    norm = torch.where(norm > threshold, norm, 0)
    return torch.where(norm[:, None] > 0, w / norm.clamp(min=torch.finfo(w.dtype).tiny)[:, None], 0), norm


def _orthogonal(w: Tensor, found: list[Tensor]) -> Tensor:
    for _ in range(2):
        for v in found:
            w = w - (w @ v) * v
    return w


def _unit(w: Tensor) -> Tensor:
    return w / w.norm().clamp(min=torch.finfo(w.dtype).tiny)
