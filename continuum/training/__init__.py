"""Training on Lightning: the classifier, data modules and callbacks."""

from continuum.training.adaptation import AdaptStep, KeepFriction, LogSmoothness
from continuum.training.callbacks import LogCost, Refine
from continuum.training.classifier import Classifier
from continuum.training.data import ImageData
from continuum.training.endings import EndOnSignal, WholeFiles
from continuum.training.launch import Compile, Launch
from continuum.training.optimizers import Nesterov, OptimizerCallable
from continuum.training.predictions import WritePredictions
from continuum.training.regularisers import DepthSmoothness, Transport
from continuum.training.schedules import OneCycle, Schedule, Steps
from continuum.training.sets import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageFolder

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "AdaptStep",
    "Classifier",
    "Compile",
    "DepthSmoothness",
    "Digits",
    "EndOnSignal",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "KeepFriction",
    "Launch",
    "LogCost",
    "LogSmoothness",
    "Nesterov",
    "OneCycle",
    "OptimizerCallable",
    "Refine",
    "Schedule",
    "Steps",
    "Transport",
    "WholeFiles",
    "WritePredictions",
]
