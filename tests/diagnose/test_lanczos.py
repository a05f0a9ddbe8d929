"""Lanczos and its relatives, against numpy's dense decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlab.diagnose.lanczos import block_lanczos, density, golub_kahan, lanczos, power_iteration, quadrature, width
from qlab.errors import InputError

DIAGONAL = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5, -3.0], dtype=torch.float64))


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a + a.T) / 2


def starts(k: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_as_many_steps_as_rows_give_the_whole_spectrum_and_weights_that_sum_to_one() -> None:
    H = symmetric(40)
    nodes, weights = quadrature(*lanczos(lambda v: v @ H, starts(3, 40), 40))
    exact = torch.linalg.eigvalsh(H)
    for run in nodes:
        assert torch.allclose(run, exact, rtol=0, atol=1e-13 * 40)
    assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-13)


def test_as_many_steps_as_rows_give_the_diagonal_to_1e_13() -> None:
    nodes, weights = quadrature(*lanczos(lambda v: v @ DIAGONAL, starts(8, 5), 5))
    exact = DIAGONAL.diagonal().sort().values.expand(8, 5)
    assert torch.allclose(nodes, exact, rtol=0, atol=1e-13)
    assert torch.allclose(weights.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-13)
    v = starts(8, 5).square()
    assert torch.allclose(weights, (v / v.sum(1, keepdim=True))[:, [4, 3, 2, 1, 0]], rtol=0, atol=1e-12)


def test_the_quadrature_is_exact_for_polynomials_of_degree_2m_minus_1() -> None:
    H, m = symmetric(30) / 5, 4
    v = starts(2, 30)
    nodes, weights = quadrature(*lanczos(lambda u: u @ H, v, m))
    for degree in range(2 * m):
        power = torch.linalg.matrix_power(H, degree)
        exact = ((v @ power) * v).sum(1) / v.square().sum(1)
        assert torch.allclose((weights * nodes**degree).sum(1), exact, rtol=1e-10, atol=1e-12)
    power = torch.linalg.matrix_power(H, 2 * m)
    exact = ((v @ power) * v).sum(1) / v.square().sum(1)
    assert not torch.allclose((weights * nodes ** (2 * m)).sum(1), exact, rtol=1e-6)


def test_orthogonality_outlives_converged_eigenvalues() -> None:
    values = torch.cat([torch.tensor([1e4], dtype=torch.float64), torch.linspace(0, 1, 59, dtype=torch.float64)])
    nodes, _ = quadrature(*lanczos(lambda v: v * values, starts(1, 60), 60))
    assert int((nodes > 100).sum()) == 1  # without re-orthogonalisation 1e4 appears several times
    assert torch.allclose(nodes[0], values.sort().values, rtol=1e-10, atol=1e-10)


def test_an_exhausted_krylov_space_ends_quietly_with_the_right_measure() -> None:
    H = torch.diag(torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, 0.0], dtype=torch.float64))
    v = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    nodes, weights = quadrature(*lanczos(lambda u: u @ H, v, 6))
    assert float(weights[(nodes - 2).abs() < 1e-12].sum()) == pytest.approx(3 / 5, abs=1e-12)
    assert float(weights[(nodes + 1).abs() < 1e-12].sum()) == pytest.approx(2 / 5, abs=1e-12)


@pytest.mark.parametrize("method", [power_iteration, block_lanczos])
def test_the_largest_magnitude_of_the_diagonal_is_ten(method: object) -> None:
    found = method(lambda v: v @ DIAGONAL, starts(1, 5), tolerance=1e-12, iterations=200)  # type: ignore[operator]
    assert float(found.values[0]) == pytest.approx(10, abs=1e-9)
    assert found.converged


def test_power_iteration_and_block_lanczos_agree_with_the_dense_spectrum_sign_included() -> None:
    H = symmetric(60, seed=3)
    exact = torch.linalg.eigvalsh(H)
    exact = exact[exact.abs().argsort(descending=True)][:4]
    block = block_lanczos(lambda v: v @ H, starts(4, 60), tolerance=1e-10)
    assert torch.allclose(block.values, exact, atol=1e-8)
    power = power_iteration(lambda v: v @ H, starts(4, 60), tolerance=1e-13, iterations=20000)
    assert torch.allclose(power.values, exact, atol=1e-4)
    for found in (block, power):
        gram = found.vectors @ found.vectors.T
        assert torch.allclose(gram, torch.eye(4, dtype=torch.float64), atol=1e-8)
        assert torch.allclose(
            (found.vectors @ H - found.values[:, None] * found.vectors).norm(dim=1), found.residuals, atol=1e-3
        )


def test_every_value_is_within_its_residual_of_an_eigenvalue() -> None:
    H = symmetric(80, seed=5)
    exact = torch.linalg.eigvalsh(H)
    found = block_lanczos(lambda v: v @ H, starts(3, 80), tolerance=1e-2)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + 1e-12


def test_a_block_finds_a_double_eigenvalue() -> None:
    H = torch.diag(torch.tensor([7.0, 7.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
    found = block_lanczos(lambda v: v @ H, starts(2, 6), tolerance=1e-10)
    assert found.values.tolist() == pytest.approx([7, 7], abs=1e-9)


def test_a_zero_matrix_has_zero_eigenvalues() -> None:
    for method in (power_iteration, block_lanczos):
        found = method(torch.zeros_like, starts(2, 6))
        assert found.values.tolist() == [0, 0]


def test_more_eigenvalues_than_rows_give_all_there_are() -> None:
    found = block_lanczos(lambda v: v @ DIAGONAL, starts(9, 5), tolerance=1e-10)
    assert found.values.tolist() == pytest.approx([10, 5, -3, 1, 0.5], abs=1e-9)


def test_the_density_integrates_to_one_and_has_the_moments_of_its_nodes() -> None:
    H = symmetric(30)
    nodes, weights = quadrature(*lanczos(lambda v: v @ H, starts(4, 30), 30))
    sigma2 = width(nodes, 0.01)
    t = torch.linspace(-15, 15, 20001, dtype=torch.float64)
    p = density(nodes, weights, t, sigma2)
    assert float(torch.trapezoid(p, t)) == pytest.approx(1, abs=1e-9)
    mean = float((weights * nodes).sum(1).mean())
    assert float(torch.trapezoid(p * t, t)) == pytest.approx(mean, abs=1e-9)
    second = float((weights * nodes**2).sum(1).mean()) + sigma2
    assert float(torch.trapezoid(p * t**2, t)) == pytest.approx(second, abs=1e-8)
    assert width(nodes) == pytest.approx(1e-5 * float(nodes.max() - nodes.min()))


@pytest.mark.parametrize(("p", "q"), [(5, 12), (12, 5), (7, 7)])
def test_golub_kahan_gives_all_singular_values(p: int, q: int) -> None:
    A = torch.randn(6, p, q, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = golub_kahan(
        lambda v: (A @ v[:, :, None])[:, :, 0], lambda u: (u[:, None] @ A)[:, 0], starts(6, p), min(p, q)
    )
    exact = np.linalg.svd(A.numpy(), compute_uv=False)
    assert np.allclose(values.numpy(), exact, atol=1e-11)


def test_golub_kahan_bears_matrices_of_low_rank_beside_full_ones() -> None:
    A = torch.randn(3, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    A[1] = A[1, :, :1] @ A[1, :1]
    A[2] = 0
    values = golub_kahan(lambda v: (A @ v[:, :, None])[:, :, 0], lambda u: (u[:, None] @ A)[:, 0], starts(3, 6), 6)
    assert np.allclose(values.numpy(), np.linalg.svd(A.numpy(), compute_uv=False), atol=1e-11)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="zero"):
        lanczos(lambda v: v, torch.zeros(1, 3, dtype=torch.float64), 2)
    with pytest.raises(InputError, match="at least one step"):
        lanczos(lambda v: v, starts(1, 3), 0)
    with pytest.raises(InputError, match="sigma2"):
        width(torch.zeros(1, 2), -1.0)
    with pytest.raises(InputError, match="at least one iteration"):
        block_lanczos(lambda v: v, starts(1, 3), iterations=0)
