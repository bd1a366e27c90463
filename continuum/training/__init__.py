"""Training on Lightning: the classifier, data modules and callbacks."""

from continuum.training.callbacks import LogCost, Refine, WritePredictions
from continuum.training.classifier import Classifier, OneCycle, Schedule, Steps
from continuum.training.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageData, ImageFolder

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Classifier",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "LogCost",
    "OneCycle",
    "Refine",
    "Schedule",
    "Steps",
    "WritePredictions",
]
