"""What the networks have in common: checked arguments, the spec, and the check of a batch's shape.

A spec may come out of a checkpoint that a user was handed. Its values are therefore checked one by one, and the network
is first laid out on torch's meta device, which counts its parameters exactly without allocating them.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from qlab.errors import InputError

__all__ = ["MAX_LAYERS", "MAX_PARAMETERS", "MAX_SIZE", "Net", "batch_norm", "construct", "logits"]

MAX_SIZE = 2**16  # of one dimension: a width, a channel number, an image side, a number of classes
MAX_LAYERS = 64  # entries of an option that lists layers
MAX_PARAMETERS = 2**27  # of one network (512 MiB in float32), and values of one input

_seeding = threading.Lock()  # two threads that draw seeded weights at once would share one generator


class Net(nn.Module):
    """A network that checks its arguments, carries its spec and checks the shape of its input.

    A subclass hands its arguments on to `Net.__init__` before it builds any layer.

    Args:
        input_shape: (C, H, W) or (D,); `smallest_side` says which.
        num_classes: number of logits.
        **options: the subclass's own keyword arguments, checked against the type of their defaults.

    Raises:
        InputError: a value of the wrong type or range, or an image too small for the network.
    """

    name: ClassVar[str]
    smallest_side: ClassVar[int | None] = None  # of an image, in pixels; None: takes an input of any shape

    def __init__(self, input_shape: Sequence[int], num_classes: int, **options: Any) -> None:
        super().__init__()
        self.input_shape = _checked_shape(self.name, input_shape, self.smallest_side)
        self.num_classes = _checked_size("num_classes", num_classes, smallest=2)
        defaults = _defaults(type(self))
        checked = {key: _checked_option(key, value, defaults[key]) for key, value in options.items()}
        self.spec: dict[str, Any] = {
            "name": self.name,
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            **checked,
        }
        # A hook, not a line in forward: torch.fx traces forward and so never meets the check.
        self.register_forward_pre_hook(_check_batch)


def batch_norm(channels: int, affine: bool, dimensions: int = 2) -> nn.Module:
    """Return batch norm over (N, C) for `dimensions=1` or (N, C, H, W) for 2, with scale and shift if `affine`."""
    return (nn.BatchNorm1d if dimensions == 1 else nn.BatchNorm2d)(channels, affine=affine)


def logits(features: int, num_classes: int, affine: bool, final_norm: bool) -> nn.Module:
    """Return the last layer: features (N, K) to logits (N, num_classes), with batch norm on them if `final_norm`."""
    if not final_norm:
        return nn.Linear(features, num_classes)
    return nn.Sequential(nn.Linear(features, num_classes, bias=False), batch_norm(num_classes, affine, dimensions=1))


def construct(
    kind: type[Net], input_shape: Sequence[int], num_classes: int, options: Mapping[str, Any], seed: int | None
) -> Net:
    """Build a `kind` after its arguments and its size have been found reasonable; see `qlab.models.build`."""
    known = _defaults(kind)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise InputError(f"{kind.name} has no option {unknown[0]!r}. It has: {', '.join(known)}.")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(input_shape, num_classes, **options).parameters())
    if parameters > MAX_PARAMETERS:
        raise InputError(
            f"{kind.name} of this size would have {parameters:,} parameters; at most {MAX_PARAMETERS:,} are allowed. "
            "Choose a smaller input, width or number of classes."
        )
    if seed is None:
        return kind(input_shape, num_classes, **options)
    seed = _checked_size("seed", seed, smallest=0, largest=2**63 - 1)
    with _seeding, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that would reseed the GPU's generators too, and fork_rng restores the CPU's only.
        torch.default_generator.manual_seed(seed)
        net = kind(input_shape, num_classes, **options)
    return net.to(torch.get_default_device())


def _defaults(kind: type[Net]) -> dict[str, Any]:
    """Return the options of a network (its keyword-only arguments) with their defaults."""
    arguments = inspect.signature(kind.__init__).parameters.values()
    return {a.name: a.default for a in arguments if a.kind is a.KEYWORD_ONLY}


def _checked_size(name: str, value: object, smallest: int = 1, largest: int = MAX_SIZE) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # numpy's integers pass, floats and strings do not
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not smallest <= number <= largest:
        raise InputError(f"{name} is {_brief(value)}; expected an integer from {smallest} to {largest}.")
    return number


def _checked_sizes(name: str, value: object, longest: int) -> list[int]:
    if not isinstance(value, list | tuple) or len(value) > longest:
        raise InputError(f"{name} is {_brief(value)}; expected a list of at most {longest} integers.")
    return [_checked_size(f"{name}[{i}]", entry) for i, entry in enumerate(value)]


def _checked_shape(name: str, value: object, smallest_side: int | None) -> tuple[int, ...]:
    shape = tuple(_checked_sizes("input_shape", value, longest=8))
    if math.prod(shape) > MAX_PARAMETERS:
        raise InputError(
            f"input_shape {shape} has {math.prod(shape):,} values; at most {MAX_PARAMETERS:,} are allowed."
        )
    if not shape:
        raise InputError("input_shape is empty; expected (C, H, W) of one image or (D,) of one vector.")
    if smallest_side is not None:
        if len(shape) != 3:
            raise InputError(f"{name} takes images: input_shape is {shape}, expected (C, H, W). For vectors use 'mlp'.")
        if min(shape[1:]) < smallest_side:
            raise InputError(
                f"{name} needs images of at least {smallest_side}x{smallest_side} pixels; input_shape is {shape}. "
                "Choose a smaller network, such as 'mlp'."
            )
    return shape


def _checked_option(name: str, value: object, default: object) -> Any:
    """Return `value` as a primitive if it is of the kind of `default`."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} is {_brief(value)}; expected True or False.")
        return value
    if isinstance(default, int):
        return _checked_size(name, value)
    if isinstance(default, tuple):
        return _checked_sizes(name, value, longest=MAX_LAYERS)
    if not isinstance(value, str):
        raise InputError(f"{name} is {_brief(value)}; expected a name such as {default!r}.")
    return value


def _brief(value: object) -> str:
    """Return what was given, short enough for a message whatever a file may hold."""
    if isinstance(value, int) and abs(value) >= 10**20:  # Python refuses to print integers of over 4300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple | dict | set) and len(value) > 16:
        return f"a {type(value).__name__} of length {len(value)}"
    text = f"{type(value).__name__}" if not isinstance(value, int | float | str | bool | None) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_batch(net: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: raise one clear InputError for a batch that the network cannot take."""
    if not inputs or isinstance(inputs[0], Proxy):  # symbolic tracing of a module that contains this net
        return
    if isinstance(inputs[0], tuple) and next(reversed(net._forward_pre_hooks.values())) is not _check_batch:
        return  # a later hook makes a batch of them: captum's DeepLift passes inputs and baselines as tuples
    x, expected = inputs[0], cast(Net, net).input_shape
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"input is {kind}; expected floating point. `data.transform` makes it from raw data.")
    if x.dim() != len(expected) + 1 or x.shape[1:] != expected:
        wanted = ", ".join(map(str, expected))
        raise InputError(f"input has shape {tuple(x.shape)}; expected (N, {wanted}), a batch of N inputs.")
