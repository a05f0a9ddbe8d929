"""Quantizers that nobody declared: found by asking the code, in any torch net.

A hand-written sign, a rounding with `(q - x).detach() + x`, a fake-quantized layer of another library: all are piecewise constant,
and no type tells. Here each module is run in float64 as a function of its own input, then of each of its parameters, and so is the
functional code between two modules; `qlab.diagnose.flatness` judges each of these functions of one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.diagnose.base import check, plain, run_hooked
from qlab.diagnose.flatness import Gradient, Verdict, judged, judged_up_to_scale
from qlab.quantizers.base import Quantizer

__all__ = ["Flat", "piecewise_constant", "scan", "undeclared", "visible"]

EXAMPLES = 16  # of the batch that are looked at
PARAMETRIZATIONS = "parametrizations"

Kind = Literal["input", "weight", "between"]


@dataclass(frozen=True)
class Flat:
    """A place at which a net is piecewise constant.

    Args:
        module: name of the module; "" is the net itself.
        kind: in what it is: the module's "input", its "weight", or what runs in functional code "between" it and `to`.
        parameter: name of the parameter, for "weight".
        to: name of the module after the functional code, for "between"; "" is the net's output.
        gradient: "straight-through" where autograd claims a derivative that is not zero, else "zero".
        levels: distinct output values seen, for "input"; None for more than 65,536 or where levels are not of one grid.
        jump: largest jump found.
        declared: whether it is a quantizer of the lab, which declares its backward rule.
        scaled: whether it is constant only up to a scale that follows the tensor.
    """

    module: str
    kind: Kind
    gradient: Gradient
    jump: float
    parameter: str | None = None
    to: str | None = None
    levels: int | None = None
    declared: bool = False
    scaled: bool = False

    def __str__(self) -> str:
        name = self.module or "the net"
        if self.kind == "weight":
            where = f"{name} is piecewise constant in its {self.parameter}"
        elif self.kind == "between":
            where = f"functional code between {name} and {self.to or 'the output'} is piecewise constant"
        else:
            seen = f", {self.levels} levels seen" if self.levels else ""
            where = f"{name} is piecewise constant in its input{seen}"
        where += ", up to a scale that follows it" if self.scaled else ""
        claim = (
            "autograd claims a gradient all the same (straight-through)"
            if self.gradient == "straight-through"
            else "and no gradient passes"
        )
        return f"{where}; {claim}"


def piecewise_constant(net: nn.Module, x: Tensor, seed: int = 0) -> list[Flat]:
    """Return where a net is piecewise constant, in the order in which it runs.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs; the first 16 are used.
        seed: of the noise.

    Raises:
        InputError: see `check`.
    """
    check(net, x, None, labels=False)
    return scan(net, x, seed)


def undeclared(net: nn.Module, x: Tensor) -> list[Flat]:
    """Return where code that is not the lab's quantizes activations and claims a gradient all the same.

    Nothing is run for a net whose modules are all torch's or the lab's, and nothing found where code runs in one dtype only.
    """
    if all(type(m).__module__.startswith(("torch.nn.", "qlab.")) for _, m in visible(net)):
        return []
    try:
        found = scan(net, x)
    except (RuntimeError, TypeError):
        return []
    return [f for f in found if f.kind != "weight" and f.gradient == "straight-through" and not f.declared]


def scan(net: nn.Module, x: Tensor, seed: int = 0, functional: bool = True) -> list[Flat]:
    """Return what `piecewise_constant` does, of a copy in eval mode, without the checks; `functional` code costs most."""
    net = copy.deepcopy(plain(net)).eval().double()
    net.requires_grad_(True)
    x = x[:EXAMPLES].detach().double()
    generator = torch.Generator().manual_seed(seed)
    calls = _calls(net, x)
    found: list[Flat] = []
    for call in calls.values():
        if call.leaf and call.varies_with_input:
            verdict = judged(call.of_input, call.input, generator)
            if verdict is None and call.elementwise:
                verdict = judged_up_to_scale(call.of_input, call.input, generator, channels=False)
            if verdict is not None:
                levels = verdict.levels if call.elementwise else None
                v = verdict
                found.append(Flat(call.name, "input", v.gradient, v.jump, None, None, levels, call.declared, v.scaled))
        for name in call.parameters:
            f, w = partial(call.of_parameter, name), call.module.get_parameter(name).detach()
            verdict = judged(f, w, generator)
            if verdict is None and w.dim() >= 2:
                verdict = judged_up_to_scale(f, w, generator, channels=True)
            if verdict is not None:
                found.append(_weight(call, name, verdict))
    for name in ["", *(n for n, call in calls.items() if call.leaf)] if functional else []:
        if not any(f.module == name and f.kind == "input" for f in found):
            found += _between(net, x, calls, name, generator)
    order = {name: i for i, name in enumerate(calls)}
    return sorted(found, key=lambda f: order.get(f.module, -1))


def _weight(call: _Call, name: str, verdict: Verdict) -> Flat:
    declared = False
    if f"{PARAMETRIZATIONS}." in name:
        chain = call.module.get_submodule(name.rsplit(".", 1)[0])
        declared = any(isinstance(m, Quantizer) for m in chain.children())
        name = name.split(".")[1]
    v = verdict
    return Flat(call.name, "weight", v.gradient, v.jump, name, declared=declared, scaled=v.scaled)


# ---- the calls of a net -----------------------------------------------------------------------------------------------


class _Call:
    """The first call of a module in a forward pass: what it got and what it gave."""

    def __init__(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor, leaf: bool) -> None:
        self.name, self.module, self.args, self.kwargs, self.output, self.leaf = (
            name,
            module,
            args,
            kwargs,
            output,
            leaf,
        )
        self.at = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()), None)
        self.parameters: list[str] = []
        self.declared = isinstance(module, Quantizer)

    @property
    def varies_with_input(self) -> bool:
        return self.at is not None

    @property
    def input(self) -> Tensor:
        assert self.at is not None
        tensor: Tensor = self.args[self.at]
        return tensor.detach()

    @property
    def elementwise(self) -> bool:
        return self.output.shape == self.input.shape

    def of_input(self, u: Tensor) -> Tensor:
        assert self.at is not None
        args = [*self.args[: self.at], u, *self.args[self.at + 1 :]]
        return _tensor(self.module(*args, **self.kwargs))

    def of_parameter(self, name: str, w: Tensor) -> Tensor:
        return _tensor(torch.func.functional_call(self.module, {name: w}, self.args, self.kwargs))


def _tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output, an empty one where there is none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else output.double()
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((p.double() for p in parts if isinstance(p, Tensor)), torch.empty(0, dtype=torch.float64))


def visible(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are not the machinery of a parametrization."""
    for name, module in net.named_modules():
        if PARAMETRIZATIONS not in name.split("."):
            yield name, module


def _calls(net: nn.Module, x: Tensor) -> dict[str, _Call]:
    """Return the first call of every module that ran, by name, in the order of starting; parameters with the innermost."""
    calls: dict[str, _Call] = {}
    started: list[str] = []
    names = dict(visible(net))
    handles = []

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in started:
            started.append(name)

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name not in calls:
            detached = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            leaf = not any(other.startswith(f"{name}." if name else "") for other in calls if other != name)
            calls[name] = _Call(name, module, detached, kwargs, _tensor(output).detach(), leaf)

    for name, module in names.items():
        handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    run_hooked(net, x, handles)
    found = {name: calls[name] for name in started if name in calls}
    for full, p in net.named_parameters():
        if p.is_floating_point():
            owners = [n for n in found if not n or full.startswith(f"{n}.")]
            if owners:
                owner = max(owners, key=len)
                found[owner].parameters.append(full.removeprefix(f"{owner}.") if owner else full)
    return found


def _between(
    net: nn.Module, x: Tensor, calls: dict[str, _Call], name: str, generator: torch.Generator
) -> Iterator[Flat]:
    """Yield the piecewise-constant functional code that first reads a module's output ("" is the net's input), if any."""
    leaves = [n for n, call in calls.items() if call.leaf and call.varies_with_input]
    if not name and "" in leaves:
        return  # the net is one module: its own test says it
    later = leaves[leaves.index(name) + 1 :] if name else leaves
    start = calls[name].output if name else x
    if not start.numel():
        return

    def run(u: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        handles = []
        for n in later:
            call = calls[n]

            def reads(module: nn.Module, args: Any, n: str = n, at: int = call.at or 0) -> None:
                seen.setdefault(n, args[at])

            handles.append(call.module.register_forward_pre_hook(reads))
        if name:
            replaced = False

            def replace(module: nn.Module, args: Any, output: Any) -> Tensor | None:
                nonlocal replaced
                if replaced or not isinstance(output, Tensor):
                    return None
                replaced = True
                return u

            handles.append(calls[name].module.register_forward_hook(replace))
        try:
            seen[""] = _tensor(net(x if name else u))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    scale = float(start.square().mean().sqrt())
    with torch.no_grad():
        before = run(start)
        moved = run(start + scale * torch.randn(start.shape, dtype=start.dtype, generator=generator).to(start.device))
    for n in [*later, ""]:
        if n in before and n in moved and not torch.equal(before[n], moved[n]):
            verdict = judged(partial(_reading, run, n), start, generator)
            if verdict is not None:
                yield Flat(name, "between", verdict.gradient, verdict.jump, to=n)
            return


def _reading(run: Callable[[Tensor], dict[str, Tensor]], name: str, u: Tensor) -> Tensor:
    return run(u)[name]
