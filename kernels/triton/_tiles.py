"""Pure pieces of the kernels over logits: no loads, no stores, float32 throughout.

The elementary functions are written out, because those of a vendor's device library run neither in Triton's interpreter
nor alike on every GPU.
"""

import triton
import triton.language as tl


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
def logit(y, softcap, inv_temperature, CAPPED: tl.constexpr):
    """z of y = scale (x + bias): softcap tanh(y / softcap) / temperature; -inf stays -inf."""
    if CAPPED:
        y = tl.where(y == float("-inf"), y, softcap * tanh(y / softcap))
    return y * inv_temperature


@triton.jit
def shifted_exp(z, m):
    """exp(z - m), 0 where z = -inf, also under a maximum m of -inf. A NaN stays one."""
    return tl.where(z == float("-inf"), 0.0, tl.exp(z - m))


@triton.jit
def block_state(z, WANT_T: tl.constexpr, WANT_Q: tl.constexpr):
    """State (m, R, T, Q) of a block of logits z (BLOCK,), and the index of the first maximum.

    R = Σ e, T = Σ (z-m) e, Q = Σ e², e = exp(z-m), over all but that one element; R = NaN where a NaN or +inf is.
    """
    m, index = tl.max(tl.where(z == z, z, float("-inf")), axis=0, return_indices=True)
    lane = tl.arange(0, z.shape[0])
    # z == m: where there is no number, index may point at a NaN, which has to stay in
    e = tl.where((lane == index) & (z == m), 0.0, shifted_exp(z, m))
    r = tl.where(m == float("inf"), float("nan"), tl.sum(e, axis=0))
    t, q = 0.0, 0.0
    if WANT_T:
        t = tl.sum(tl.where(e == 0, 0.0, (z - m) * e), axis=0)
    if WANT_Q:
        q = tl.sum(e * e, axis=0)
    return m, r, t, q, index


@triton.jit
def label_gradient(g, k, h, logp, entropy):
    """dL/dz of the label, -g expm1(logp) + k p - h p (logp + H): never from a rounded p, 0 for a banned label."""
    p = tl.exp(logp)
    dz = -g * expm1(logp) + k * p - tl.where(h != 0, h * p * (logp + entropy), 0.0)
    return tl.where(logp == float("-inf"), 0.0, dz)


@triton.jit
def token_gradient(p, log_p, g, k, h, entropy):
    """dL/dz of any other token, p (k - g) - h p (log p + H), 0 where p = 0."""
    return tl.where(p == 0, 0.0, p * ((k - g) - tl.where(h != 0, h * (log_p + entropy), 0.0)))


@triton.jit
def combine_states(m1, r1, t1, q1, m2, r2, t2, q2):
    """Two states to one. With m1 >= m2, d = m2 - m1, w = e^d:

    R = R1 + (1 + R2) w,   T = T1 + (T2 + d (1 + R2)) w,   Q = Q1 + (1 + Q2) w²;   m2 = -inf: w = 0.
    """
    swap = m2 > m1
    m, lower = tl.where(swap, m2, m1), tl.where(swap, m1, m2)
    r, r_lower = tl.where(swap, r2, r1), tl.where(swap, r1, r2)
    t, t_lower = tl.where(swap, t2, t1), tl.where(swap, t1, t2)
    q, q_lower = tl.where(swap, q2, q1), tl.where(swap, q1, q2)
    d = tl.where(lower == float("-inf"), 0.0, lower - m)
    w = shifted_exp(lower, m)
    return m, r + (1.0 + r_lower) * w, t + (t_lower + d * (1.0 + r_lower)) * w, q + (1.0 + q_lower) * w * w
