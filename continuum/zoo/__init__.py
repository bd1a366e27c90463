"""Published networks, each as field x weights x scheme; one short function a network.

Each takes images (batch, in_channels, height, width), `mlp` vectors (batch, features), and returns logits (batch, num_classes).

| function                  | arXiv      | field                    | weights         | scheme or solver  | noise              |
| ------------------------- | ---------- | ------------------------ | --------------- | ----------------- | ------------------ |
| `resnet`                  | 1512.03385 | relu(x + F(x)) - x       | one set a layer | Euler             |                    |
| `imagenet_resnet`         | 1512.03385 | the same                 | one set a layer | Euler             |                    |
| `se_resnet`               | 1709.01507 | the same, F by channel   | one set a layer | Euler             |                    |
| `resnext`                 | 1611.05431 | the same, F in groups    | one set a layer | Euler             |                    |
| `polynet`                 | 1611.05725 | relu(x + Fx + FFx..) - x | one set a layer | Euler             |                    |
| `preresnet`               | 1603.05027 | F(x), activations first  | one set a layer | Euler             |                    |
| `wide_resnet`             | 1605.07146 | the same                 | one set a layer | Euler             | dropout            |
| `lm_resnet`               | 1710.10121 | F(x), (1 + k) x' = F     | one set a layer | linear two-step   |                    |
| `lm_resnext`              | 1710.10121 | the same, F in groups    | one set a layer | linear two-step   |                    |
| `momentum_resnet`         | 2102.07870 | the same, k = -gamma     | one set a layer | linear two-step   |                    |
| `fractal_resnet`          | 1605.07648 | f1(x) / 2 + f2(x)        | one set a layer | fractal           |                    |
| `fractalnet`              | 1605.07648 | none: sizes change       |                 |                   | dropout, drop-path |
| `revnet`                  | 1707.04585 | y' = F(z), z' = G(y)     | one set a layer | coupling          |                    |
| `hamiltonian`             | 1709.03698 | y' = dH/dz, z' = -dH/dy  | one set a layer | coupling          |                    |
| `midpoint`                | 1709.03698 | relu((K-K^T-gamma)x + b) | one set a layer | two-step midpoint |                    |
| `leapfrog`                | 1709.03698 | x'' = -K^T relu(K x + b) | one set a layer | leapfrog          |                    |
| `antisymmetric`           | 1705.03341 | relu((K-K^T-gamma)x + b) | one set a layer | Euler             |                    |
| `continuous_resnet`       | 2008.02389 | F(x), activations first  | basis functions | RK4               |                    |
| `odenet`                  | 1806.07366 | GN-ReLU-conv, with depth | constant        | dopri5, 1e-3      |                    |
| `mlp`                     | 1904.01681 | two linear maps and tanh | constant        | dopri5, 1e-3      |                    |
| `stochastic_depth_resnet` | 1603.09382 | relu(x + F(x)) - x       | one set a layer | Euler-Maruyama    | stochastic depth   |
| `shake_shake`             | 1705.07485 | (F1(x) + F2(x)) / 2      | one set a layer | Euler-Maruyama    | shake-shake        |
| `stochastic_lm_resnet`    | 1710.10121 | F(x), (1 + k) x' = F     | one set a layer | noisy two-step    | stochastic depth   |
| `dropout_resnet`          | 1812.00174 | F(x), activations first  | one set a layer | Euler-Maruyama    | dropout            |
| `neural_sde`              | 1906.02355 | GN-ReLU-conv, with depth | constant        | Euler-Maruyama    | Gaussian           |
"""

from continuum.zoo.continuous import continuous_resnet, mlp, odenet
from continuum.zoo.fractal import fractalnet
from continuum.zoo.post_activation import imagenet_resnet, polynet, resnet, resnext, se_resnet
from continuum.zoo.pre_activation import fractal_resnet, lm_resnet, lm_resnext, momentum_resnet, preresnet, wide_resnet
from continuum.zoo.reversible import antisymmetric, hamiltonian, leapfrog, midpoint, revnet
from continuum.zoo.stochastic import dropout_resnet, neural_sde, shake_shake, stochastic_depth_resnet, stochastic_lm_resnet

BUILDERS = {
    build.__name__: build
    for build in (
        *(resnet, imagenet_resnet, se_resnet, resnext, polynet),
        *(preresnet, wide_resnet, lm_resnet, lm_resnext, momentum_resnet, fractal_resnet, fractalnet),
        *(revnet, hamiltonian, midpoint, leapfrog, antisymmetric, continuous_resnet, odenet, mlp),
        *(stochastic_depth_resnet, shake_shake, stochastic_lm_resnet, dropout_resnet, neural_sde),
    )
}
"""The functions above by name, in which files and the command line look them up."""
