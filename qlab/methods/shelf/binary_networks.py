"""Binary weights and activations."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
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
        name="xnor_net",
        title="XNOR-Net: signs of weights and inputs, scales of filters and, where wanted, of inputs",
        target="qlab.methods.binary_networks.xnor_net:XNORNet",
        paper="Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net: ImageNet Classification Using Binary Convolutional Neural "
        "Networks, ECCV 2016",
        arxiv="1603.05279",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        properties=(
            "signs times the mean magnitude over channels are the closest such map to the input",
            "the scale of a sample, and of positions before linear and 1x1 layers, comes out in front of the product",
        ),
    ),
    MethodInfo(
        name="bireal_net",
        title="Bi-Real Net's training: polynomial slope for activations, magnitude-aware weights, plain signs deployed",
        target="qlab.methods.binary_networks.bireal:BiRealNet",
        paper="Liu, Wu, Luo, Yang, Liu, Cheng, Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved "
        "Representational Capability and Advanced Training Algorithm, ECCV 2018",
        arxiv="1808.00278",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        properties=(
            "the area between sign and the function whose derivative the slope is, is 2/3 against 1 of the clipped one",
            "a batch norm behind a binary layer takes up the scale that deployment drops",
        ),
    ),
    MethodInfo(
        name="ir_net",
        title="IR-Net: balanced, standardised signs, and a slope that goes from identity to sign",
        target="qlab.methods.binary_networks.ir_net:IRNet",
        paper="Qin, Gong, Liu, Shen, Wei, Yu, Song, Forward and Backward Information Retention for Accurate Binary Neural "
        "Networks, CVPR 2020",
        arxiv="1909.10788",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        properties=(
            "binary weights and scales are unchanged by scale and shift of a filter, to which its gradient is orthogonal",
            "scales are powers of two of at most 1",
            "equals dir_net with eps = 0 and no teacher, bit for bit",
        ),
        schedule=("t",),
    ),
    MethodInfo(
        name="dir_net",
        title="DIR-Net: IR-Net with a slope that a share of the weights of each layer always keeps, and a float teacher",
        target="qlab.methods.binary_networks.dir_net:DIRNet",
        paper="Qin, Zhang, Gong, Ding, Xu, Liu, Distribution-sensitive Information Retention for Accurate Binary Neural "
        "Network, IJCV 2023",
        arxiv="2109.12338",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        claims=(
            "balanced weights carry close to one bit each, and the cap keeps a share eps of clustered weights updatable where "
            "the schedule alone leaves fewer",
        ),
        properties=(
            "a share eps of the weights of each layer keeps a slope of tau times the largest",
            "the distance from the teacher is 2 - 2 cos and blind to the scale of either",
            "gamma = 0 equals a run without a teacher, bit for bit",
        ),
        schedule=("t",),
        reconstruction=True,
    ),
    MethodInfo(
        name="qnn",
        title="QNN: weights, activations and gradients of a few bits; BNN with one bit; shift-based batch norm and AdaMax",
        target="qlab.methods.binary_networks.qnn:QNN",
        paper="Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks: Training Neural Networks with Low "
        "Precision Weights and Activations, JMLR 2018; Binarized Neural Networks, NeurIPS 2016",
        arxiv="1609.07061",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        claims=(
            "shift-based batch norm and AdaMax cost less than 1.5 points of accuracy, so do gradients of six bits; without the "
            "multiplier of the learning rate more than a point is lost",
        ),
        properties=(
            "the stochastic sign has the clipped value as its mean",
            "with its roundings removed, shift-based batch norm is batch norm, forward and backward",
            "latent weights stay within [-1, 1], and only their signs matter to the output",
            "the packed net has the deployed net's logits",
        ),
    ),
    MethodInfo(
        name="bnn_repair",
        title="BNN repairs: surrogates, norms, scales, teachers, regularizers, stages and optimizers as switches",
        target="qlab.methods.binary_networks.bnn_repair:BNNRepair",
        paper="de Putter, Corporaal, How to train accurate BNNs for embedded systems?, 2022",
        arxiv="2206.12322",
        family="binary_networks",
        weight_bits=1,
        activation_bits=1,
        claims=(
            "feature normalization and double residuals help a plain binary net; an activation behind a sum needs the former",
        ),
        properties=(
            "surrogates change gradients and no outputs",
            "a positive factor of each filter is absorbed by the batch norm behind it",
            "every value of every switch goes with those of the others",
        ),
        reconstruction=True,
    ),
)
