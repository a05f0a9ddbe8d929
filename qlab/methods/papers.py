"""The 20 papers of the lab, and what of each is on the shelf."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPERS", "Paper"]


@dataclass(frozen=True)
class Paper:
    """One of the 20 papers of the lab: `methods` names what of it is on the shelf, `parts` what else of it runs."""

    number: int
    title: str
    authors: str
    venue: str
    arxiv: str
    methods: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Return "runs" once a method of the paper is on the shelf or a part of it runs, else "planned"."""
        return "runs" if self.methods or self.parts else "planned"


PAPERS: tuple[Paper, ...] = (
    Paper(1, "AdaSTE: An Adaptive Straight-Through Estimator to Train Binary Neural Networks", "Le, Høier, Lin, Zach", "CVPR 2022", "2112.02880", ("adaste",)),
    Paper(2, "ASkewSGD: An Annealed interval-constrained Optimisation method to train Quantized Neural Networks", "Leconte, Schechtman, Moulines", "AISTATS 2023", "2211.03741", ("askewsgd", "askewsgd_low_bit")),
    Paper(3, "Exact Backpropagation in Binary Weighted Networks with Group Weight Transformations", "Shulman", "2021", "2107.01400", ("group_transform",)),
    Paper(4, "Resource-Efficient Neural Networks for Embedded Systems", "Roth et al.", "JMLR 2024", "2001.03048"),
    Paper(5, "Large-Scale Deep Learning Optimizations: A Comprehensive Survey", "He, Xue, Ren, You", "2021", "2111.00856"),
    Paper(6, "Regularized Frank-Wolfe for Dense CRFs: Generalizing Mean Field and Beyond", "Lê-Huu, Alahari", "NeurIPS 2021", "2110.14759"),
    Paper(7, "Robust Learning of Parsimonious Deep Neural Networks", "Guenter, Sideris", "2022", "2205.04650"),
    Paper(8, "Distribution-sensitive Information Retention for Accurate Binary Neural Network", "Qin et al.", "IJCV 2023", "2109.12338", ("dir_net", "ir_net")),
    Paper(9, "Recent Theoretical Advances in Non-Convex Optimization", "Danilova et al.", "Springer 2022", "2012.06188"),
    Paper(10, "How to train accurate BNNs for embedded systems?", "de Putter, Corporaal", "2022", "2206.12322", ("bnn_repair",)),
    Paper(11, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks", "Zhang, Yang, Ye, Hua", "ECCV 2018", "1807.10029"),
    Paper(12, "Lifted Bregman Training of Neural Networks", "Wang, Benning", "JMLR 2023", "2208.08772"),
    Paper(13, "Improved Gradient-Based Adversarial Attacks for Quantized Networks", "Gupta, Ajanthan", "AAAI 2022", "2003.13511", parts=("qlab.attacks",)),
    Paper(14, "Error-aware Quantization through Noise Tempering", "Wang et al.", "2022", "2212.05603"),
    Paper(15, "Mixed-Precision Neural Networks: A Survey", "Rakka et al.", "TPAMI 2024", "2208.06064"),
    Paper(16, "Efficient Global Optimization of Two-layer ReLU Networks", "Bai, Gautam, Sojoudi", "SIMODS 2023", "2201.01965"),
    Paper(17, "Differentiable bilevel programming for Stackelberg congestion games", "Li et al.", "2022", "2209.07618"),
    Paper(18, "Provably efficient variational generative modeling of quantum many-body systems via quantum-probabilistic information geometry", "Sbahi et al.", "2022", "2206.04663"),
    Paper(19, "Quantized Neural Networks: Training Neural Networks with Low Precision Weights and Activations", "Hubara et al.", "JMLR 2018", "1609.07061", ("qnn", "qnn_rnn")),
    Paper(20, "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", "Wu et al.", "TPAMI 2023", "2212.05326"),
)  # fmt: skip
