"""Pure pieces of the kernels over logits: no loads, no stores, float32 throughout.

The elementary functions are written out, because those of a vendor's device library run neither in Triton's interpreter
nor alike on every GPU.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e): a GPU has no other, and this one flushes to 0
LOWEST = tl.constexpr(-1e4)  # of log e in a product with e, which is 0 long before: no -inf times 0
ENTROPY, SQUARES, MEAN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
UNIT = tl.constexpr(2.0**24)  # formulas/logprobs.py


@triton.jit
def expm1(x):
    """e^x - 1. Taylor's series below 1/2, where the subtraction would cancel."""
    s = 1.0 / 5040 + x * (1.0 / 40320)
    s = 1.0 / 720 + x * s
    s = 1.0 / 120 + x * s
    s = 1.0 / 24 + x * s
    s = 1.0 / 6 + x * s
    s = 0.5 + x * s
    return tl.where(tl.abs(x) < 0.5, x + x * x * s, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1. On (-1/2, 1) 2 artanh(s), s = x / (2 + x), which does not round 1 + x."""
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
    """log e of 0 <= e, within 1e-7; of 0 and of what is below float32's normal numbers some number below -87.

    e = 2^k (1 + x), 1/√2 <= 1 + x < √2, and x + x² Q(x) is log(1 + x) within 4e-8, by least squares of its maximum.
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
    """With e = expm1(-2|x|): |tanh x| = -e / (2 + e), full relative precision at both ends."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_slope(x):
    """1 - tanh² x = 4q / (1 + q)², q = e^(-2|x|): the subtraction loses the digits of a saturated x."""
    q = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * q / ((1.0 + q) * (1.0 + q))


@triton.jit
def product(x, bias, scale, BIASED: tl.constexpr, SCALED: tl.constexpr):
    """y = scale (x + bias); without a bias or a scale it is x, untouched."""
    if BIASED:
        x += bias
    if SCALED:
        x *= scale
    return x


@triton.jit
def logit(y, softcap, inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """z of y = scale (x + bias): softcap tanh(y / softcap) / temperature; -inf stays -inf. It never falls with y, but
    for the last bit under a softcap.
    """
    if CAPPED:
        y = tl.where(y == float("-inf"), y, softcap * tanh(y / softcap))
    if SCALED:
        y *= inv_temperature
    return y


@triton.jit
def base_of(m):
    """What is taken from logits whose maximum is m: m, or 0 where all of them are -inf, so that e is 0 and no NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tokens(z, base, WANT: tl.constexpr):
    """Of each logit, e = exp(z - base), the same with 0 for every z that attains the maximum, and (z - base) e.

    A NaN stays one in all of them; a banned token (z = -inf) has 0 in all of them.
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
    """How many tokens attain the maximum, from Σ e without and with them: the e of each is 1."""
    return tl.floor(every - below + 0.5)


@triton.jit
def others(below, ties):
    """A sum over all tokens but the first that attains the maximum, from the sum over those that do not."""
    return tl.where(ties > 1, below + (ties - 1.0), below)


@triton.jit
def label_gradient(g, k, h, logp, entropy):
    """dL/dz of the label, -g expm1(logp) + k p - h p (logp + H): never from a rounded p, 0 for a banned label."""
    p = tl.exp(logp)
    dz = -g * expm1(logp) + k * p - tl.where(h != 0, h * p * (logp + entropy), 0.0)
    return tl.where(logp == float("-inf"), 0.0, dz)


@triton.jit
def slopes(g, k, h, shift, entropy, factor):
    """a and b of dL/dz = e (a + b log e), of any token but the label: e = exp(z - top), shift = top - lse,

    p = e exp(shift), dL/dz = p (k - g) - h p (log p + H), times factor. b is 0 where h is, so that H need be no number
    there, and both are where exp(shift) is.
    """
    f = tl.exp2(shift * LOG2E)
    b = tl.where(h != 0, -h * f, 0.0)
    a = f * (k - g) + tl.where(h != 0, b * (shift + entropy), 0.0)
    return tl.where(f == 0, 0.0, a * factor), tl.where(f == 0, 0.0, b * factor)


@triton.jit
def sloped(e, log_e, a, b, CURVED: tl.constexpr):
    """e (a + b log e); log e is no lower than LOWEST. Without CURVED b is 0, and log e is not looked at."""
    if CURVED:
        a = tl.fma(b, log_e, a)
    return e * a
