// y_t = x_t + a_t y_(t+1) over the sequences of a flat batch on a CPU, and its transpose.

#include "scan.h"

namespace finealign {
namespace {

// Computes tokens [first, stop), starting with y from the right, or from the left with op.forward. If out is null, nothing is
// stored. Returns the map of the piece: its result at y = 0 and, if asked for, the product of its decays.
template <typename T>
FINEALIGN_INLINE Affine scan_tokens(const Scan& op, Piece piece, double y, T* __restrict out, bool wants_product) {
  const T *x = static_cast<const T*>(op.x), *decay = static_cast<const T*>(op.decay);
  const uint8_t* mask = op.segments.mask;
  const int64_t start = op.segments.start(piece.s), end = op.segments.start(piece.s + 1);
  const double rate = op.rates ? op.rates[piece.s * op.rate_stride] : 0;  // without tokens, decay is null too
  const int back = op.forward ? 1 : 0;  // index offset of the decay that multiplies y
  double d[kTile], a[kTile], all = 1;
  const int64_t tiles = (piece.stop - piece.first + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = piece.first + (op.forward ? tile : tiles - 1 - tile) * kTile;
    const int n = static_cast<int>(std::min<int64_t>(kTile, piece.stop - first)), whole = whole_fours(n);
    for (int i = 0; i < n; ++i) d[i] = x[first + i];
    if (mask != nullptr)
      for (int i = 0; i < n; ++i) d[i] = mask[first + i] ? d[i] : 0;
    if (back && first == start) a[0] = 0;
    for (int i = back && first == start ? 1 : 0; i < n; ++i) {
      const int64_t at = first + i - back;
      const double each = decay ? static_cast<double>(decay[at]) : rate;
      a[i] = mask == nullptr || mask[at] ? each : 1;
    }
    if (!back && first + n == end) a[n - 1] = 1;  // no token comes after it
    for (int i = n; i < whole; ++i) d[i] = 0, a[i] = 1;
    if (wants_product) all *= product(a, whole);
    y = (op.forward ? recurrences().ahead : recurrences().back)(d, a, whole, y);
    if (out == nullptr) continue;
    if (mask != nullptr)
      for (int i = 0; i < n; ++i) d[i] = mask[first + i] ? d[i] : 0;
    for (int i = 0; i < n; ++i) out[first + i] = static_cast<T>(d[i]);
  }
  return {all, y};
}

// target_clones cannot be used with templates, so there is one wide function for each type.
FINEALIGN_WIDE_UNFUSED Affine tokens(const Scan& op, Piece piece, double y, float* out, bool wants_product) {
  return scan_tokens(op, piece, y, out, wants_product);
}
FINEALIGN_WIDE_UNFUSED Affine tokens(const Scan& op, Piece piece, double y, double* out, bool wants_product) {
  return scan_tokens(op, piece, y, out, wants_product);
}

template <typename T>
void scan(const Scan& op, Parallel parallel) {
  T *out = static_cast<T*>(op.out), *nowhere = nullptr;
  for_short(op.segments, parallel, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) tokens(op, {s, op.segments.start(s), op.segments.start(s + 1)}, 0, out, false);
  });
  const std::vector<Piece> pieces = cut(op.segments, op.longest);
  const int64_t many = static_cast<int64_t>(pieces.size());
  std::vector<Affine> maps(many);
  for_pieces(pieces, parallel, [&](int64_t i, Piece piece) { maps[i] = tokens(op, piece, 0, nowhere, true); });
  std::vector<double> enters(many);  // the y with which each piece starts
  const auto join = [&](int64_t from, int64_t to) {
    enters[to] = pieces[from].s == pieces[to].s ? maps[from](enters[from]) : 0;
  };
  if (op.forward)
    for (int64_t i = 1; i < many; ++i) join(i - 1, i);
  else
    for (int64_t i = many - 1; i > 0; --i) join(i, i - 1);
  for_pieces(pieces, parallel, [&](int64_t i, Piece piece) { tokens(op, piece, enters[i], out, false); });
}

}  // namespace

void scan_cpu(const Scan& op, Parallel parallel) {
  if (op.dtype == DType::f64) scan<double>(op, parallel);
  else scan<float>(op, parallel);
}

}  // namespace finealign
