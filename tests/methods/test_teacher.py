"""The teacher: frozen, no part of the method; its hooks go; its losses against closed forms, autograd and each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import CheckpointError, InputError, UnknownNameError
from qlab.methods import create
from qlab.methods.teacher import GIVEN, Teacher, attention, distribution, features, kd, over_places, places, rbd
from qlab.quantizers import Sign, quantize
from tests.methods.conftest import moons, small_net, train

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


# ---- the frozen net -------------------------------------------------------------------------------------------------


def test_teacher_is_a_frozen_copy_in_eval_mode_whose_buffers_never_change() -> None:
    net = small_net().train()
    teacher = Teacher(net)
    before = state(teacher.net)
    x = torch.randn(8, 2, requires_grad=True)
    logits, found = teacher(x, ["hidden.1"])
    assert not logits.requires_grad
    assert not found["hidden.1"].requires_grad
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert not any(m.training for m in teacher.net.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.net.state_dict().items())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(logits, net.eval()(x).detach())


def test_teacher_is_no_part_of_a_method_that_holds_it() -> None:
    method = create("ste", small_net())
    names, parameters = set(method.state_dict()), list(method.parameters())
    method.teacher = Teacher(small_net())
    method.double().train()
    assert set(method.state_dict()) == names
    assert len(list(method.parameters())) == len(parameters)
    assert not method.teacher.net.training


def test_teacher_follows_the_batch_to_its_precision() -> None:
    teacher = Teacher(small_net())
    x = draw(4, 2)
    logits, _ = teacher(x)
    assert logits.dtype == F64
    assert torch.allclose(logits.float(), small_net().eval()(x.float()), atol=1e-5)


def test_checkpoint_of_a_method_teaches_with_its_deployed_net(tmp_path: Path) -> None:
    run = train("ste", epochs=1)
    path = str(run.save(tmp_path) / "checkpoint.ckpt")
    x = moons().calibration(1)[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    logits, _ = Teacher(path)(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits, run.deployed(x))
    assert torch.equal(Teacher(run.method)(x)[0], logits)


def test_source_is_a_path_a_net_or_none() -> None:
    net = small_net()
    assert Teacher.of(None) is None
    assert Teacher.name_of(net) == GIVEN
    assert Teacher.name_of("a.ckpt") == "a.ckpt"
    assert Teacher.name_of(None) is None
    with pytest.raises(InputError, match="path of a checkpoint"):
        Teacher.of(3)  # type: ignore[arg-type]


def test_teacher_that_is_not_there_is_said_when_it_is_needed() -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Teacher("nowhere.ckpt")(torch.zeros(1, 2))
    with pytest.raises(InputError, match="teacher=net"):
        Teacher(GIVEN)(torch.zeros(1, 2))


# ---- representations ------------------------------------------------------------------------------------------------


def test_features_are_the_outputs_and_the_hooks_go() -> None:
    net = small_net().eval()
    x = torch.randn(5, 2)
    with features(net, ["hidden.0", "hidden.1"]) as found:
        net(x)
    assert torch.equal(found["hidden.0"], net.hidden[0](x))
    assert torch.equal(found["hidden.1"], net.hidden[1](net.hidden[0](x)))
    assert not any(m._forward_hooks for m in net.modules())
    kept = found["hidden.0"]
    net(2 * x)
    assert found["hidden.0"] is kept


def test_hooks_go_after_an_error_too() -> None:
    net = small_net()
    with pytest.raises(InputError), features(net, ["hidden.0"]):
        net(torch.randn(5, 3))
    assert not any(m._forward_hooks for m in net.modules())


def test_place_that_is_not_there_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"hidden\.0"), features(small_net(), ["hiden.0"]):
        pass
    with pytest.raises(UnknownNameError, match="place in the net"):
        Teacher(small_net())(torch.zeros(1, 2), ["nowhere"])


def test_places_are_blocks_and_in_a_plain_chain_the_norms() -> None:
    bireal = qlab.build("bireal18", (1, 8, 8), 10, width=2)
    student = quantize(bireal, Sign, keep=("first", "last"))
    assert places(student) == [f"stages.{i}.{j}" for i in range(4) for j in range(4)]
    assert places(bireal) == ["stem.1", *places(student), "fc"]
    chain = quantize(small_net(), Sign, Sign, keep=("first", "last"))
    assert places(chain) == ["hidden.4"]
    assert places(small_net()) == ["hidden.1", "hidden.4", "fc.1"]
    vgg = qlab.build("vgg_small", (1, 8, 8), 10, width=2)
    assert places(vgg)[:2] == ["features.1", "features.5"]
    lone = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert places(lone) == ["0", "2"]


def test_student_and_teacher_of_one_topology_match_at_every_place() -> None:
    plain = qlab.build("bireal18", (1, 8, 8), 10, width=2, seed=0)
    student = quantize(plain, Sign, Sign, keep=("first", "last"))
    x = torch.randn(3, 1, 8, 8)
    at = places(student)
    with features(student, at) as h:
        student(x)
    _, H = Teacher(plain)(x, at)
    assert [h[p].shape for p in at] == [H[p].shape for p in at]
    loss = over_places(rbd, h, H)
    assert torch.allclose(loss, torch.stack([rbd(h[p], H[p]) for p in at]).mean())
    with pytest.raises(InputError, match="no place"):
        over_places(rbd, {}, H)


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_kd_is_the_scaled_divergence_and_zero_at_the_teacher(T: float) -> None:
    s, t = draw(6, 5), draw(6, 5, seed=1)
    p, q = torch.softmax(t / T, 1), torch.softmax(s / T, 1)
    assert torch.allclose(kd(s, t, T), T**2 * (p * (p / q).log()).sum(1).mean(), rtol=1e-12)
    assert abs(float(kd(t, t, T))) < 1e-14
    assert torch.allclose(kd(s + 3, t - 2, T), kd(s, t, T))
    assert torch.autograd.gradcheck(lambda z: kd(z, t, T), s.requires_grad_())


def test_distribution_has_the_gradient_of_the_divergence_and_uses_no_labels() -> None:
    s, t = draw(6, 5).requires_grad_(), draw(6, 5, seed=1)
    (soft,) = torch.autograd.grad(distribution(s, t), s)
    (divergence,) = torch.autograd.grad(kd(s, t), s)
    assert torch.allclose(soft, divergence, atol=1e-15)
    entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1).mean()
    assert torch.allclose(distribution(s, t) - kd(s, t), entropy)


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_attention_is_scale_invariant_zero_for_equal_maps_and_blind_to_channels(norm: str) -> None:
    h, H = draw(4, 3, 5, 5), draw(4, 7, 5, 5, seed=1)
    loss = attention(h, H, norm)
    assert torch.allclose(attention(2.5 * h, 0.1 * H, norm), loss, rtol=1e-12)
    assert attention(h, h.flip(1), norm) < 1e-28
    q, Q = h.square().mean(1), H.square().mean(1)
    total = 0.0
    for a, b in zip(q, Q, strict=True):
        size = torch.max if norm == "max" else torch.linalg.matrix_norm
        total += float((a / size(a) - b / size(b)).square().sum())
    assert float(loss) == pytest.approx(total / q.numel(), rel=1e-12)
    assert torch.isfinite(attention(torch.zeros_like(h), H, norm))


def test_rbd_is_two_minus_two_cosines_in_zero_to_four() -> None:
    h, H = draw(9, 3, 4, 4), draw(9, 3, 4, 4, seed=1)
    cosine = torch.cosine_similarity(h.flatten(1), H.flatten(1))
    assert torch.allclose(rbd(h, H), (2 - 2 * cosine).mean(), rtol=1e-12)
    for i in range(9):
        assert 0 <= float(rbd(h[i : i + 1], H[i : i + 1])) <= 4
    assert float(rbd(h, 3 * h)) < 1e-28
    assert float(rbd(h, -3 * h)) == pytest.approx(4)
    assert torch.allclose(rbd(7 * h, 0.2 * H), rbd(h, H), rtol=1e-12)
    assert float(rbd(h, H)) > 0.5


def test_gradient_of_rbd_is_orthogonal_to_the_representation_and_is_right() -> None:
    h, H = draw(5, 3, 2, 2).requires_grad_(), draw(5, 3, 2, 2, seed=1)
    (g,) = torch.autograd.grad(rbd(h, H), h)
    assert (g * h).flatten(1).sum(1).abs().max() < 1e-14
    assert g.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda z: rbd(z, H), h)
    assert torch.autograd.gradcheck(lambda z: rbd(z, H, maps=True), h)


def test_losses_refuse_what_does_not_go_together() -> None:
    for loss in (kd, distribution):
        with pytest.raises(InputError, match="shapes"):
            loss(draw(3, 2), draw(3, 4))
    with pytest.raises(InputError, match="temperature"):
        kd(draw(3, 2), draw(3, 2), 0.0)
    with pytest.raises(InputError, match="topology"):
        rbd(draw(3, 2), draw(3, 4))
    with pytest.raises(InputError, match="positions"):
        attention(draw(3, 2), draw(3, 2))
    with pytest.raises(InputError, match="norm"):
        attention(draw(3, 2, 2), draw(3, 2, 2), "l1")  # type: ignore[arg-type]


def test_a_representation_is_not_changed_by_a_nonlinearity_that_works_in_place() -> None:
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(inplace), nn.Linear(8, 2)).double()

    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Teacher(net(True))(x, ["1"])[1]["1"], Teacher(net(False))(x, ["1"])[1]["1"])
