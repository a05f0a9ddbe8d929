r"""A frozen float teacher beside a student in training: its logits, its representations, and the losses that compare them.

    z_t, H = teacher(x, places)             teacher, without gradients
    with features(student, places) as h:    student, with gradients
        z_s = student(x)

    kd             T^2 KL( softmax(z_t / T) || softmax(z_s / T) )
    distribution   - mean sum_c softmax(z_t)_c log softmax(z_s)_c                        (no labels; T = 1)
    attention      mean (q_s - q_t)^2,  q = a / max a  or  a / ||a||,  a = mean_c A_c^2  (a map for each sample)
    rbd            mean || H / ||H|| - h / ||h|| ||^2 = mean (2 - 2 cos(H, h))           (flattened for each sample)

The teacher is no part of the method: it is not in its parameters or its state, is in eval mode whatever the method is in, and
nothing of it ever changes. It follows the batch to its device and its precision. Representations are compared at matched
places, the outputs of modules that carry the same name in both nets; `places(student)` names the block of every quantized
layer.

Source: Hinton, Vinyals, Dean, arXiv 1503.02531 (kd); Liu et al., ReActNet, ECCV 2020, arXiv 2003.03488 (distribution);
Martinez, Yang, Bulat, Tzimiropoulos, Real-to-Binary, ICLR 2020, arXiv 2003.11535 (attention); Qin et al., DIR-Net, IJCV
2023, arXiv 2109.12338 (rbd; the exact formula is a reconstruction).

Shapes: logits (N, classes), representations (N, C, ...).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.errors import InputError, UnknownNameError
from qlab.methods import checkpoints
from qlab.methods.base import Method
from qlab.quantizers import NONLINEARITIES, Quantizer, layers, quantized_tensors

__all__ = ["GIVEN", "Teacher", "attention", "distribution", "features", "kd", "over_places", "places", "rbd"]

GIVEN = "given"
"""What the hyperparameters hold in place of a teacher net that was passed directly."""


class Teacher:
    """A frozen net; deliberately no `nn.Module`, so that a method that holds one does not register it.

    A method takes it as a hyperparameter and keeps the name alone, before it calls the base constructor:

        self.__dict__["_teacher"] = Teacher.of(teacher)
        teacher = Teacher.name_of(teacher)      # a path, "given" or None: this is what the checkpoint holds

    A checkpoint is read at the first use: a method is loaded for evaluation without its teacher.

    Args:
        source: the path of a checkpoint of qlab (of a method of any kind: its deployed net teaches), a method, a plain net
            (it is copied), or "given", for a net that has to be passed again before training goes on.
    """

    def __init__(self, source: str | nn.Module) -> None:
        self.source = source if isinstance(source, str) else GIVEN
        self._net = None if isinstance(source, str) else _frozen(source)

    @staticmethod
    def of(source: str | nn.Module | None) -> Teacher | None:
        """Return the teacher of a hyperparameter; None for None.

        Raises:
            InputError: for what is none of these.
        """
        if source is not None and not isinstance(source, str | nn.Module):
            raise InputError(f"teacher must be the path of a checkpoint, a net or None, not {source!r}")
        return None if source is None else Teacher(source)

    @staticmethod
    def name_of(source: str | nn.Module | None) -> str | None:
        """Return what stands for a teacher in the hyperparameters: its path, "given", or None."""
        return GIVEN if isinstance(source, nn.Module) else source

    @property
    def net(self) -> nn.Module:
        """The frozen net, read from its checkpoint where that has not happened yet.

        Raises:
            InputError: where the net was passed directly and is not here any more.
            CheckpointError: for a checkpoint that is missing or does not fit.
        """
        if self._net is None:
            if self.source == GIVEN:
                raise InputError(
                    "this method was trained with a teacher net that its checkpoint does not hold; to train on, pass the "
                    "net again: teacher=net"
                )
            with torch.random.fork_rng(devices=[]):  # the net is built anew before its weights are read
                self._net = _frozen(checkpoints.load(self.source))
        return self._net

    @torch.no_grad()
    def __call__(self, x: Tensor, places: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits (N, classes) and the outputs at `places`, all without gradients.

        Raises:
            UnknownNameError: for a place that the teacher does not have.
        """
        net = self.net
        first = next(net.parameters(), None)
        dtype = x.dtype if x.is_floating_point() else None
        if first is not None and (first.device != x.device or first.dtype != (dtype or first.dtype)):
            net.to(device=x.device, dtype=dtype)
        with features(net, places) as found:
            logits = net(x)
        return logits, dict(found)


def _frozen(source: nn.Module) -> nn.Module:
    net = source.deployed() if isinstance(source, Method) else copy.deepcopy(source)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ representations


@contextmanager
def features(net: nn.Module, places: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules named `places` while the net runs inside the `with` block; the hooks go with it.

    Of a module that runs more than once the last output stays.

    Raises:
        UnknownNameError: for a name that the net does not have.
    """
    modules = dict(net.named_modules())
    places = list(places)
    for place in places:
        if place not in modules:
            raise UnknownNameError("place in the net", place, list(modules))
    found: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[[nn.Module, object, Tensor], None]:
        # A copy: a nonlinearity behind the place may work in place and would change what was collected.
        return lambda module, inputs, output: found.__setitem__(place, output.clone())

    handles = []
    try:
        for place in places:
            handles.append(modules[place].register_forward_hook(keep(place)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def places(net: nn.Module) -> list[str]:
    """Return the places at which a student is compared: for every quantized layer (for every layer of a float net) its block.

    That is the innermost module around it that is neither the net nor a plain container, such as a residual unit with its
    shortcut. A layer in a plain chain has no block: then it is the batch norm behind it, or else the layer itself.
    """
    names = list(dict.fromkeys(t.name for t in quantized_tensors(net) if not t.name.endswith(".bias")))
    return list(dict.fromkeys(_place(net, name) for name in names or layers(net)))


def _place(net: nn.Module, layer: str) -> str:
    block = layer.rpartition(".")[0]
    while block and isinstance(net.get_submodule(block), nn.Sequential | nn.ModuleList):
        block = block.rpartition(".")[0]
    if block:
        return block
    container, _, own = layer.rpartition(".")
    siblings = list(net.get_submodule(container).named_children())
    place = layer
    for name, module in siblings[[n for n, _ in siblings].index(own) + 1 :]:
        if isinstance(module, (Quantizer, nn.PReLU, *NONLINEARITIES)) or layers(module):
            break
        if isinstance(module, _BatchNorm):
            place = f"{container}.{name}" if container else name
    return place


def over_places(
    loss: Callable[[Tensor, Tensor], Tensor], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean of `loss(student, teacher)` over the places.

    Raises:
        InputError: where there is no place to compare.
    """
    if not student:
        raise InputError("there is no place at which student and teacher could be compared; name at least one module")
    return torch.stack([loss(h, teacher[place]) for place, h in student.items()]).mean()


# --------------------------------------------------------------------------------------------------------------- losses


def kd(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the mean over samples; T^2 keeps the size of the gradient.

    Args:
        logits: z_s (N, classes).
        teacher_logits: z_t, of the same shape.
        temperature: T > 0.

    Raises:
        InputError: for shapes that differ or a temperature that is not positive.
    """
    _same_shape("logits", logits, teacher_logits)
    T = temperature
    if not T > 0:
        raise InputError(f"the temperature must be positive, not {T!r}")
    log_student, log_teacher = F.log_softmax(logits / T, 1), F.log_softmax(teacher_logits / T, 1)
    return T**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def distribution(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return - mean sum_c softmax(z_t)_c log softmax(z_s)_c: `kd` at T = 1 plus the teacher's entropy.

    Args:
        logits: z_s (N, classes).
        teacher_logits: z_t, of the same shape.

    Raises:
        InputError: for shapes that differ.
    """
    _same_shape("logits", logits, teacher_logits)
    return F.cross_entropy(logits, teacher_logits.softmax(1))


def attention(h: Tensor, H: Tensor, norm: Literal["max", "l2"] = "l2") -> Tensor:
    """Return the mean over samples and positions of (q_s - q_t)^2 of the attention maps; the numbers of channels may differ.

    Args:
        h: of the student, (N, C, ...) with at least one dimension of positions.
        H: of the teacher, (N, C', ...).
        norm: what a map is divided by: its largest value, or its length.

    Raises:
        InputError: for shapes that do not go together, or an unknown norm.
    """
    if norm not in ("max", "l2"):
        raise InputError(f"norm must be 'max' or 'l2', not {norm!r}")
    q, Q = attention_map(h), attention_map(H)
    _same_shape("attention maps", q, Q)
    return (_divided(q, norm) - _divided(Q, norm)).square().mean()


def attention_map(h: Tensor) -> Tensor:
    """Return mean_c h_c^2 as (N, positions) of representations (N, C, ...)."""
    if h.dim() < 3:
        raise InputError(
            f"an attention map needs positions: the representation has shape {tuple(h.shape)}, expected (N, C, ...)"
        )
    return h.square().mean(1).flatten(1)


def _divided(q: Tensor, norm: Literal["max", "l2"]) -> Tensor:
    size = q.amax(1, keepdim=True) if norm == "max" else q.norm(dim=1, keepdim=True)
    return q / size.clamp(min=torch.finfo(q.dtype).tiny)  # a map of zeros stays one


def rbd(h: Tensor, H: Tensor, maps: bool = False) -> Tensor:
    """Return the mean over samples of || H / ||H|| - h / ||h|| ||^2 = 2 - 2 cos(H, h), in [0, 4].

    Args:
        h: of the student, (N, ...), flattened for each sample.
        H: of the teacher, of the same shape.
        maps: compare the attention maps instead.

    Raises:
        InputError: for shapes that do not go together.
    """
    r, R = (attention_map(h), attention_map(H)) if maps else (h.flatten(1), H.flatten(1))
    _same_shape("representations", r, R)
    return (F.normalize(R, dim=1) - F.normalize(r, dim=1)).square().sum(1).mean()


def _same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"{what} of student and teacher have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; expected the same: "
            "a teacher of the student's topology"
        )
