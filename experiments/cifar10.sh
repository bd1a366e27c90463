#!/usr/bin/env bash
# Trains the three networks on JPEG CIFAR-10 and compares them under many solvers. Started again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
for name in preresnet20 lm_resnet20 odenet; do
    continuum fit --config "experiments/cifar10_$name.yaml" --ckpt_path last
done
for name in preresnet20 lm_resnet20; do
    continuum compare "runs/$name/checkpoints/last.ckpt" --images 2000 --out "experiments/results/cifar10_$name" \
        --solver euler:h=0.5 --solver euler:h=0.25 --solver euler:h=0.125 --solver midpoint:h=0.5 --solver rk4:h=1 \
        --solver rk4:h=0.25 --solver dopri5:rtol=1e-2,atol=1e-2 --solver dopri5:rtol=1e-4,atol=1e-4
done
continuum compare runs/odenet/checkpoints/last.ckpt --images 2000 --out experiments/results/cifar10_odenet \
    --solver euler:h=1 --solver euler:h=0.25 --solver euler:h=0.0625 --solver midpoint:h=0.25 --solver rk4:h=1 \
    --solver rk4:h=0.25 --solver bosh3:rtol=1e-2,atol=1e-2 --solver dopri5:rtol=1e-1,atol=1e-1 \
    --solver dopri5:rtol=1e-4,atol=1e-4
