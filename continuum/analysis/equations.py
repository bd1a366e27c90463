"""Modified equations: what the steps of a scheme solve more exactly than x' = f, and on which fields they stay bounded.

A linear multistep method sum_j alpha_j x_{n+j} = h^p sum_j beta_j f_{n+j}, with rho(r) = sum_j alpha_j r^j and sigma(r) =
sum_j beta_j r^j, and an explicit Runge-Kutta method of order p solve

    sum_q c_q h^(q - p) x^(q) = f            with rho(e^z) / sigma(e^z) = sum_q c_q z^q,
    x' = f + h^p sum_tau c(tau) F(tau)       with c(tau) = (b . phi(tau) - 1 / density(tau)) / symmetry(tau),

where tau runs over the rooted trees with p + 1 nodes and F(tau) is an elementary differential, such as f'f or f''(f, f). The
coefficients are exact. For LM-ResNet c_1 = 1 + k and c_2 = (1 - k) / 2 (arXiv 1710.10121).
"""

import cmath
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from continuum.analysis.stability import level_curve, polynomial_roots, value
from continuum.schemes import Scheme
from continuum.schemes.runge_kutta import Tableau, Tree, density, rooted_trees

if TYPE_CHECKING:
    import sympy

Coefficient: TypeAlias = "int | float | Fraction | sympy.Expr"
"""An exact number or a symbol; a float stands for its shortest decimal, 0.1 for 1/10."""


@dataclass(frozen=True)
class LinearMultistep:
    """sum_j alpha_j x_{n+j} = h^power sum_j beta_j f_{n+j}, j = 0, ..., m, for x^(power) = f; coefficients become sympy's.

    >>> lm = LinearMultistep(alpha=(0.3, -1.3, 1), beta=(0, 1, 0))  # LM-ResNet with k = -0.3
    >>> print(lm)
    7/10 x' + 13 h/20 x'' = f + O(h^2)
    >>> lm.order, lm.zero_stable
    (1, True)

    Raises:
        ValueError: alpha and beta of different length or with fewer than two entries, alpha_m = 0, or a power below 1; from
            `modified`, a method that is not consistent; from what needs numbers, a symbol.
    """

    alpha: tuple["Coefficient", ...]
    beta: tuple["Coefficient", ...]
    power: int = 1

    def __post_init__(self) -> None:
        if not len(self.alpha) == len(self.beta) >= 2 or not self.alpha[-1] or self.power < 1:
            raise ValueError(
                "a multistep method has alpha_0, ..., alpha_m with alpha_m not zero, as many beta, m >= 1 and a power of 1 or "
                f"more; got alpha={self.alpha}, beta={self.beta}, power={self.power}"
            )
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, tuple(map(_exact, getattr(self, name))))

    linear = False

    @property
    def past(self) -> int:
        """How many states before the present one a step looks at."""
        return len(self.alpha) - 2

    def modified(self, terms: int = 2) -> dict[int, "sympy.Expr"]:
        """The coefficients c_q of sum_q c_q h^(q - power) x^(q) = f, for q = power, ..., power + terms - 1."""
        import sympy

        last = self.power + terms
        rho, sigma = ([_at_exponential(row, q) for q in range(last)] for row in (self.alpha, self.beta))
        if sigma[0] == 0:
            raise ValueError(f"not consistent: the beta sum to 0, so that f does not count; got beta={self.beta}")
        c: list[sympy.Expr] = []
        for q in range(last):
            known = sum((c[i] * sigma[q - i] for i in range(q)), sympy.Integer(0))
            c.append(sympy.cancel((rho[q] - known) / sigma[0]))
        if any(c[: self.power]) or not c[self.power]:
            begins = next((f"z^{q}" for q, coefficient in enumerate(c) if coefficient), f"z^{len(c)} or later")
            raise ValueError(
                f"not consistent with an equation of order {self.power}: rho(e^z) begins with {begins}; got alpha={self.alpha}"
            )
        return dict(enumerate(c[self.power :], self.power))

    def leading(self) -> tuple[int, "sympy.Expr"]:
        """(q, c_q) of the first term behind x^(power)."""
        c = self.modified(2 * len(self.alpha) + 2)  # no consistent method has so high an order
        return next((q, coefficient) for q, coefficient in c.items() if q > self.power and coefficient)

    @property
    def order(self) -> int:
        """The order of consistency: that of the global error, if the method is zero-stable."""
        return self.leading()[0] - self.power

    def defect(self) -> "sympy.Expr":
        """d of x_{n+m} - x(t_{n+m}) = d h^q x^(q) + O(h^(q + 1)), q = power + order, after an exact past."""
        return -sum(self.beta) * self.leading()[1] / self.alpha[-1]  # pyright: ignore[reportOperatorIssue]

    def __str__(self) -> str:
        q, c = self.leading()
        first = _term(self.modified(1)[self.power], 0, _primed("x", self.power), leads=True)
        return f"{first}{_term(c, q - self.power, _primed('x', q))} = f + O(h^{q - self.power + 1})"

    def roots(self) -> dict["sympy.Expr", int]:
        """The roots of the characteristic polynomial rho, exact, with their multiplicities."""
        import sympy

        rho = self._characteristic()
        found = cast(dict[sympy.Expr, int], sympy.roots(rho))
        # Beyond degree four radicals may not do, but roots of polynomials with rational coefficients are exact as such.
        return found if sum(found.values()) == rho.degree() else Counter(cast(list[sympy.Expr], rho.all_roots()))

    @property
    def zero_stable(self) -> bool:
        """The root condition: no root of rho outside the unit circle, and on it none of multiplicity above the power."""
        _numbers(self.alpha)
        _, factors = self._characteristic().sqf_list()  # so that multiplicities are not a matter of rounding
        sizes = [(abs(complex(root)), count) for factor, count in factors for root in factor.nroots()]
        return all(size < 1 - 1e-12 or (size < 1 + 1e-12 and count <= self.power) for size, count in sizes)

    def _characteristic(self) -> "sympy.Poly":
        import sympy

        return sympy.Poly(list(reversed(self.alpha)), sympy.Dummy("r"))

    def step_polynomial(self, z: Tensor) -> Tensor:
        """The coefficients (..., m + 1) of rho - z sigma, for z = h^power rate of shape (...)."""
        alpha, beta = (torch.tensor(_numbers(row), dtype=torch.complex128) for row in (self.alpha, self.beta))
        return alpha - z[..., None] * beta

    def amplification(self, z: Tensor | Sequence[complex]) -> Tensor:
        """The largest |root| of rho - z sigma, by which steps multiply in the end; (...) for z = h^power rate, (...).

        Infinite where an implicit step has no solution, alpha_m = z beta_m.
        """
        polynomial = self.step_polynomial(_complex(z))
        unsolvable = polynomial[..., -1] == 0
        roots = polynomial_roots(torch.where(unsolvable[..., None], torch.ones_like(polynomial), polynomial))
        return roots.abs().amax(-1).masked_fill(unsolvable, math.inf)

    def root(self, z: complex) -> complex:
        """The largest root r of rho - z sigma, for z = h^power rate."""
        roots = polynomial_roots(self.step_polynomial(_complex(z))).tolist()
        return max(roots, key=lambda root: (round(abs(root), 12), root.imag))

    def modified_rate(self, rate: complex, h: float, terms: int) -> complex:
        """The root s of sum_q c_q h^(q - power) s^q = rate next to that of the first term alone."""
        numbers = _numbers([*self.modified(terms).values()])
        limit = (complex(rate) / numbers[0]) ** (1 / self.power)
        while not numbers[-1]:
            numbers = numbers[:-1]
        row = [-rate, *[0.0] * (self.power - 1), *(c * h**i for i, c in enumerate(numbers))]
        return min(polynomial_roots(_complex(row)).tolist(), key=lambda root: abs(root - limit))

    def boundary(self, points: int = 360) -> tuple[list[float], list[float]]:
        """The boundary locus z = rho(e^(ia)) / sigma(e^(ia)), as real and imaginary parts: the region of absolute stability
        is bounded by parts of it.
        """
        r = torch.exp(1j * torch.linspace(0, 2 * math.pi, _checked(points), dtype=torch.float64))
        below = value(_numbers(self.beta), r)
        z = value(_numbers(self.alpha), r)[below.abs() > 1e-9] / below[below.abs() > 1e-9]
        return z.real.tolist(), z.imag.tolist()


@dataclass(frozen=True)
class OneStep:
    """x+ = R(h rate) x on x' = rate x, with R(z) = sum_j r_j z^j, and x' = f + h^order sum_tau c(tau) F(tau) on any field.

    `defect` holds c(tau), `stability` r_j, all exact. With `linear`, the method is one for linear fields only.

    >>> print(OneStep.of(Tableau(c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2), order=2)))
    x' = f - h^2/6 f'f'f + h^2/12 f''(f, f) + O(h^3)

    Raises:
        ValueError: from `of`, coefficients that are not close to fractions with denominators up to 10^6.
    """

    stability: tuple[Fraction, ...]
    order: int
    defect: Mapping[Tree, Fraction]
    linear: bool = False

    zero_stable = True
    """Where f = 0, x stays."""

    power = 1
    past = 0

    @classmethod
    def of(cls, tableau: Tableau) -> "OneStep":
        """The method of a tableau; its order is the one that its coefficients have."""
        rows = tuple(tuple(map(_fraction, row)) for row in tableau.a)
        exact = replace(tableau, a=cast(Any, rows), b=cast(Any, tuple(map(_fraction, tableau.b))))
        chain: Tree = ()
        stability = [Fraction(1)]
        for _ in tableau.b:
            stability.append(_weight(exact, chain))
            chain = (chain,)
        order = tableau.order
        while not (defect := _defect(exact, order + 1)):
            order += 1
        return cls(tuple(stability), order, defect)

    def __str__(self) -> str:
        terms = "".join(_term(c, self.order, differential(tree)) for tree, c in self.defect.items())
        return f"x' = f{terms} + O(h^{self.order + 1})" + (", for linear f" if self.linear else "")

    def modified(self, terms: int = 2) -> dict[int, Fraction]:
        """The coefficients l_q of x' = sum_q l_q h^(q - 1) A^q x on x' = A x, q = 1, ..., terms: log R(z) = sum_q l_q z^q."""
        r = [*self.stability, *[Fraction(0)] * terms]
        found: dict[int, Fraction] = {}
        for q in range(1, terms + 1):  # R' = R (log R)'
            found[q] = r[q] - sum((i * found[i] * r[q - i] for i in range(1, q)), Fraction(0)) / q
        return found

    def amplification(self, z: Tensor | Sequence[complex]) -> Tensor:
        """|R(z)|, by which a step multiplies: (...) for z = h rate of shape (...)."""
        return value(_floats(self.stability), _complex(z)).abs()

    def root(self, z: complex) -> complex:
        """R(z), for z = h rate."""
        return value(_floats(self.stability), _complex([z])).tolist()[0]

    def modified_rate(self, rate: complex, h: float, terms: int) -> complex:
        """sum_q l_q h^(q - 1) rate^q."""
        numbers = _floats([*self.modified(terms).values()])
        return sum(c * h**i * rate ** (i + 1) for i, c in enumerate(numbers))

    def boundary(self, points: int = 360) -> tuple[list[float], list[float]]:
        """The part of |R(z)| = 1 that goes through z = 0, as real and imaginary parts."""
        return level_curve(_floats(self.stability), _checked(points))


def method_of(scheme: Scheme, k: float | None = None) -> LinearMultistep | OneStep:
    """What a scheme is in numbers. `k` is that of `LinearTwoStep`'s layers, the symbol k if it is not given.

    >>> from continuum.schemes import RK4, LinearTwoStep
    >>> print(method_of(LinearTwoStep()))
    (1 + k) x' + (1 - k) h/2 x'' = f + O(h^2)
    >>> method_of(RK4()).order
    4

    `Leapfrog` is the method of the positions of x'' = f, of power 2.

    Raises:
        TypeError: a scheme that is neither, such as those for noise or for halves that move by different fields.
    """
    if scheme.tableau is not None:
        return OneStep.of(scheme.tableau)
    if scheme.series is not None:
        r = (*scheme.series, 0)
        return OneStep(tuple(map(Fraction, scheme.series)), 1, {((),): r[2] - Fraction(1, 2)}, linear=True)
    import sympy

    multistep = scheme.multistep(sympy.Symbol("k", real=True) if k is None else _exact(k))
    if multistep is not None:
        alpha, beta, power = multistep
        alpha, beta = (tuple(_fraction(c) if isinstance(c, float) else c for c in row) for row in (alpha, beta))
        return LinearMultistep(alpha, beta, power)
    raise TypeError(
        f"modified equations are known of schemes that say a tableau, a series or a multistep method, and "
        f"{type(scheme).__name__} says none"
    )


def dominant_rate(method: LinearMultistep | OneStep, rate: complex, h: float) -> complex:
    """log(r) / h for the largest root r of a step on x^(power) = rate x: how fast the steps really grow; -inf for r = 0.

    >>> from continuum.schemes import LinearTwoStep
    >>> round(dominant_rate(method_of(LinearTwoStep(), k=-0.5), -1.0, h=0.01).real, 5)
    -2.06374
    """
    r = method.root(h**method.power * rate)
    return cmath.log(r) / h if r else complex(-math.inf)


def modified_rate(method: LinearMultistep | OneStep, rate: complex, h: float, terms: int = 2) -> complex:
    """The rate of growth of the modified equation of x^(power) = rate x, cut off after so many terms.

    Of a multistep method it is the root s of sum_q c_q h^(q - power) s^q = rate next to that of the first term alone.

    >>> from continuum.schemes import LinearTwoStep
    >>> round(modified_rate(method_of(LinearTwoStep(), k=-0.5), -1.0, h=0.01).real, 5)
    -2.06389
    """
    return method.modified_rate(rate, h, terms)


def differential(tree: Tree) -> str:
    """The elementary differential of a tree as text.

    >>> differential(((), ((),)))
    "f''(f, f'f)"
    """
    inner = [differential(subtree) for subtree in tree]
    if not inner:
        return "f"
    return f"f'{inner[0]}" if len(inner) == 1 else f"{_primed('f', len(inner))}({', '.join(inner)})"


def symmetry(tree: Tree) -> int:
    """The number of ways to map a tree to itself.

    >>> symmetry(((), (), ()))
    6
    """
    return math.prod(math.factorial(count) * symmetry(subtree) ** count for subtree, count in Counter(tree).items())


def _weight(exact: Tableau, tree: Tree) -> Fraction:
    """b . phi(tree)."""
    weights = cast(list[Fraction], exact.elementary_weights(tree))
    return sum((Fraction(b) * phi for b, phi in zip(exact.b, weights, strict=True)), Fraction(0))


def _defect(exact: Tableau, nodes: int) -> dict[Tree, Fraction]:
    """c(tau) of the trees with so many nodes where it is not zero."""
    found = {tree: (_weight(exact, tree) - Fraction(1, density(tree))) / symmetry(tree) for tree in rooted_trees(nodes)}
    return {tree: c for tree, c in found.items() if c}


def _exact(number: Coefficient) -> "sympy.Expr":
    import sympy

    return cast(sympy.Expr, sympy.Rational(repr(float(number))) if isinstance(number, float) else sympy.sympify(number))


def _at_exponential(row: Sequence["Coefficient"], q: int) -> "sympy.Expr":
    """The coefficient of z^q in sum_j row_j e^(jz)."""
    import sympy

    return sum((_exact(c) * j**q for j, c in enumerate(row)), sympy.Integer(0)) / sympy.factorial(q)


def _numbers(row: Sequence["Coefficient"]) -> list[float]:
    """Coefficients as floats; ValueError for a symbol."""
    for c in map(_exact, row):
        if c.free_symbols:
            raise ValueError(f"this needs a number in the place of {c.free_symbols.pop()}: method_of(LinearTwoStep(), k=-0.1)")
    return [float(cast(float, c)) for c in row]


def _floats(row: Sequence[Fraction]) -> list[float]:
    return [float(c) for c in row]


def _fraction(number: float) -> Fraction:
    for digits in range(1, 7):
        simple = Fraction(number).limit_denominator(10**digits)
        if abs(float(simple) - number) <= 2**-52 * abs(number):
            return simple
    raise ValueError(f"the coefficient {number} is no fraction with a denominator up to 10^6, so there is no exact equation")


def _complex(z: Tensor | Sequence[complex] | complex) -> Tensor:
    return torch.as_tensor(z, dtype=torch.complex128, device="cpu")


def _checked(points: int) -> int:
    if points < 2:
        raise ValueError(f"a curve has two points or more, not {points}")
    return points


def _primed(name: str, count: int) -> str:
    return name + "'" * count if count <= 4 else f"{name}^({count})"


def _term(c: "sympy.Expr | Fraction", power: int, of: str, leads: bool = False) -> str:
    """c h^power of, with its sign; fractions too long to read become decimals."""
    import sympy

    above, below = sympy.fraction(sympy.together(_exact(c)))
    if above.free_symbols:
        sign, size = "+", f"({sympy.sstr(sympy.expand(above), order='rev-lex')})"
    else:
        sign, size = "-" if above < 0 else "+", str(abs(above))
        if abs(above) > 9999:
            size, below = f"{float(abs(above) / below):.4g}", sympy.Integer(1)
    step = "" if not power else "h" if power == 1 else f"h^{power}"
    factor = " ".join(part for part in (size if size != "1" or not step else "", step) if part)
    factor = factor if below == 1 else f"{factor}/{below}"
    text = of if factor == "1" else f"{factor} {of}"
    return f"{'-' if sign == '-' else ''}{text}" if leads else f" {sign} {text}"
