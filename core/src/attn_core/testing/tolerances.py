"""How far a right answer may lie from the oracle: derived for each value from the roundings that a kernel must make.

The model of a kernel, in its working dtype of unit roundoff u (bfloat16 2^-8, float16 2^-11, float32 2^-24):

1. ``scale * q`` is rounded to the working dtype; q.k accumulates in fp32;
2. a soft-capped score is rounded to 11 bits (hardware tanh), or to 24 in float32;
3. the unnormalised probabilities are rounded to the working dtype; their product with v accumulates in fp32;
4. the output is rounded to the working dtype.

The same maths runs once with these roundings made (`_rounded`); the error of that run, together with the variances that
steps 3 and 4 must have (a rounding of x is uniform in +-u|x|, variance (u x)^2 / 3), is the standard error of an honest
kernel. A backend may be `ROW_FACTOR` of it away in the root mean square over a row [Dv], and `VALUE_FACTOR` in one
value: what sums of rounding errors never do, and a missing key does. What fp32 arithmetic adds is bounded in
`_single_precision` with the probabilistic bound u * sqrt(terms) of Higham and Mary (2019). No figure here was fitted to
a backend.

Kernels keep their sums in base 2, since exp2 and log2 are what hardware has: a score or a sink goes in by a product
with log2(e), and the LSE comes out by one with ln 2. Both constants and both products are rounded once, so that the LSE
may be 4 u of fp32 off, relatively, where nothing else is left: that of a row that sees no key is its sink.

An fp8 cache changes nothing, because the oracle reads what the cache stores. A backend whose manifest says that it
quantises queries computes with 4-bit significands (e4m3) in steps 1 and 3, and is held to that. Its step 1 needs more
than a standard error: one error of a query moves every value of a row, so it does not average out over the row, and it
passes through an exponential, so that large errors are neither rare nor unbounded as those of sums are. Therefore the
factor stands where the error arises: an answer may be as far away as any of 32 runs of the same maths, with queries
whose errors are `ROW_FACTOR` times as large (`_query_spread`); the largest of 32 normal numbers is 2.1 on average, so
where errors are small this is `VALUE_FACTOR` standard errors. Which scale a kernel gives its queries (for a tensor, a
request, a head) changes nothing: e4m3 rounds relatively down to 2^-14 of its largest number. Tensor cores that add e4m3
products with 13 bits behind the largest, as Hopper's do, err by a hundredth of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.kv_cache import FP8_DTYPES
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.exact_place import exact_place
from attn_core.testing.reference import Problem, masked_scores, softmax_with_sink, weighted_values

#: Standard errors that the root mean square over one row may be away: for Dv >= 16 independent errors, p < 1e-40.
ROW_FACTOR: Final = 4.0
#: Standard errors that a single value may be away: p < 1e-15 for each.
VALUE_FACTOR: Final = 8.0

#: Roundings on the way into base 2 and back: log2(e), ln 2, and the product with each.
_LOG_ROUNDINGS: Final = 4

_UNIT: Final = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_E4M3_UNIT: Final = 2.0**-4
_SINGLE: Final = 2.0**-24
_HARDWARE_TANH: Final = 2.0**-11
#: Runs with other errors of quantised queries.
_DRAWS: Final = 32


@dataclass(frozen=True, slots=True)
class Precision:
    """Unit roundoffs of the three roundings that the contract leaves to a kernel, and the dtype of its output."""

    query: float
    probability: float
    output: float
    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype, *, quantizes_query: bool = False) -> Precision:
        """For a working dtype; ``quantizes_query``: queries and probabilities are e4m3, as the manifest says."""
        unit = _UNIT[dtype]
        coarse = _E4M3_UNIT if quantizes_query else unit
        return cls(coarse, coarse, unit, dtype)

    @property
    def quantizes_query(self) -> bool:
        """Whether queries are rounded more coarsely than the output."""
        return self.query > self.output

    @property
    def softcap(self) -> float:
        return max(_SINGLE, min(_HARDWARE_TANH, self.output))


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the oracle says, and how far an answer may be from it. fp64: out [T, Hq, Dv], lse [T, Hq].

    ``row`` [T, Hq] bounds the root mean square of an output row's error, ``value`` [T, Hq, Dv] each value's,
    ``lse_value`` [T, Hq] that of the LSE.
    """

    out: Tensor
    lse: Tensor
    row: Tensor
    value: Tensor
    lse_value: Tensor


def expect(found: Iterator[Problem], q: Tensor, layer: AttentionLayer, precision: Precision) -> Expected:
    """The oracle's answer to all ``found`` problems with its tolerances; rows of no problem are 0, LSE -inf."""
    shape = (q.shape[0], layer.num_q_heads, layer.v_head_dim)
    place = exact_place(q.device)
    out, value = (torch.zeros(shape, dtype=torch.float64, device=place) for _ in range(2))
    row, lse_value = (torch.zeros(shape[:2], dtype=torch.float64, device=place) for _ in range(2))
    lse = torch.full(shape[:2], float("-inf"), dtype=torch.float64, device=place)
    for problem in found:
        one = _expect_one(problem, layer, precision)
        out[problem.rows], lse[problem.rows] = one.out, one.lse
        row[problem.rows], value[problem.rows], lse_value[problem.rows] = one.row, one.value, one.lse_value
    return Expected(out, lse, row, value, lse_value)


def _expect_one(problem: Problem, layer: AttentionLayer, precision: Precision) -> Expected:
    scores = masked_scores(problem, layer)
    probabilities, lse = softmax_with_sink(scores, layer)
    out = weighted_values(probabilities, problem.v)
    model_error = _model_output(problem, layer, lse, precision) - out
    squares = weighted_values(probabilities.square(), problem.v.square())
    variance = (precision.probability**2 * squares + precision.output**2 * out.square()) / 3
    variance = variance + model_error.square().mean(-1, keepdim=True)
    spread = _Spread.none(out, lse)
    if precision.quantizes_query:
        spread = _query_spread(problem, layer, out, lse, precision)
    single = _single_precision(problem, scores, layer)
    floor = single[..., None] * weighted_values(probabilities, problem.v.abs()) + _smallest(precision.dtype)
    return Expected(
        out=out,
        lse=lse,
        row=(ROW_FACTOR**2 * variance.mean(-1) + spread.row).sqrt() + floor.square().mean(-1).sqrt(),
        value=(VALUE_FACTOR**2 * variance + spread.value).sqrt() + floor,
        lse_value=_lse_tolerance(problem, scores, probabilities, layer, precision)
        + spread.lse.sqrt()
        + single
        + _LOG_ROUNDINGS * _SINGLE * torch.where(lse.isfinite(), lse.abs(), 0.0),
    )


def _model_output(problem: Problem, layer: AttentionLayer, lse: Tensor, precision: Precision) -> Tensor:
    """[n, Hq, Dv]: the maths of `reference` with a kernel's roundings made; normalised by the exact denominator.

    Queries that are quantised are left as they are: their errors are `_query_spread`.
    """
    if not precision.quantizes_query:
        problem = replace(problem, q=_rounded(problem.q * layer.scale, precision.query) / layer.scale)
    scores = masked_scores(problem, layer)
    if layer.softcap:
        scores = _rounded(scores, precision.softcap)
    kv_heads, group, n, _ = scores.shape
    # a kernel rounds e^(s - running max), here e^(s - lse): rounding is relative, so the shift changes no variance
    log_denominator = torch.where(lse.isfinite(), lse, 0.0).transpose(0, 1).reshape(kv_heads, group, n, 1)
    weights = _rounded(torch.exp(scores - log_denominator), precision.probability)
    return _rounded(weighted_values(weights, problem.v), precision.output)


@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """The largest squares of errors: of values [n, Hq, Dv], of rows in the mean [n, Hq], of the LSE [n, Hq]."""

    value: Tensor
    row: Tensor
    lse: Tensor

    @classmethod
    def none(cls, out: Tensor, lse: Tensor) -> _Spread:
        return cls(torch.zeros_like(out), torch.zeros_like(lse), torch.zeros_like(lse))

    def with_errors(self, out: Tensor, lse: Tensor) -> _Spread:
        """With the errors of one more run."""
        squares = out.square()
        return _Spread(
            torch.maximum(self.value, squares),
            torch.maximum(self.row, squares.mean(-1)),
            torch.maximum(self.lse, lse.square()),
        )


def _query_spread(problem: Problem, layer: AttentionLayer, out: Tensor, lse: Tensor, precision: Precision) -> _Spread:
    """How far the answers move when each element of a query is off by uniform +-u|q|, ROW_FACTOR times over."""
    random = torch.Generator(problem.q.device).manual_seed(0)
    largest = ROW_FACTOR * precision.query
    spread = _Spread.none(out, lse)
    for _ in range(_DRAWS):
        uniform = 2 * torch.rand(problem.q.shape, generator=random, dtype=out.dtype, device=out.device) - 1
        scores = masked_scores(replace(problem, q=problem.q * (1 + largest * uniform)), layer)
        probabilities, moved = softmax_with_sink(scores, layer)
        lse_error = torch.where(lse.isfinite(), moved - lse, 0.0)
        spread = spread.with_errors(weighted_values(probabilities, problem.v) - out, lse_error)
    return spread


def _lse_tolerance(
    problem: Problem, scores: Tensor, probabilities: Tensor, layer: AttentionLayer, precision: Precision
) -> Tensor:
    """[n, Hq]: an error dq of a query moves the LSE by scale * dq . (sum of p_j k_j), to first order.

    Of a query that is quantised only the rest of the roundings: see `_query_spread`.
    """
    slope = probabilities
    bias = torch.zeros_like(problem.q[..., 0])
    finite = torch.where(problem.visible, scores, 0.0)
    if layer.softcap:
        slope = probabilities * (1 - (finite / layer.softcap).square())
        bias = _by_query((probabilities * finite.abs()).sum(-1)) * precision.softcap
    mean_key = weighted_values(slope, problem.k)
    query = precision.output if precision.quantizes_query else precision.query
    from_query = (query * layer.scale) ** 2 * (problem.q * mean_key).square().sum(-1)
    from_weights = precision.probability**2 * _by_query(probabilities.square().sum(-1))
    return VALUE_FACTOR * ((from_query + from_weights) / 3).sqrt() + bias


def _single_precision(problem: Problem, scores: Tensor, layer: AttentionLayer) -> Tensor:
    """[n, Hq]: relative error of a weighted sum from fp32: two long sums, the exponential of a large score."""
    n, heads, width = problem.q.shape
    if problem.k.shape[0] == 0:
        return problem.q.new_zeros(n, heads)
    largest_score = _by_query(torch.where(problem.visible, scores, 0.0).abs().amax(-1))
    longest_key = problem.k.norm(dim=-1).amax()
    dot = problem.q.norm(dim=-1) * longest_key * (abs(layer.scale) * math.sqrt(width))
    relative: Tensor = dot + 2 * largest_score + (math.sqrt(problem.k.shape[0]) + 8)
    return _SINGLE * relative


def _by_query(values: Tensor) -> Tensor:
    """[Hkv, G, n] as [n, Hq]."""
    return values.flatten(0, 1).transpose(0, 1)


def _rounded(x: Tensor, unit: float) -> Tensor:
    """x with a significand of -log2(unit) bits, rounded to nearest even; the exponent is not limited."""
    significand, exponent = torch.frexp(x)
    # not finite: keep it (masked scores are -inf)
    return torch.where(x.isfinite(), torch.ldexp((significand / unit).round() * unit, exponent), x)


def _smallest(dtype: torch.dtype) -> float:
    """The spacing of subnormal numbers: results closer to 0 may be lost whole."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps)


def stored_error_bound(value: Tensor, dtype: torch.dtype, working: torch.dtype) -> Tensor:
    """How far the number that a cache of ``dtype`` stores may be from ``value`` (already divided by the scale, fp64).

    0 unless the cache is fp8: then half a step of fp8, one rounding of the quotient in the working dtype, and two in
    fp32, of the scale and of its reciprocal.
    """
    if dtype not in FP8_DTYPES:
        return torch.zeros_like(value)
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
    half_step = torch.ldexp(torch.full_like(value, info.eps / 4), exponent)
    return half_step + (_UNIT[working] + 2 * _SINGLE) * value.abs()
