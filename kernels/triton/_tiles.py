"""Functions that several kernels over logits use: no loads, no stores, float32 only.

Elementary functions are written out here. Those of a vendor's device library do not run in Triton's interpreter, and
differ between GPUs.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e), the GPU's own exponential, which flushes to 0
LOWEST = tl.constexpr(-1e4)  # bound of log e in e log e, which avoids 0 times -inf; e itself is 0 long before
ENTROPY, SQUARES, MEAN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
UNIT = tl.constexpr(2.0**24)  # formulas/logprobs.py


@triton.jit
def expm1(x):
    """e^x - 1, by Taylor's series for |x| < 1/2, where the subtraction would lose digits."""
    s = 1.0 / 5040 + x * (1.0 / 40320)
    s = 1.0 / 720 + x * s
    s = 1.0 / 120 + x * s
    s = 1.0 / 24 + x * s
    s = 1.0 / 6 + x * s
    s = 0.5 + x * s
    return tl.where(tl.abs(x) < 0.5, x + x * x * s, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1. For x in (-1/2, 1) it is 2 artanh(s), s = x / (2 + x), because 1 + x would be rounded."""
    s = x / (2.0 + x)
    q = s * s
    a = 1.0 / 13 + q * (1.0 / 15)
    a = 1.0 / 11 + q * a
    a = 1.0 / 9 + q * a
    a = 1.0 / 7 + q * a
    a = 1.0 / 5 + q * a
    a = 1.0 / 3 + q * a
    return tl.where((x > -0.5) & (x < 1.0), 2.0 * (s + s * q * a), tl.log(1.0 + x))


@triton.jit
def log_of_e(e):
    """log e for e >= 0, with an error of at most 1e-7. For 0 and subnormal numbers it is some number below -87.

    With e = 2^k (1 + x), 1/√2 <= 1 + x < √2, log(1 + x) is approximated by x + x² Q(x) with an error of at most 4e-8.
    """
    bits = e.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) & -0x800000  # times 2^23
    x = (bits - k).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(x, -0.100345822, 0.163356364)
    q = tl.fma(x, q, -0.173260023)
    q = tl.fma(x, q, 0.198882781)
    q = tl.fma(x, q, -0.249614646)
    q = tl.fma(x, q, 0.333352614)
    q = tl.fma(x, q, -0.500005844)
    return tl.fma(k.to(tl.float32), 0.6931471805599453 / 2**23, tl.fma(x, x * q, x))


@triton.jit
def tanh(x):
    """tanh x: with e = expm1(-2|x|), |tanh x| = -e / (2 + e). Precise for small and for large |x|."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_slope(x):
    """1 - tanh² x, as 4q / (1 + q)² with q = e^(-2|x|). The subtraction would lose all digits for large |x|."""
    q = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * q / ((1.0 + q) * (1.0 + q))


@triton.jit
def product(x, bias, scale, BIASED: tl.constexpr, SCALED: tl.constexpr):
    """y = scale (x + bias). Without bias and scale it is x unchanged."""
    if BIASED:
        x += bias
    if SCALED:
        x *= scale
    return x


@triton.jit
def logit(y, softcap, inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """z = softcap tanh(y / softcap) / temperature of y = scale (x + bias); -inf stays -inf.

    It is monotonic in y; with a softcap this holds up to the last bit.
    """
    if CAPPED:
        y = tl.where(y == float("-inf"), y, softcap * tanh(y / softcap))
    if SCALED:
        y *= inv_temperature
    return y


@triton.jit
def base_of(m):
    """What is subtracted from logits with maximum m: m, or 0 if all logits are -inf, because -inf - (-inf) is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tokens(z, base, WANT: tl.constexpr):
    """For each logit: e = exp(z - base), the same but 0 where z is the maximum, and (z - base) e.

    NaN gives NaN in all three, and a banned token (z = -inf) gives 0 in all three.
    """
    d = z - base
    e = tl.exp2(d * LOG2E)
    below = tl.where(d >= 0, 0.0, e)
    slanted = e
    if ENTROPY & WANT:
        slanted = tl.maximum(d, LOWEST) * e
    return e, below, slanted


@triton.jit
def ties_of(below, every):
    """How many tokens attain the maximum: the difference of Σ e with and without them, because e is 1 for each."""
    return tl.floor(every - below + 0.5)


@triton.jit
def others(below, ties):
    """The sum over all tokens but the first maximum, from the sum over the tokens below the maximum."""
    return tl.where(ties > 1, below + (ties - 1.0), below)


@triton.jit
def label_gradient(g, k, h, logp, entropy):
    """dL/dz of the label, -g expm1(logp) + k p - h p (logp + H). p = e^logp is not rounded; 0 for a banned label."""
    p = tl.exp(logp)
    dz = -g * expm1(logp) + k * p - tl.where(h != 0, h * p * (logp + entropy), 0.0)
    return tl.where(logp == float("-inf"), 0.0, dz)


@triton.jit
def slopes(g, k, h, shift, entropy, factor):
    """a and b of dL/dz · factor = e (a + b log e) for all tokens but the label.

    e = exp(z - top), shift = top - lse, p = e exp(shift), dL/dz = p (k - g) - h p (log p + H).
    b is 0 where h is 0, even if H is NaN there. Both are 0 where exp(shift) is 0.
    """
    f = tl.exp2(shift * LOG2E)
    b = tl.where(h != 0, -h * f, 0.0)
    a = f * (k - g) + tl.where(h != 0, b * (shift + entropy), 0.0)
    return tl.where(f == 0, 0.0, a * factor), tl.where(f == 0, 0.0, b * factor)


@triton.jit
def sloped(e, log_e, a, b, CURVED: tl.constexpr):
    """e (a + b log e), with log e >= LOWEST. Without CURVED, b is taken as 0 and log e is not used."""
    if CURVED:
        a = tl.fma(b, log_e, a)
    return e * a
