"""Training on Lightning: the classifier, data modules and callbacks."""

from continuum.training.adaptation import AdaptStep, KeepFriction, LogSmoothness
from continuum.training.callbacks import CompileNetwork, LogCost, Refine
from continuum.training.classifier import Classifier
from continuum.training.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageData, ImageFolder
from continuum.training.endings import EndOnSignal, WholeFiles
from continuum.training.predictions import WritePredictions
from continuum.training.regularisers import DepthSmoothness, Transport
from continuum.training.schedules import OneCycle, Schedule, Steps

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "AdaptStep",
    "Classifier",
    "CompileNetwork",
    "DepthSmoothness",
    "Digits",
    "EndOnSignal",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "KeepFriction",
    "LogCost",
    "LogSmoothness",
    "OneCycle",
    "Refine",
    "Schedule",
    "Steps",
    "Transport",
    "WholeFiles",
    "WritePredictions",
]
