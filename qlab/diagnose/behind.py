"""The net behind one layer, run again for changed outputs of single units: the machine room of the flip oracle.

The net is traced with torch.fx; its values on the batch are kept once. What depends on the layer is evaluated again for rows
(example n, unit o, new values of that unit), everything else is looked up. Before it is trusted, the cut net has to reproduce
the layer's outputs and the net's logits from kept values; where it does not, `Uncut` is raised and the net is run whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qlab.diagnose.functions import Hard, Primitive, Smooth, steps
from qlab.diagnose.objective import Objective
from qlab.errors import InputError
from qlab.quantizers import Sign, Uniform
from qlab.quantizers.apply import NONLINEARITIES

__all__ = ["Behind", "Uncut"]

_LEVELS = 16  # of a layer's inputs, up to which a table by level pays
_ELEMENTWISE = (*NONLINEARITIES, nn.Identity, Uniform)
TIES = 1e-3  # share of values on a threshold, up to rounding, that chance does not explain
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Changes = Iterator[tuple[Tensor, Tensor]]
"""Flat positions (F,) of flipped weights and their loss changes (F,)."""


class Uncut(Exception):
    """The net cannot be cut behind this layer."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Hard) or not any(m.children()) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value, from before anything is written over in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


class Behind:
    """A hard net behind one of its layers.

    Args:
        J: objective of the hard net.
        layer: name of a Linear or Conv module, used once.
        parameter: name of its weight.
        memory: numbers that one chunk may take, roughly.

    Raises:
        Uncut: the layer is of another kind, used twice, the net cannot be traced, or rounding decides its signs.
    """

    @torch.no_grad()
    def __init__(self, J: Objective, layer: str, parameter: str, memory: int = 2**23) -> None:
        self.J, self.N, self.memory = J, len(J.x), memory
        module = dict(J.net.named_modules()).get(layer)
        if module is None or parameter != f"{layer}.weight" or not _plain(module):
            raise Uncut("not a plain layer")
        owners = [m for m in J.net.modules() if any(p is module.weight for p in m._parameters.values())]
        if len(owners) > 1:
            raise Uncut("its weight is shared")
        self.module = module
        self.w = J.theta[parameter]
        self.base = J.loss(J.beta * J.base_logits, J.y)
        try:
            graph = _Tracer().trace(J.net)
            recorder = _Recorder(fx.GraphModule(J.net, graph))
            recorder.run(J.x)
        except Exception as error:  # whatever a foreign forward does while it is traced
            raise Uncut(str(error)) from error
        self.values = recorder.values
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
        if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
            raise Uncut("called more than once")
        self.modules = dict(J.net.named_modules())
        self.nodes = list(graph.nodes)
        self.node = calls[0]
        self.a, self.z = self.values[self.node.args[0]], self.values[self.node]
        self.axis = 1 if isinstance(module, _ConvNd) else -1
        self.spread = self.z.dim() > 2  # a unit gives a map, not a number
        if self.z.dim() < 2 or len(self.z) != self.N or (isinstance(module, _ConvNd) and self.z.dim() != self.w.dim()):
            raise Uncut("the layer's output has no batch axis")
        self._find_end()
        self._check()
        self.levels = self._input_levels()
        self.path = "columns" if self.levels is None else "table"

    # ---- where it is cut

    def _find_end(self) -> None:
        """Follow what works unit by unit; `end` is the last of it, `chain` its modules, `links` its nodes."""
        self.chain: list[nn.Module] = []
        self.links: list[fx.Node] = []
        self.end = self.node
        while len(self.end.users) == 1:
            user = next(iter(self.end.users))
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if module is None or len(user.args) != 1 or user.kwargs or not self._unitwise(module):
                break
            self.chain.append(module)
            self.links.append(user)
            self.end = user
        live: dict[fx.Node, None] = {self.end: None}
        batched: set[fx.Node] = set()
        for n in self.nodes:
            if n.op == "placeholder" or any(i in batched for i in n.all_input_nodes):
                batched.add(n)
            if any(i in live for i in n.all_input_nodes):
                live[n] = None
        self.after = [n for n in live if n is not self.end]
        if not self.after or self.after[-1].op != "output":
            raise Uncut("the answer does not depend on the layer")
        self.batched = batched
        self.next: fx.Node | None = None
        if not self.spread and len(self.end.users) == 1:
            user = next(iter(self.end.users))
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if type(module) is nn.Linear and len(user.args) == 1 and not user.kwargs:
                self.next, self.W2 = user, module.weight.detach()
        sizes = [v.numel() for n in (self.end, *self.after) if isinstance(v := self.values[n], Tensor)]
        self.rows = max(1, self.memory * self.N // max(sizes))

    def _unitwise(self, module: nn.Module) -> bool:
        if isinstance(module, Hard):
            module = module.quantizer
        if isinstance(module, _BatchNorm):
            return self.axis == 1 or not self.spread
        if isinstance(module, nn.Flatten):
            return not self.spread and module.start_dim == 1
        if isinstance(module, Sign):  # also one with a drawn surrogate, as long as its forward map is the sign
            return type(module).forward is Sign.forward
        return type(module) in _ELEMENTWISE or isinstance(module, Primitive | Smooth | nn.modules.dropout._DropoutNd)

    def _check(self) -> None:
        again = self.module(self.a)
        if again.shape != self.z.shape or not torch.equal(again, self.z):
            raise Uncut("the layer's input was written over")
        if not torch.equal(self._through(self.z), self.values[self.end]):
            raise Uncut("what follows the layer does not repeat")
        # another number of rows than the batch has, the last of them with another value: no other row may notice
        n = torch.arange(self.N + 1, device=self.z.device) % self.N
        end = self.values[self.end][n]
        end[-1] += 1
        try:
            z = self._logits(n, {self.end: end})
        except Exception as error:  # a forward that counts on its batch: sizes written out, a mean over examples
            raise Uncut(str(error)) from error
        base = self.J.base_logits
        atol = 1e-5 * max(float(base.abs().max()), 1e-30)
        if z.shape != (len(n), base.shape[1]) or not torch.allclose(z[:-1], base, rtol=1e-5, atol=atol):
            raise Uncut("the examples see each other")
        self._check_ties()

    def _check_ties(self) -> None:
        """Raise where signs behind the layer see ties, in sums that are rounded.

        Flips keep the parity of a sum of +-alpha, so sums that tie after a flip tie in the batch as it is. Sums of integers are
        exact, as all are whose values need half of the mantissa only.
        """
        for node in (*self.links, *self.after):
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, Hard) or not isinstance(v := self.values[node.all_input_nodes[0]], Tensor):
                continue
            levels = module.quantizer.levels(v.dtype)
            if levels is None or len(levels) != 2:
                continue
            try:
                gap = (v - steps(module.quantizer)[1].to(v)).abs()
            except InputError:  # a map that falls, or jumps elsewhere: no threshold is known
                continue
            info, size = torch.finfo(v.dtype), v.abs().max()
            half = 2.0 ** math.ceil(math.log2(info.eps) / 2)
            short = v / (half * size.clamp(min=info.tiny).log2().ceil().exp2())
            if float((gap <= 64 * info.eps * size).double().mean()) > TIES and not torch.equal(short, short.round()):
                raise Uncut("rounding decides ties")

    def _input_levels(self) -> Tensor | None:
        if self.spread or self.a.dim() != 2 or not bool((self._alpha()[:, None] == self.w.abs()).all()):
            return None
        few = torch.unique(self.a.flatten()[: 64 * _LEVELS])
        if len(few) > _LEVELS:
            return None
        levels = torch.unique(self.a)
        return levels if len(levels) <= _LEVELS and 2 * len(levels) < self.w.shape[1] else None

    def _alpha(self) -> Tensor:
        return self.w.flatten(1)[:, 0].abs()

    # ---- running it

    def _through(self, z: Tensor) -> Tensor:
        """Run what works unit by unit on outputs (..., N, O, *S) of the layer."""
        shape = z.shape
        z = z.reshape(-1, *self.z.shape[1:]) if len(shape) > self.z.dim() else z.clone()
        for module in self.chain:
            z = module(z)
        return z.reshape(shape)

    def _logits(self, n: Tensor, known: dict[fx.Node, Any]) -> Tensor:
        """Return the logits (R, d) of examples n (R,), with some values known."""

        def value(node: fx.Node) -> Any:
            if node in known:
                return known[node]
            kept = self.values[node]
            return kept[n] if isinstance(kept, Tensor) and kept.dim() and node in self.batched else kept

        for node in self.after:
            if node in known:
                continue
            args = fx.map_arg(node.args, value)
            kwargs = fx.map_arg(node.kwargs, value)
            known[node] = self._call(node, args, kwargs)
        return known[self.after[-1]]  # the output

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_function":
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            return function(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0]

    @torch.no_grad()
    def _losses(self, n: Tensor, o: Tensor, unit: Tensor) -> Tensor:
        """Return loss changes (R,) of examples n (R,) in which unit o (R,) gives `unit` (R, *S)."""
        out = torch.empty(len(n), dtype=self.base.dtype, device=self.base.device)
        kept = self.values[self.end]
        for rows in torch.arange(len(n), device=n.device).split(self.rows):
            n_, o_, unit_ = n[rows], o[rows], unit[rows]
            if self.next is not None:
                step = (unit_ - kept[n_, o_])[:, None] * self.W2.T[o_]
                known = {self.next: self.values[self.next][n_] + step}
            else:
                changed = kept[n_]
                changed.movedim(self.axis, 1)[torch.arange(len(rows), device=n.device), o_] = unit_
                known = {self.end: changed}
            out[rows] = self.J.loss(self.J.beta * self._logits(n_, known), self.J.y[n_]) - self.base[n_]
        return out

    def _table(self, q: Tensor) -> Tensor:
        """Return loss changes (V, N, O) for outputs q (V, N, O) of single units; 0 where the unit gives what it gave."""
        table = torch.zeros(q.shape, dtype=self.base.dtype, device=q.device)
        v, n, o = (q != self.values[self.end]).nonzero(as_tuple=True)
        table[v, n, o] = self._losses(n, o, q[v, n, o])
        return table

    # ---- flips

    def changes(self, index: Tensor) -> Changes:
        """Yield flat positions and loss changes of flipping the weights at `index` (F,), a part at a time."""
        return self._by_level(index) if self.levels is not None else self._by_column(index)

    @torch.no_grad()
    def _by_level(self, index: Tensor) -> Changes:
        assert self.levels is not None
        delta = torch.zeros(self.w.shape, dtype=self.base.dtype, device=self.w.device)
        plus = self.w > 0
        for u in self.levels:
            step = 2 * u * self._alpha()
            up, down = self._table(self._through(torch.stack([self.z - step, self.z + step])))
            here = (self.a == u).to(self.base.dtype)
            delta += torch.where(plus, up.T @ here, down.T @ here)
        yield index.cpu(), delta.flatten()[index] / self.N

    @torch.no_grad()
    def _by_column(self, index: Tensor) -> Changes:
        O, K = len(self.w), self.w[0].numel()
        wanted = torch.zeros(O * K, dtype=torch.bool, device=self.w.device)
        wanted[index] = True
        wanted = wanted.reshape(O, K)
        columns = wanted.any(0).nonzero()[:, 0]
        width = max(1, self.memory // max(1, 4 * self.z.numel())) if not self.spread else 1
        other: Tensor | None = None
        two = self._two_values()
        if two is not None:  # the unit answers the other way
            kept = self.values[self.end]
            other = self._table((two[0] + two[1] - kept)[None])[0]
        for k in columns.split(width):
            q = self._through(self._changed(k))
            kept = self.values[self.end]
            if other is not None:
                delta = torch.einsum("kno,no->ok", (q != kept).to(other.dtype), other) / self.N
            else:
                moved = (q != kept).movedim(2 if self.axis == 1 else -1, 2)
                moved = moved.reshape(len(k), self.N, O, -1).any(3)
                v, n, o = (moved & wanted[:, k].T[:, None]).nonzero(as_tuple=True)
                unit = q.movedim(2 if self.axis == 1 else -1, 2)[v, n, o]
                delta = torch.zeros(O * len(k), dtype=self.base.dtype, device=q.device)
                delta.index_add_(0, o * len(k) + v, self._losses(n, o, unit))
                delta = delta.reshape(O, len(k)) / self.N
            o, at = wanted[:, k].nonzero(as_tuple=True)
            yield (o * K + k[at]).cpu(), delta[o, at]

    def _changed(self, k: Tensor) -> Tensor:
        """Return outputs (len(k), N, O, *S) of the layer in which every unit has its weight k flipped."""
        if isinstance(self.module, nn.Linear):
            w, a = self.w[:, k].T, self.a.movedim(-1, 0)[k]
            return self.z - 2 * a[..., None] * w.reshape(len(k), *[1] * (self.a.dim() - 1), -1)
        steps = []
        for i in k:
            only = torch.zeros_like(self.w)
            only.flatten(1)[:, i] = -2 * self.w.flatten(1)[:, i]
            steps.append(self.z + self.module._conv_forward(self.a, only, None))
        return torch.stack(steps)

    def _two_values(self) -> Tensor | None:
        """Return the two levels of the activation where there are two, and a unit gives one number."""
        last = next((m for m in reversed(self.chain) if not isinstance(m, nn.Identity | nn.Flatten)), None)
        if self.spread or not isinstance(last, Hard | Sign):
            return None
        quantizer = last.quantizer if isinstance(last, Hard) else last
        levels = quantizer.levels(self.z.dtype)
        return levels if levels is not None and len(levels) == 2 else None


def _plain(module: nn.Module) -> bool:
    """Whether a module computes what its class in torch does."""
    return type(module) in (nn.Linear, *_CONVS) and not module._forward_hooks and not module._forward_pre_hooks
