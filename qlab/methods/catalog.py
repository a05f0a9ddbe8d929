"""The shelf of training methods, and the list of papers they come from.

Reading this module imports neither torch nor Lightning. It drives `qlab methods`, the Studio's menus, the tables in README.md
and docs/methods.md, and the contract tests, which run over every entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlab.registry import Entry, Registry

__all__ = ["CATALOG", "PAPERS", "MethodInfo", "Paper", "methods_table", "papers_table"]


@dataclass(frozen=True)
class MethodInfo(Entry):
    """What the lab knows of a method without importing it.

    Args:
        paper: authors, title, venue.
        arxiv: identifier, empty where there is none.
        family: the folder of `qlab.methods` it stands in.
        weight_bits: bits of a deployed weight; 32 is float.
        activation_bits: bits of a deployed activation with the method's defaults; 32 is float.
        differentiable: whether the training-time forward map is differentiable almost everywhere with a derivative that is
            not identically zero, so that gradient tools see the function that is trained.
        claims: what `qlab reproduce NAME` judges.
        properties: exact properties that the tests assert.
        schedule: quantities of `Method.schedule` that never decrease with progress.
        reconstruction: true where the paper's own equations could not be had and the method is a reconstruction.
    """

    paper: str = ""
    arxiv: str = ""
    family: str = ""
    weight_bits: int = 32
    activation_bits: int = 32
    differentiable: bool = False
    claims: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    reconstruction: bool = False

    def row(self) -> dict[str, Any]:
        """Return the columns that `qlab methods --json` promises."""
        keys = ("name", "title", "paper", "arxiv", "family", "weight_bits", "activation_bits")
        values = asdict(self)
        return {key: values[key] for key in keys}


CATALOG: Registry[MethodInfo] = Registry(
    "method",
    [
        MethodInfo(
            name="full_precision",
            title="Full precision: the float net that every quantized one is compared with",
            target="qlab.methods.baselines.full_precision:FullPrecision",
            family="baselines",
            differentiable=True,
            properties=("one step equals plain torch, bit for bit",),
        ),
        MethodInfo(
            name="binary_connect",
            title="BinaryConnect: sign weights, gradients go to clamped latent weights",
            target="qlab.methods.binary_weights.binary_connect:BinaryConnect",
            paper="Courbariaux, Bengio, David, BinaryConnect: Training Deep Neural Networks with binary weights during "
            "propagations, NeurIPS 2015",
            arxiv="1511.00363",
            family="binary_weights",
            weight_bits=1,
            properties=(
                "the stochastic weight has the clamped latent weight as its mean",
                "equals the clipped straight-through estimator while latent weights stay within [-1, 1]",
            ),
        ),
        MethodInfo(
            name="ste",
            title="Straight-through estimator: sign with any surrogate derivative, weights and activations",
            target="qlab.methods.binary_networks.ste:STE",
            paper="Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Binarized Neural Networks, NeurIPS 2016; surrogates of "
            "Liu et al. 2018 and Darabi et al. 2018",
            arxiv="1602.02830",
            family="binary_networks",
            weight_bits=1,
            properties=("the gradient is the surrogate's declared derivative times the incoming gradient",),
        ),
        MethodInfo(
            name="adaste",
            title="AdaSTE: an adaptive straight-through estimator from a bilevel program",
            target="qlab.methods.binary_weights.adaste:AdaSTE",
            paper="Le, Høier, Lin, Zach, AdaSTE: An Adaptive Straight-Through Estimator to Train Binary Neural Networks, "
            "CVPR 2022",
            arxiv="2112.02880",
            family="binary_weights",
            weight_bits=1,
            claims=("never stuck: saturated weights still change sign where the exact derivative moves none",),
            properties=(
                "the forward weight minimises the double-well energy",
                "the backward rule is the largest finite difference over beta",
                "mu = 0 gives straight-through inside (-1, 1)",
                "mu alpha >= 1 gives exact signs",
            ),
            schedule=("mu",),
        ),
    ],
)


@dataclass(frozen=True)
class Paper:
    """One of the 20 papers of the lab: `methods` names what of it is on the shelf, `parts` what else of it runs."""

    number: int
    title: str
    authors: str
    venue: str
    arxiv: str
    methods: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Return "runs" once a method of the paper is on the shelf, else "planned"."""
        return "runs" if self.methods else "planned"


PAPERS: tuple[Paper, ...] = (
    Paper(1, "AdaSTE: An Adaptive Straight-Through Estimator to Train Binary Neural Networks", "Le, Høier, Lin, Zach", "CVPR 2022", "2112.02880", ("adaste",)),
    Paper(2, "ASkewSGD: An Annealed interval-constrained Optimisation method to train Quantized Neural Networks", "Leconte, Schechtman, Moulines", "AISTATS 2023", "2211.03741"),
    Paper(3, "Exact Backpropagation in Binary Weighted Networks with Group Weight Transformations", "Shulman", "2021", "2107.01400"),
    Paper(4, "Resource-Efficient Neural Networks for Embedded Systems", "Roth et al.", "JMLR 2024", "2001.03048"),
    Paper(5, "Large-Scale Deep Learning Optimizations: A Comprehensive Survey", "He, Xue, Ren, You", "2021", "2111.00856"),
    Paper(6, "Regularized Frank-Wolfe for Dense CRFs: Generalizing Mean Field and Beyond", "Lê-Huu, Alahari", "NeurIPS 2021", "2110.14759"),
    Paper(7, "Robust Learning of Parsimonious Deep Neural Networks", "Guenter, Sideris", "2022", "2205.04650"),
    Paper(8, "Distribution-sensitive Information Retention for Accurate Binary Neural Network", "Qin et al.", "IJCV 2023", "2109.12338"),
    Paper(9, "Recent Theoretical Advances in Non-Convex Optimization", "Danilova et al.", "Springer 2022", "2012.06188"),
    Paper(10, "How to train accurate BNNs for embedded systems?", "de Putter, Corporaal", "2022", "2206.12322"),
    Paper(11, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks", "Zhang, Yang, Ye, Hua", "ECCV 2018", "1807.10029"),
    Paper(12, "Lifted Bregman Training of Neural Networks", "Wang, Benning", "JMLR 2023", "2208.08772"),
    Paper(13, "Improved Gradient-Based Adversarial Attacks for Quantized Networks", "Gupta, Ajanthan", "AAAI 2022", "2003.13511"),
    Paper(14, "Error-aware Quantization through Noise Tempering", "Wang et al.", "2022", "2212.05603"),
    Paper(15, "Mixed-Precision Neural Networks: A Survey", "Rakka et al.", "TPAMI 2024", "2208.06064"),
    Paper(16, "Efficient Global Optimization of Two-layer ReLU Networks", "Bai, Gautam, Sojoudi", "SIMODS 2023", "2201.01965"),
    Paper(17, "Differentiable bilevel programming for Stackelberg congestion games", "Li et al.", "2022", "2209.07618"),
    Paper(18, "Provably efficient variational generative modeling of quantum many-body systems via quantum-probabilistic information geometry", "Sbahi et al.", "2022", "2206.04663"),
    Paper(19, "Quantized Neural Networks: Training Neural Networks with Low Precision Weights and Activations", "Hubara et al.", "JMLR 2018", "1609.07061"),
    Paper(20, "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", "Wu et al.", "TPAMI 2023", "2212.05326"),
)  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _bits(bits: int) -> str:
    return "float" if bits == 32 else str(bits)


def methods_table() -> str:
    """Return the markdown table of every method on the shelf, as in README.md."""
    header = ("method", "what it does", "family", "weights", "activations", "arXiv")
    rows = [
        (
            f"`{m.name}`",
            m.title.split(": ", 1)[-1] + (" *(reconstruction)*" if m.reconstruction else ""),
            m.family.replace("_", " "),
            _bits(m.weight_bits),
            _bits(m.activation_bits),
            _arxiv(m.arxiv),
        )
        for m in CATALOG.values()
    ]
    return _table(header, rows)


def papers_table() -> str:
    """Return the markdown table of the 20 papers with their status, as in README.md."""
    header = ("#", "paper", "arXiv", "status", "methods")
    rows = [
        (
            str(p.number),
            f"{p.title} ({p.authors}, {p.venue})",
            _arxiv(p.arxiv),
            p.status,
            ", ".join(f"`{m}`" for m in p.methods),
        )
        for p in PAPERS
    ]
    return _table(header, rows)
