"""Binary weights, activations in float."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
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
    MethodInfo(
        name="binary_relax",
        title="BinaryRelax: weights pulled ever harder towards scaled signs, then put on them",
        target="qlab.methods.binary_weights.binary_relax:BinaryRelax",
        paper="Yin, Zhang, Lyu, Osher, Qi, Xin, BinaryRelax: A Relaxation Approach for Training Deep Neural Networks with "
        "Quantized Weights, SIAM J. Imaging Sci. 2018",
        arxiv="1801.06313",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "the forward weight minimises eta/2 times the squared distance to the scaled signs plus half that to the latent",
            "eta = 0 is plain training in float, phase II computes with the scaled signs",
        ),
        schedule=("eta", "phase"),
    ),
    MethodInfo(
        name="prox_quant",
        title="ProxQuant: float weights with a proximal step towards ±1 after every update",
        target="qlab.methods.binary_weights.prox_quant:ProxQuant",
        paper="Bai, Wang, Liberty, ProxQuant: Quantized Neural Networks via Proximal Operators, ICLR 2019",
        arxiv="1810.00861",
        family="binary_weights",
        weight_bits=1,
        differentiable=True,
        properties=(
            "the step minimises the regularizer plus half the squared distance",
            "reg_rate = 0 is clipped training in float",
            "frozen weights do not move",
        ),
        schedule=("lambda_", "frozen"),
    ),
    MethodInfo(
        name="pmf",
        title="PMF: proximal mean-field, a distribution over the levels that is sharpened (GD-tanh for binary weights)",
        target="qlab.methods.binary_weights.pmf:PMF",
        paper="Ajanthan, Dokania, Hartley, Torr, Proximal Mean-field for Neural Network Quantization, ICCV 2019",
        arxiv="1812.04353",
        family="binary_weights",
        weight_bits=1,
        differentiable=True,
        properties=(
            "softmax over (-1, +1) in two latents is tanh in half their difference",
            "an SGD step on the two is half a step of GD-tanh",
        ),
        schedule=("beta",),
    ),
    MethodInfo(
        name="mirror_descent",
        title="Mirror descent: the gradient at the weight moves it in the coordinates of tanh or softmax",
        target="qlab.methods.binary_weights.mirror_descent:MirrorDescent",
        paper="Ajanthan, Gupta, Torr, Hartley, Dokania, Mirror Descent View for Neural Network Quantization, AISTATS 2021",
        arxiv="1910.08237",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "stable and primal form are one trajectory while beta is constant",
            "exponentiated gradient over (-1, +1) is the primal tanh step",
        ),
        schedule=("beta",),
    ),
    MethodInfo(
        name="bayes_binn",
        title="BayesBiNN: a probability for each sign, learned with relaxed samples and a natural gradient",
        target="qlab.methods.binary_weights.bayes_binn:BayesBiNN",
        paper="Meng, Bachmann, Khan, Training Binary Neural Networks using the Bayesian Learning Rule, ICML 2020",
        arxiv="2002.10778",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "a sample is positive with probability sigmoid(2 lambda) at every temperature",
            "without a gradient lambda falls to the prior by 1 - lr a step",
        ),
    ),
    MethodInfo(
        name="bop",
        title="Bop: binary weights without latent weights, flipped by an average gradient beyond a threshold",
        target="qlab.methods.binary_weights.bop:Bop",
        paper="Helwegen, Widdicombe, Geiger, Liu, Cheng, Nusselder, Latent Weights Do Not Exist: Rethinking Binarized Neural "
        "Network Optimization, NeurIPS 2019",
        arxiv="1906.02107",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "a constant gradient flips a weight at the first k with |g| (1 - (1 - gamma)^k) > tau",
            "one factor on loss and threshold changes nothing",
        ),
    ),
    MethodInfo(
        name="bwn",
        title="BWN: signs times one scale for each filter, the closest such pair",
        target="qlab.methods.binary_weights.bwn:BWN",
        paper="Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net: ImageNet Classification Using Binary Convolutional Neural "
        "Networks, ECCV 2016",
        arxiv="1603.05279",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "no signs and scale are closer to a filter than its own signs times its mean magnitude",
            "the squared distance to them is |W|^2 - n a^2",
        ),
    ),
    MethodInfo(
        name="group_transform",
        title="Group weight transformation: an exact, differentiable map of groups of weights, annealed to signs",
        target="qlab.methods.binary_weights.group_transform:GroupTransformation",
        paper="Shulman, Exact Backpropagation in Binary Weighted Networks with Group Weight Transformations, 2021",
        arxiv="2107.01400",
        family="binary_weights",
        weight_bits=1,
        differentiable=True,
        claims=("trains with the recipe of a float net and comes within 2 points of it on digits",),
        properties=(
            "scale of a group changes nothing, so the gradient is orthogonal to it",
            "the gradient is the derivative of the forward map",
            "annealing alone changes no sign",
        ),
        reconstruction=True,
    ),
    MethodInfo(
        name="askewsgd",
        title="ASkewSGD: float weights in ever smaller intervals around the levels; only their velocity is constrained",
        target="qlab.methods.binary_weights.askewsgd:ASkewSGD",
        paper="Leconte, Schechtman, Moulines, ASkewSGD: An Annealed interval-constrained Optimisation method to train "
        "Quantized Neural Networks, AISTATS 2023",
        arxiv="2211.03741",
        family="binary_weights",
        weight_bits=1,
        differentiable=True,
        claims=("on a convex problem its loss ends below BinaryConnect's, and its weights flip far less often",),
        properties=(
            "the velocity is the nearest one to the gradient step that repairs violations at the rate alpha",
            "the constrained velocity changes no sign",
            "eps = 1 is clipped training in float",
        ),
    ),
)
