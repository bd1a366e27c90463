#!/usr/bin/env bash
# A published ResNet-20 for CIFAR-10, converted and evaluated under many solvers on all 10,000 test images of JPEG CIFAR-10:
#     experiments/published.sh cifar10-resnet20-postact-optionA.th
set -euo pipefail
source=$(realpath "$1")
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
continuum convert "$source" runs/resnet20.pt
continuum compare runs/resnet20.pt --out experiments/results/cifar10_published_resnet20 \
    --data ImageFolder --data.root data/cifar10 --data.normalisation imagenet \
    --solver euler:h=0.5 --solver euler:h=0.25 --solver euler:h=0.125 --solver midpoint:h=0.5 --solver rk4:h=1 \
    --solver rk4:h=0.25 --solver dopri5:rtol=1e-2,atol=1e-2 --solver dopri5:rtol=1e-3,atol=1e-3
