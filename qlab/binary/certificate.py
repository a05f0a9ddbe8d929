"""The certificate of a packed net: every backend's output on one batch, as hashes that are equal or are not.

    equal       all backends that promise it gave the same bits as the simulation
    float_sums  how a backend compares with it that sums floats in an order of its own, as another runtime does
    source      how the simulation compares with the net it was compiled from

Compared are the number of logits that differ at all, the largest difference, and the number of decisions that differ.

Hashes are SHA-256 of the float32 outputs in little-endian order; that of the batch says what they were taken on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlab import provenance
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.binary.packed import PackedNet

__all__ = ["Certificate", "certify", "digest"]

SIMULATION = "torch"


@dataclass(frozen=True)
class Certificate:
    """What `PackedNet.verify` found.

    Args:
        batch: SHA-256 of the inputs.
        examples: how many there were.
        outputs: backend -> SHA-256 of its output, of the backends that promise the simulation's bits for this net.
        source: "differing logits", "largest difference", "differing decisions" of the original net against the
            simulation; empty where the original net was not at hand.
        float_sums: backend -> the same three numbers, of the backends that cannot promise them: float layers sum in the
            runtime's own order. Empty for a net whose sums are all of signs.
        absent: backend -> why it could not run.
        device: the machine.
        versions: of Python and the packages that computed.
    """

    batch: str
    examples: int
    outputs: dict[str, str]
    source: dict[str, float] = field(default_factory=dict)
    float_sums: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether all backends that promise it gave the same bits."""
        return len(set(self.outputs.values())) == 1

    @property
    def exact(self) -> bool:
        """Whether they also gave the bits of the net they were compiled from; False where that was not at hand."""
        return self.equal and self.source.get("differing logits") == 0

    def frame(self) -> pd.DataFrame:
        """Return one row per backend: its hash, and whether it is the simulation's."""
        import pandas as pd

        expected = self.outputs[SIMULATION]
        rows = [{"backend": name, "sha256": h, "equal": h == expected} for name, h in self.outputs.items()]
        others = {name: f"sums floats in its own order: {_told(found)}" for name, found in self.float_sums.items()}
        rows += [{"backend": name, "sha256": why, "equal": None} for name, why in (others | self.absent).items()]
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """Return one paragraph with the numbers."""
        names = ", ".join(self.outputs)
        verdict = "gave the same bits" if self.equal else "DIFFER"
        text = f"On {self.examples} examples {names} {verdict}."
        if self.source:
            text += (
                " They are the bits of the original net."
                if self.exact
                else f" Against the original net {_told(self.source)}."
            )
        for name, found in self.float_sums.items():
            text += f" {name} sums floats in its own order: {_told(found)}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as primitives."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object) -> Certificate:
        """Return the certificate of a file, every value checked.

        Raises:
            InputError: it is none.
        """
        expected: dict[str, type] = {
            "batch": str,
            "examples": int,
            "outputs": dict,
            "source": dict,
            "float_sums": dict,
            "absent": dict,
            "device": str,
            "versions": dict,
        }
        if not isinstance(content, Mapping) or set(content) != set(expected):
            raise InputError("the certificate lacks an entry or has one too many")
        for name, kind in expected.items():
            value = content[name]
            good = isinstance(value, kind) and not isinstance(value, bool)
            if name == "source":
                good = good and (not value or _is_comparison(value))
            elif name == "float_sums":
                good = good and all(isinstance(k, str) and _is_comparison(v) for k, v in value.items())
            elif kind is dict:
                good = good and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
            if not good:
                raise InputError(f"the certificate's {name} is of the wrong type")
        if SIMULATION not in content["outputs"]:
            raise InputError("the certificate does not say what the simulation gave")
        return cls(**content)


def digest(x: Tensor) -> str:
    """Return the SHA-256 of a float tensor's values in little-endian float32 order."""
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@torch.no_grad()
def certify(packed: PackedNet, batch: Tensor, backends: list[str]) -> Certificate:
    """Return the certificate of a packed net on a batch; see `PackedNet.verify`."""
    names = [SIMULATION, *(name for name in backends if name != SIMULATION)]
    expected = packed.on(SIMULATION).run(batch).cpu()
    outputs, float_sums, absent = {SIMULATION: digest(expected)}, {}, _absent(names)
    for name in names[1:]:
        try:
            backend = packed.on(name)
        except InputError as error:  # a net that this backend cannot say
            absent[name] = str(error)
            continue
        found = backend.run(batch).cpu()
        if backend.promised:
            outputs[name] = digest(found)
        else:
            float_sums[name] = _compared(found, expected)
    source: dict[str, float] = {}
    if packed.source is not None:
        device = next((p.device for p in packed.source.parameters()), batch.device)
        source = _compared(packed.source(batch.to(device)).cpu(), expected)
    return Certificate(
        digest(batch),
        len(batch),
        outputs,
        source,
        float_sums,
        absent,
        provenance.device_name(),
        _versions(names),
    )


def _compared(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {
        "differing logits": int((found != expected).sum()),
        "largest difference": float((found - expected).abs().max()),
        "differing decisions": int((found.flatten(1).argmax(1) != expected.flatten(1).argmax(1)).sum()),
    }


def _told(found: Mapping[str, float]) -> str:
    differing, decisions = int(found["differing logits"]), int(found["differing decisions"])
    return f"{differing} logits differ, by at most {found['largest difference']:.3g}; {decisions} decisions differ"


def _is_comparison(found: object) -> bool:
    names = {"differing logits", "largest difference", "differing decisions"}
    return (
        isinstance(found, Mapping) and set(found) == names and all(isinstance(v, int | float) for v in found.values())
    )


def _absent(names: list[str]) -> dict[str, str]:
    from qlab.binary.packed import BACKENDS, present

    here = present()
    return {name: "not asked" if name in here else "not on this machine" for name in BACKENDS if name not in names}


def _versions(names: list[str]) -> dict[str, str]:
    found = provenance.versions()
    for package in sorted({"numba", "onnxruntime"} & set(names)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
