"""The shelf of data sets. Reading this module imports neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlab.registry import Entry, Registry

__all__ = ["DATA", "DataInfo"]


@dataclass(frozen=True)
class DataInfo(Entry):
    """What the lab knows of a data set without reading it.

    Args:
        kind: "image", inputs (C, H, W); "planar", inputs (2,), which a decision boundary can be drawn for; or "text", inputs
            (T,) of tokens with a label for each, which recurrent nets take.
        net: name of the net that suits the set, the default of the CLI and of the Studio.
        source: "embedded" in a library, "generated", or read from "files", which may have to be fetched first.
    """

    kind: Literal["image", "planar", "text"] = "image"
    net: str = "mlp"
    source: Literal["embedded", "generated", "files"] = "files"


DATA: Registry[DataInfo] = Registry(
    "data set",
    [
        DataInfo(
            "digits",
            "Digits: 1,797 handwritten digits, 8 x 8 grey, 10 classes (scikit-learn)",
            "qlab.data.digits:Digits",
            source="embedded",
        ),
        DataInfo(
            "two_moons",
            "Two moons: interleaved half circles in the plane, 2 classes",
            "qlab.data.planar:TwoMoons",
            kind="planar",
            source="generated",
        ),
        DataInfo(
            "circles",
            "Circles: one circle inside another in the plane, 2 classes",
            "qlab.data.planar:Circles",
            kind="planar",
            source="generated",
        ),
        DataInfo(
            "spirals",
            "Spirals: two interleaved spirals in the plane, 2 classes",
            "qlab.data.planar:Spirals",
            kind="planar",
            source="generated",
        ),
        DataInfo(
            "mnist",
            "MNIST: 70,000 handwritten digits, 28 x 28 grey, 10 classes",
            "qlab.data.idx:MNIST",
            net="lenet",
        ),
        DataInfo(
            "fashion_mnist",
            "Fashion-MNIST: 70,000 pictures of clothes, 28 x 28 grey, 10 classes",
            "qlab.data.idx:FashionMNIST",
            net="lenet",
        ),
        DataInfo(
            "kmnist",
            "Kuzushiji-MNIST: 70,000 cursive Japanese characters, 28 x 28 grey, 10 classes",
            "qlab.data.idx:KMNIST",
            net="lenet",
        ),
        DataInfo(
            "cifar10",
            "CIFAR-10: 60,000 photographs, 32 x 32 colour, 10 classes",
            "qlab.data.cifar:CIFAR10",
            net="resnet20",
        ),
        DataInfo(
            "cifar100",
            "CIFAR-100: 60,000 photographs, 32 x 32 colour, 100 classes",
            "qlab.data.cifar:CIFAR100",
            net="resnet20",
        ),
        DataInfo(
            "image_folder",
            "Image folder: your own pictures, one folder per class",
            "qlab.data.folder:ImageFolder",
            net="resnet20",
        ),
        DataInfo(
            "text",
            "Text: the help that comes with Python (465,000 characters), or a text file of yours; the next symbol",
            "qlab.data.text:Text",
            kind="text",
            net="lstm",
            source="embedded",
        ),
        DataInfo(
            "penn_treebank",
            "Penn Treebank: a million words of newspaper, 10,000 different ones; the next word",
            "qlab.data.text:PennTreebank",
            kind="text",
            net="lstm",
        ),
    ],
)
