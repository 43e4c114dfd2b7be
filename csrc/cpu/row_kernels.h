// The row kernels, written once with the compiler's vectors of W floats and compiled for each instruction set: the including
// file defines FINEALIGN_W and FINEALIGN_ISA and gets its flags from setup.py.
// No inline function of the standard library may be called here: the linker might give the copy compiled for a wide
// processor to a narrow one.
#include <cmath>
#include <cstring>

#include "launch.h"

namespace finealign {
namespace FINEALIGN_ISA {
namespace {

constexpr int W = FINEALIGN_W;
constexpr int64_t kBlock = 512;  // columns after which the vector sums are added to a double
static_assert(kBlock % W == 0, "a block is whole vectors");

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

constexpr float kInf = __builtin_inff();

inline F all(float x) { return F{} + x; }
template <typename To, typename From>
inline To bits(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From), "bits");
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline F select(I mask, F a, F b) { return bits<F>((bits<I>(a) & mask) | (bits<I>(b) & ~mask)); }
inline double sum(F x) {
  double total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

// ---- loads and stores ----------------------------------------------------------------------------------------------

struct f32 {
  typedef float T;
  static constexpr bool kFloat = true;
  static F load(const T* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(T* p, F x) { std::memcpy(p, &x, sizeof x); }
};

struct bf16 {
  typedef uint16_t T;
  static constexpr bool kFloat = false;
  static F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return bits<F>(__builtin_convertvector(h, U) << 16);
  }
  static void store(T* p, F x) {  // rounds to nearest, ties to even; NaN stays NaN
    const U u = bits<U>(x);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U nan = (u >> 16) | 0x40;
    const I is_nan = x != x;
    const H h = __builtin_convertvector((rounded & ~bits<U>(is_nan)) | (nan & bits<U>(is_nan)), H);
    std::memcpy(p, &h, sizeof h);
  }
};

struct f16 {
  typedef uint16_t T;
  static constexpr bool kFloat = false;
  static F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    const U u = __builtin_convertvector(h, U);
    const U sign = (u & 0x8000) << 16, magnitude = u & 0x7fff;
    // The magnitude read as the bits of a float is too small by a factor 2^112; one product corrects it, also for subnormals.
    const F scaled = bits<F>(magnitude << 13) * 0x1p112f;
    const I special = bits<I>(magnitude) >= 0x7c00;  // inf, NaN
    const U out = (bits<U>(scaled) & ~bits<U>(special)) | (((magnitude << 13) | 0x7f800000) & bits<U>(special));
    return bits<F>(out | sign);
  }
  static void store(T* p, F x) {  // rounds to nearest, ties to even
    const U u = bits<U>(x);
    const U sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    // Normal: rebias and round. Subnormal (below 2^-14): adding 0.5 lets the float unit round at the right bit.
    const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U subnormal = bits<U>(bits<F>(magnitude) + 0.5f) - 0x3f000000;
    const I small = bits<I>(magnitude) < 0x38800000, large = bits<I>(magnitude) >= 0x47800000;
    const I is_nan = bits<I>(magnitude) > 0x7f800000;
    U out = (subnormal & bits<U>(small)) | (normal & ~bits<U>(small));
    out = ((U{} + 0x7c00) & bits<U>(large)) | (out & ~bits<U>(large));
    out = out | (bits<U>(is_nan) & 0x200) | sign;
    const H h = __builtin_convertvector(out, H);
    std::memcpy(p, &h, sizeof h);
  }
};

// The last n < W columns of a row, padded; the buffer never runs past the row.
template <typename S>
inline F load_tail(const typename S::T* p, int n, float pad) {
  typename S::T t[W] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  F x = S::load(t);
  for (int i = n; i < W; ++i) x[i] = pad;
  return x;
}
template <typename S>
inline void store_tail(typename S::T* p, int n, F x) {
  typename S::T t[W];
  S::store(t, x);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

// ---- elementary functions, about 1 ulp -----------------------------------------------------------------------------

inline F exp_(F x) {  // 0 below -87.3, NaN stays NaN; x <= 88
  const F magic = all(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const F clamped = select(x < -87.3f, all(-87.3f), x);
  const F shifted = clamped * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  const F r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F scaled = p * bits<F>((bits<I>(shifted) - bits<I>(magic) + 127) << 23);
  return select(x < -87.3f, F{}, scaled);
}

inline F log_(F x) {  // x > 0 and normal; -inf at 0
  const U u = bits<U>(x);
  // x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const U shifted = u - 0x3f3504f3;
  const F k = __builtin_convertvector(bits<I>(shifted) >> 23, F);
  const F f = bits<F>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  F p = all(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F f2 = f * f;
  const F y = p * f * f2 - k * 2.12194440e-4f - 0.5f * f2 + f + k * 0.693359375f;
  return select(x > 0.0f, y, all(-kInf));
}

inline F tanh_(F x, F* slope) {  // also 1 - tanh², precise where tanh is close to 1
  const F a = bits<F>(bits<I>(x) & 0x7fffffff);
  const F a2 = x * x;
  F p = all(-5.70498872745e-3f);
  p = p * a2 + 2.06390887954e-2f;
  p = p * a2 - 5.37397155531e-2f;
  p = p * a2 + 1.33314422036e-1f;
  p = p * a2 - 3.33332819422e-1f;
  const F near = x + x * a2 * p;
  const F e = exp_(-2.0f * select(a > 40.0f, all(40.0f), a));
  const F far = (1.0f - e) / (1.0f + e);
  *slope = select(a < 0.625f, 1.0f - near * near, 4.0f * e / ((1.0f + e) * (1.0f + e)));
  return select(a < 0.625f, near, bits<F>(bits<U>(far) | (bits<U>(x) & 0x80000000u)));
}

// ---- from a product to a logit -------------------------------------------------------------------------------------

struct Transform {
  Head head;
  bool identity;
  explicit Transform(const Head& h)
      : head(h), identity(!h.bias && h.scale == 1 && h.softcap == 0 && h.inv_temperature == 1) {}
  // y = scale * (x + bias), then z; slope = 1 - tanh²(y / softcap) with a softcap
  F logit(F x, F bias, F* slope) const {
    const F y = head.scale * (x + bias);
    if (head.softcap == 0) return y * head.inv_temperature;
    const I banned = y == -kInf;
    const F z = head.softcap * tanh_(y / head.softcap, slope) * head.inv_temperature;
    return select(banned, y, z);
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

struct Sums {
  double r = 0, t = 0, q = 0;
};

// Adds up exp(z - m) over columns [begin, end), and stores it if e is given.
template <typename E, bool kWantT, bool kWantQ>
inline void accumulate(const float* z, int64_t begin, int64_t end, float m, typename E::T* e, Sums& sums) {
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    F r = F{}, t = F{}, q = F{};
    for (int64_t j = block; j < stop; j += W) {
      const int n = stop - j < W ? static_cast<int>(stop - j) : W;
      const F d = (n == W ? f32::load(z + j) : load_tail<f32>(z + j, n, -kInf)) - m;
      const F p = exp_(d);
      r += p;
      if (kWantT) t += select(p > 0.0f, d * p, F{});
      if (kWantQ) q += p * p;
      if (e) n == W ? E::store(e + j, p) : store_tail<E>(e + j, n, p);
    }
    sums.r += sum(r);
    if (kWantT) sums.t += sum(t);
    if (kWantQ) sums.q += sum(q);
  }
}

template <typename E>
inline void accumulate_wanted(const float* z, int64_t begin, int64_t end, float m, void* e, int32_t want, Sums& sums) {
  typename E::T* out = static_cast<typename E::T*>(e);
  const bool t = want & kEntropy, q = want & kSquares;
  if (t && q) accumulate<E, true, true>(z, begin, end, m, out, sums);
  else if (t) accumulate<E, true, false>(z, begin, end, m, out, sums);
  else if (q) accumulate<E, false, true>(z, begin, end, m, out, sums);
  else accumulate<E, false, false>(z, begin, end, m, out, sums);
}

// Writes the logits of one row into z (which may be the row itself); returns the maximum and the first block that has it.
template <typename S>
inline float logits_and_max(const typename S::T* x, int64_t columns, const Transform& transform, float* z,
                            int64_t* max_block) {
  const float* bias = transform.head.bias;
  float m = -kInf;
  *max_block = 0;
  for (int64_t block = 0; block < columns; block += kBlock) {
    const int64_t stop = block + kBlock < columns ? block + kBlock : columns;
    F best = all(-kInf);
    for (int64_t j = block; j < stop; j += W) {
      const int n = stop - j < W ? static_cast<int>(stop - j) : W;
      F v = n == W ? S::load(x + j) : load_tail<S>(x + j, n, -kInf), slope;
      if (!transform.identity) {
        const F b = !bias ? F{} : n == W ? f32::load(bias + j) : load_tail<f32>(bias + j, n, 0.0f);
        v = transform.logit(v, b, &slope);
      }
      if (static_cast<const void*>(z) != static_cast<const void*>(x) || !transform.identity)
        n == W ? f32::store(z + j, v) : store_tail<f32>(z + j, n, v);
      if (n < W)
        for (int i = n; i < W; ++i) v[i] = -kInf;
      best = select(v > best, v, best);
    }
    float block_best = best[0];
    for (int i = 1; i < W; ++i) block_best = best[i] > block_best ? best[i] : block_best;
    if (block_best > m) m = block_best, *max_block = block;
  }
  return m;
}

inline void fill(void* e, DType dtype, int64_t columns, float value) {
  const F v = all(value);
  for (int64_t j = 0; j < columns; ++j) {
    if (dtype == DType::f32) store_tail<f32>(static_cast<float*>(e) + j, 1, v);
    else if (dtype == DType::bf16) store_tail<bf16>(static_cast<uint16_t*>(e) + j, 1, v);
    else store_tail<f16>(static_cast<uint16_t*>(e) + j, 1, v);
  }
}

template <typename S>
inline void forward_rows(const RowForward& op, int64_t begin, int64_t end) {
  const Transform transform(op.head);
  const bool in_place = S::kFloat && (op.e == op.x || transform.identity);
  float* scratch = in_place ? nullptr : static_cast<float*>(__builtin_malloc(sizeof(float) * (op.columns + W)));
  for (int64_t row = begin; row < end; ++row) {
    float* part = op.part + row * op.part_stride;
    for (int i = 0; i < kParts; ++i) part[i] = 0;
    op.first[row * op.first_stride] = op.col0;
    const int64_t target = op.target[row];
    if (target == kSkip) continue;
    typename S::T* x = static_cast<typename S::T*>(op.x) + row * op.row_stride;
    void* e = op.e ? static_cast<char*>(op.e) + row * op.e_stride * size_of(op.e_dtype) : nullptr;
    float* z = in_place ? reinterpret_cast<float*>(x) : scratch;
    const int64_t local = target - op.col0;
    float* label = target >= 0 && local >= 0 && local < op.columns ? op.label + row * op.label_stride : nullptr;
    if (label) {  // its slope comes from x, which z may overwrite
      F slope = all(1.0f);
      if (op.head.softcap != 0)
        transform.logit(load_tail<S>(x + local, 1, 0.0f), all(op.head.bias ? op.head.bias[local] : 0.0f), &slope);
      label[1] = slope[0];
    }
    int64_t first = 0;
    const float m = logits_and_max<S>(x, op.columns, transform, z, &first);
    if (label) label[0] = z[local];
    if (op.want & kMean) {
      double total = 0, count = 0;
      for (int64_t j = 0; j < op.columns; ++j)
        if (z[j] != -kInf) total += z[j], count += 1;
      part[4] = static_cast<float>(total / 0x1p24);  // UNIT of formulas/logprobs.py
      part[5] = static_cast<float>(count);
    }
    part[0] = m;
    if (m == -kInf) {  // all banned, or all NaN
      bool nan = false;
      for (int64_t j = 0; j < op.columns; ++j) nan |= z[j] != z[j];
      if (nan) part[1] = __builtin_nanf("");
      if (e) fill(e, op.e_dtype, op.columns, nan ? __builtin_nanf("") : 0.0f);
      continue;
    }
    while (z[first] != m) ++first;
    op.first[row * op.first_stride] = op.col0 + first;
    Sums sums;
    for (int side = 0; side < 2; ++side) {  // before and after the maximum
      const int64_t from = side ? first + 1 : 0, to = side ? op.columns : first;
      if (op.e_dtype == DType::f32) accumulate_wanted<f32>(z, from, to, m, e, op.want, sums);
      else if (op.e_dtype == DType::bf16) accumulate_wanted<bf16>(z, from, to, m, e, op.want, sums);
      else accumulate_wanted<f16>(z, from, to, m, e, op.want, sums);
    }
    if (e) fill(static_cast<char*>(e) + first * size_of(op.e_dtype), op.e_dtype, 1, 1.0f);
    part[1] = m == kInf ? __builtin_nanf("") : static_cast<float>(sums.r);
    part[2] = static_cast<float>(sums.t);
    part[3] = static_cast<float>(sums.q);
  }
  __builtin_free(scratch);
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct Coef {
  float g, k, h, m, l, entropy, logp, label_slope, spread;
};

// One row, from products x, or from e = exp(z - e_max) of its tile. With a spread it must be x, because e cannot tell which
// tokens are banned.
template <typename S, typename O, bool kFromE, bool kEntropyGrad, bool kSoftcap, bool kSpread = false>
inline void backward_row(const typename S::T* src, typename O::T* out, int64_t columns, const Transform& transform,
                         float e_max, const Coef& c) {
  const Head& head = transform.head;
  const float slope = head.scale * head.inv_temperature;
  const float shift = kFromE ? (e_max == -kInf ? -kInf : e_max - c.m - c.l) : 0.0f;
  const F scale_e = exp_(all(shift));
  const float keep = c.k - c.g;
  for (int64_t j = 0; j < columns; j += W) {
    const int n = columns - j < W ? static_cast<int>(columns - j) : W;
    const F v = n == W ? S::load(src + j) : load_tail<S>(src + j, n, 0.0f);
    F p, d = F{}, curve = all(1.0f), spread = F{};
    if (kFromE) {
      p = v * scale_e;
      if (kEntropyGrad || kSoftcap) {
        const F log_e = log_(v);
        d = log_e + shift;
        const F t = (log_e + e_max) / (head.inv_temperature * head.softcap);
        if (kSoftcap) curve = 1.0f - t * t;
      }
    } else {
      F z = v;
      if (!transform.identity) {
        const F b = !head.bias ? F{} : n == W ? f32::load(head.bias + j) : load_tail<f32>(head.bias + j, n, 0.0f);
        z = transform.logit(v, b, &curve);
      }
      if (kSpread) spread = select(z == -kInf, F{}, all(c.spread));
      d = (z - c.m) - c.l;
      p = exp_(d);
    }
    F dz = p * keep;
    if (kEntropyGrad) dz -= c.h * p * (d + c.entropy);
    if (kSpread) dz = select(p == 0.0f, F{}, dz) + spread;
    if (kSoftcap) dz *= curve;
    dz *= slope;
    if ((kEntropyGrad || kSoftcap) && !kSpread) dz = select(p == 0.0f, F{}, dz);
    n == W ? O::store(out + j, dz) : store_tail<O>(out + j, n, dz);
  }
}

template <typename S, typename O>
inline void backward_spread(const typename S::T* src, typename O::T* out, int64_t columns, const Transform& transform,
                            const Coef& c) {
  if (transform.head.softcap != 0) backward_row<S, O, false, true, true, true>(src, out, columns, transform, 0.0f, c);
  else backward_row<S, O, false, true, false, true>(src, out, columns, transform, 0.0f, c);
}

inline float label_slope(const RowBackward& op, const Coef& c) {
  if (c.logp == -kInf) return 0.0f;  // a banned label: no gradient through its own column
  const float p = ::expf(c.logp);
  float dz = -c.g * ::expm1f(c.logp) + c.k * p;
  if (c.h != 0) dz -= c.h * p * (c.logp + c.entropy);
  dz += c.spread;
  return dz * c.label_slope * op.head.scale * op.head.inv_temperature;
}

template <typename S, typename O, bool kFromE>
inline void backward_rows(const RowBackward& op, int64_t begin, int64_t end) {
  const Transform transform(op.head);
  for (int64_t row = begin; row < end; ++row) {
    typename O::T* out = static_cast<typename O::T*>(op.out) + row * op.out_stride;
    const float* at = op.coef + row;
    const Coef c{at[0],           at[op.rows],     at[2 * op.rows], at[3 * op.rows],
                 at[4 * op.rows], at[5 * op.rows], at[6 * op.rows], at[7 * op.rows],
                 op.spread ? at[8 * op.rows] : 0.0f};
    if (op.target[row] == kSkip || (c.g == 0 && c.k == 0 && c.h == 0 && c.spread == 0)) {
      __builtin_memset(out, 0, sizeof(typename O::T) * op.columns);
      continue;
    }
    const int64_t from = op.index ? op.index[row] : row;
    const typename S::T* src = static_cast<const typename S::T*>(op.src) + from * op.row_stride;
    const float e_max = kFromE ? op.e_max[row] : 0.0f;
    const bool softcap = op.head.softcap != 0;
    if (!kFromE && c.spread != 0) backward_spread<S, O>(src, out, op.columns, transform, c);
    else if (c.h != 0 && softcap) backward_row<S, O, kFromE, true, true>(src, out, op.columns, transform, e_max, c);
    else if (c.h != 0) backward_row<S, O, kFromE, true, false>(src, out, op.columns, transform, e_max, c);
    else if (softcap) backward_row<S, O, kFromE, false, true>(src, out, op.columns, transform, e_max, c);
    else backward_row<S, O, kFromE, false, false>(src, out, op.columns, transform, e_max, c);
    const int64_t local = op.target[row] - op.col0;
    if (op.target[row] >= 0 && local >= 0 && local < op.columns) store_tail<O>(out + local, 1, all(label_slope(op, c)));
  }
}

template <typename S>
inline void backward_from(const RowBackward& op, int64_t begin, int64_t end) {
  switch (op.out_dtype) {
    case DType::bf16: op.e_max ? backward_rows<S, bf16, true>(op, begin, end) : backward_rows<S, bf16, false>(op, begin, end); break;
    case DType::f16: op.e_max ? backward_rows<S, f16, true>(op, begin, end) : backward_rows<S, f16, false>(op, begin, end); break;
    default: op.e_max ? backward_rows<S, f32, true>(op, begin, end) : backward_rows<S, f32, false>(op, begin, end);
  }
}

}  // namespace

void row_forward(const RowForward& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::bf16: return forward_rows<bf16>(op, begin, end);
    case DType::f16: return forward_rows<f16>(op, begin, end);
    default: return forward_rows<f32>(op, begin, end);
  }
}

void row_backward(const RowBackward& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::bf16: return backward_from<bf16>(op, begin, end);
    case DType::f16: return backward_from<f16>(op, begin, end);
    default: return backward_from<f32>(op, begin, end);
  }
}

}  // namespace FINEALIGN_ISA
}  // namespace finealign
