// The interface between bindings.cpp and the kernels: it declares the CPU function and the CUDA launch of every op.
// It includes no header of torch or CUDA, so a .cu file compiles in seconds, and a host compiler can compile device code.
#pragma once
#include <cstdint>
#include <functional>

#ifdef __CUDACC__
#define FINEALIGN_BOTH __host__ __device__
#else
#define FINEALIGN_BOTH
#endif

namespace finealign {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Bytes of one element.
inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Splits [0, size) among torch's threads, at least grain each.
using Range = std::function<void(int64_t begin, int64_t end)>;
using Parallel = void (*)(int64_t size, int64_t grain, const Range& range);

// ---- row statistics over a tile of logits (csrc/cpu/row_logprobs.cpp) ---------------------------------------------

// z = softcap(scale * (x + bias)) / temperature
struct Head {
  const float* bias;  // (columns,) or null
  float scale;
  float softcap;  // 0: none
  float inv_temperature;
};

constexpr int64_t kSkip = -2;  // target of a row that is left out
constexpr int64_t kBad = -1;   // target of a row whose label is out of range

enum Want : int32_t { kEntropy = 1, kSquares = 2, kMean = 4 };
constexpr int kParts = 6;  // numbers of a row in one tile: m, R, T, Q, sum of z, count

struct RowForward {
  void* x;  // (rows, columns), row stride in elements; written only where e == x
  DType dtype;
  int64_t row_stride, columns, col0;
  Head head;
  int32_t want;
  const int64_t* target;  // (rows,)
  float* part;            // (rows, kParts), row stride in elements
  int64_t part_stride;
  int64_t* first;  // (rows,) column of the first maximum
  int64_t first_stride;
  float* label;  // (rows, 2) z and 1 - tanh²(y / softcap) at the label, written if the label is in this tile
  int64_t label_stride;
  void* e;        // (rows, columns) exp(z - m), or null; may be x where both are float32
  DType e_dtype;
  int64_t e_stride;
};

struct RowBackward {
  void* out;  // (rows, columns)
  DType out_dtype;
  int64_t out_stride;
  const void* src;  // x of RowForward, or its e where e_max is given; may be out
  DType dtype;
  int64_t row_stride, columns, col0;
  const int64_t* index;  // (rows,) row of src, or null
  const float* e_max;    // (rows,) m of this tile
  Head head;
  const int64_t* target;  // (rows,)
  const float* coef;      // (8, rows): dlogp, dlse, dentropy, m, log1p(R), entropy, logp, label's 1 - tanh²;
  bool spread;            // true: (9, rows), the last being a gradient for every z that is not banned
  int64_t rows;
};

void row_forward(const RowForward& op, int64_t begin, int64_t end);
void row_backward(const RowBackward& op, int64_t begin, int64_t end);
const char* row_instructions();  // "avx512", "avx2" or "baseline": what run-time dispatch chose

// ---- segments (csrc/cpu/segments.cpp, csrc/cuda/segments.cu) -------------------------------------------------------

// Segment s holds the tokens [start(s), start(s + 1)) of a flat batch.
struct Segments {
  const void* cu_seqlens;  // (count + 1,) int32, or int64 where wide; or null: the rows of a padded batch
  bool wide;
  int64_t count, total;  // S, N
  const uint8_t* mask;   // (total,), 0: the token is left out; or null
  int64_t width = 0;     // tokens of each row, where cu_seqlens is null

  FINEALIGN_BOTH int64_t start(int64_t s) const {
    if (cu_seqlens == nullptr) return s * width;
    return wide ? static_cast<const int64_t*>(cu_seqlens)[s] : static_cast<const int32_t*>(cu_seqlens)[s];
  }
  FINEALIGN_BOTH bool keeps(int64_t token) const { return mask == nullptr || mask[token] != 0; }
};

// If there are only a few segments of many tokens, most of a GPU is idle when a block takes a whole segment. Each segment is
// then cut into pieces of `size` tokens, counted from its start. A block or warp takes the piece of its slot: the first piece
// of segment s has slot start(s) / size + s, and the others follow. No two pieces share a slot. There are
// slots(segments, size) slots, or 0 if segments are not cut. The result has the same bits in both cases.
constexpr int64_t kFew = 256;  // so many segments do not fill a GPU
FINEALIGN_BOTH inline int64_t slots(const Segments& segments, int64_t size) {
  if (segments.count == 0 || segments.count > kFew) return 0;
  const bool some_are_long = segments.cu_seqlens != nullptr && segments.total > 64 * size;  // bounds are not known here
  if (segments.total / segments.count <= size && !some_are_long) return 0;
  return segments.total / size + segments.count;
}

// How a segment and its tokens are related; `last` is the last token that the mask keeps. For each of the three, reduce
// (tokens to segments) and spread (segments to tokens) are transposes of each other.
enum class Over : int32_t { sum = 0, mean = 1, last = 2 };

// The sum of a segment depends only on its own tokens and their order: not on the rest of the batch, threads, launch shapes,
// the device, or masked tokens after its end. All additions are float64, and the result is rounded once. The order is: in a
// chunk of kChunk tokens, counted from the segment's start, lane j adds tokens j, j + kLanes, ...; then the lanes are added
// pairwise, half by half; then the chunks in order.
constexpr int kChunk = 1024;
constexpr int kLanes = 32;

// Sum, count and last index of a range of tokens.
struct Tally {
  double sum;
  int64_t kept;  // tokens that the mask keeps
  int64_t last;  // index of the last of them, -1 if none
};

struct SegmentReduce {
  Segments segments;
  Over over;
  const void* x;  // (total,)
  DType dtype;
  void* out;     // (count,) float32; float64 for float64
  Tally* parts;  // workspace on a GPU: (slots(segments, kChunk),) if tallies(), for the chunks of a few long segments

  FINEALIGN_BOTH bool tallies() const { return over != Over::last || segments.mask != nullptr; }
};

struct SegmentSpread {
  Segments segments;
  Over over;
  const void* v;  // (count,) float32; float64 for float64
  void* out;      // (total,)
  DType dtype;
  Tally* parts;  // as above

  FINEALIGN_BOTH bool tallies() const { return over != Over::sum && segments.mask != nullptr; }
};

// cu_seqlens must be valid: starts at 0, does not decrease, ends at total.
void segment_reduce_cpu(const SegmentReduce& op, Parallel parallel);
void segment_spread_cpu(const SegmentSpread& op, Parallel parallel);

// Launches on the stream. Returns null, or the reason of a failure. A segment with invalid bounds is not read and gives NaN.
const char* segment_reduce_cuda(const SegmentReduce& op, void* stream);
const char* segment_spread_cuda(const SegmentSpread& op, void* stream);

// ---- sequence losses (csrc/cpu/sequence_loss*, csrc/cuda/sequence_loss.cu) ------------------------------------------

// The divisor of a sequence's weighted sum: 1, the sum of kept token weights, or the number of tokens with mask.
enum class Average : int32_t { none = 0, kept = 1, all = 2 };

// Which sequences make an item: each one, or chosen s and rejected s + S/2, or chosen 2s and rejected 2s + 1.
enum class Pairs : int32_t { none = 0, halves = 1, interleaved = 2 };

FINEALIGN_BOTH inline int64_t chosen_of(Pairs pairs, int64_t item) {
  return pairs == Pairs::interleaved ? 2 * item : item;
}
FINEALIGN_BOTH inline int64_t rejected_of(Pairs pairs, int64_t item, int64_t items) {
  return pairs == Pairs::interleaved ? 2 * item + 1 : item + items;
}
FINEALIGN_BOTH inline int64_t item_of(Pairs pairs, int64_t s, int64_t items) {
  return pairs == Pairs::interleaved ? s / 2 : s < items ? s : s - items;
}

// The function of the margin (kernels/cuda/formulas.cuh). The comments name its constant.
enum class Phi : int32_t {
  logistic = 0,
  squared = 1,  // the center
  hinge = 2,
  smoothed = 3,  // ε
  robust = 4,    // ε
  bounded = 5,
  linear = 6,
  exo = 7,         // log((1-ε)/ε)
  discovered = 8,  // τ
  rising = 9,
  anchored = 10,
};

// The form of an item's loss, with u = beta score - shift:
//   margin  phi(beta (score_chosen - score_rejected) - shift) of a pair, phi(sign u) of a sequence
//   beside  of a pair: that + first(u_chosen)
//   sides   of a pair: (first(u_chosen) + phi(-u_rejected)) / 2; of a sequence: sign > 0 ? first(u) : phi(-u)
enum class Form : int32_t { margin = 0, beside = 1, sides = 2 };

struct TokenWeights {
  Segments segments;
  const void* weight;  // (total,) float32, float64 for float64; null: 1
  Average average;

  FINEALIGN_BOTH bool counts() const { return average == Average::all || (average == Average::kept && !weight); }
};

// Sums over a range of tokens: Σ w (logp - ref), and the divisor of an average.
struct Stretch {
  double score, weight;
};

// score = (Σ_t w_t (logp_t - ref_logp_t) - ref_sum) / denominator over the tokens with mask and w_t != 0
// loss = scale · (the form's loss)
// Sums have the order described above; each product and sum of w_t x_t is one fma. The rest is float64, and each result is
// rounded once.
struct SequenceLossForward {
  TokenWeights tokens;
  const void* logp;      // (total,)
  const void* ref_logp;  // (total,), or null
  const void* ref_sum;   // (count,) of the results' type, or null
  DType dtype;           // of logp and ref_logp; the results are float32, float64 for float64
  Pairs pairs;
  Form form;
  Phi phi, first;
  double beta, scale;
  double shift, hyper;
  const double *shifts, *hypers;  // (items,) instead of one number, or null
  const double* sign;             // (items,), or null: 1; without pairs only
  void* losses;       // (items,)
  void* score;        // (count,)
  void* slope;        // (count,) d loss / d score
  void* denominator;  // (count,), never 0; null without an average, where it is 1
  Stretch* parts;     // workspace on a GPU: (slots(segments, kChunk),), for the chunks of a few long sequences

  FINEALIGN_BOTH int64_t items() const {
    return pairs == Pairs::none ? tokens.segments.count : tokens.segments.count / 2;
  }
};

// dlogp_t = upstream · slope · w_t / denominator; exactly 0 at masked tokens and where the upstream is 0.
struct SequenceLossBackward {
  TokenWeights tokens;
  Pairs pairs;
  const void* upstream;  // (items,) of the type of slope
  int64_t upstream_stride;
  const void* slope;        // (count,) float32; float64 for float64
  const void* denominator;  // (count,), or null: 1
  void* dlogp;              // (total,)
  DType dtype;
};

void sequence_loss_forward_cpu(const SequenceLossForward& op, Parallel parallel);
void sequence_loss_backward_cpu(const SequenceLossBackward& op, Parallel parallel);

// Launches on the stream. Returns null, or the reason of a failure. A sequence with invalid bounds is not read and gives NaN.
const char* sequence_loss_forward_cuda(const SequenceLossForward& op, void* stream);
const char* sequence_loss_backward_cuda(const SequenceLossBackward& op, void* stream);

// ---- policy losses (csrc/cpu/policy_loss.cpp, csrc/cuda/policy_loss.cu) ---------------------------------------------

// The function of log-ratio and advantage (kernels/cuda/formulas.cuh). The comments name its two numbers.
enum class Psi : int32_t {
  clipped = 0,  // lowest and highest ratio
  capped = 1,   // the same
  score_function = 2,
  soft_gate = 3,  // τ where A > 0, and elsewhere
};

// The log-ratio that psi takes: the token's own, or the mean or the sum over its row.
enum class RatioOf : int32_t { token = 0, row_mean = 1, row_sum = 2 };

// A token's share is one over: the tokens of the batch; the rows times the tokens of its row; or the rows.
enum class ShareOf : int32_t { batch = 0, row = 1, rows = 2 };

// Estimators of KL(π‖ref), see formulas/divergence.py.
enum class Estimator : int32_t { k1 = 0, k2 = 1, k3 = 2, k3_k2grad = 3, k3_is = 4 };

// A number on the host or on the device; neither if it is not given.
struct Number {
  double value;
  const double* at;

  FINEALIGN_BOTH bool given() const { return at != nullptr || value != 0; }
  FINEALIGN_BOTH double operator()() const { return at != nullptr ? *at : value; }
};

// Sums over a row's tokens with mask.
struct Row {
  double weight, length, log_ratio;  // count for shares (Σ w if `kept`, else tokens); number of tokens; Σ log-ratios
};

// The same over the batch; the rows with a token; and, on a GPU, the rows with invalid bounds.
struct Totals {
  double weight, length, rows, bad;
};

// The sums over tokens with mask. The first three are results. The others become means over tokens by a division.
enum Term : int { kPolicyTerm, kKlTerm, kEntropyTerm, kRatio, kOldKl, kLow, kHigh, kDual, kTokens, kTerms };
struct Terms {
  double of[kTerms];
};

// r_t = logp_t - old_logp_t, ℓ_t = psi(log-ratio, A_t), a share c_t of each token:
// loss = Σ c w ω ℓ + kl_coef Σ c' κ - entropy_coef Σ c'' h, over the tokens with mask. The first sum leaves out tokens whose
// c w ω is 0. c counts Σ w if `kept`, c' counts tokens.
// Everything is float64, and each result is rounded once. Sums over a row have the order described above. Sums over the batch
// are made in chunks of kChunk tokens of the flat batch, independent of rows: lane j of a chunk adds tokens j, j + kLanes, ...,
// then the lanes are added pairwise, half by half; then the same is done with the sums of all chunks.
struct PolicyLossForward {
  Segments segments;
  const void *logp, *old_logp, *ref_logp, *entropy;  // (total,); old_logp null: ρ = 1; ref_logp, entropy may be null
  DType dtype;  // of those. All others, and the results, are float32, or float64 for float64
  const void* advantage;  // (total,), or (count,) by row
  const void* weight;     // (total,) w, or null
  const void* sampler;    // (total,) ω, or (count,) by row, or null
  bool advantage_by_row, sampler_by_row;

  Psi psi;
  RatioOf ratio;
  double first, second, dual;  // the numbers of psi; where A < 0 the ratio is at most dual
  double below, above;         // ratios below and above these bounds are counted
  Estimator estimator;
  double kl_coef, entropy_coef;

  ShareOf share;
  bool kept, count_empty;          // true: shares count w; true: a row without a token counts as a row
  Number denominator, max_length;  // instead of the batch's count; instead of a row's length
  bool entropy_by_token;           // true: c'' is one over the tokens of the batch; false: c'
  Number entropy_denominator;

  void* loss;               // (1,)
  void* numbers;            // (kTokens,) the terms before it
  void *losses, *dlogp;     // (total,) ℓ; d loss / d logp
  void* dentropy;           // (total,) d loss / d entropy, or null

  // Workspace on a GPU: (count,) if rows are summed, (chunks(),), (1,).
  Row* rows;
  Row* row_parts;  // (slots(segments, kChunk),) if rows are summed: the chunks of a few long rows
  Terms* parts;
  Totals* totals;

  FINEALIGN_BOTH int64_t chunks() const { return (segments.total + kChunk - 1) / kChunk; }
  // Whether numbers of rows must be summed first; whether there are totals that do not follow from the shape.
  FINEALIGN_BOTH bool sums_rows() const { return share == ShareOf::row || ratio != RatioOf::token || counts_rows(); }
  FINEALIGN_BOTH bool counts_rows() const { return share != ShareOf::batch && !count_empty && !denominator.given(); }
  FINEALIGN_BOTH bool sums_tokens() const {
    const bool divides = share == ShareOf::batch && !denominator.given();
    const bool divides_entropy = entropy != nullptr && entropy_by_token && !entropy_denominator.given();
    return (divides && kept) || ((divides || divides_entropy) && segments.mask != nullptr);
  }
};

// out = upstream · d, exactly 0 where d is 0.
struct PolicyLossBackward {
  const void* upstream;  // (1,) of the type of d
  const void* d;         // (total,) float32; float64 for float64
  void* out;             // (total,)
  DType dtype;
  int64_t total;
};

void policy_loss_forward_cpu(const PolicyLossForward& op, Parallel parallel);
void policy_loss_backward_cpu(const PolicyLossBackward& op, Parallel parallel);

// Launches on the stream. Returns null, or the reason of a failure. If the bounds of a row are invalid, the loss and all
// gradients are NaN.
const char* policy_loss_forward_cuda(const PolicyLossForward& op, void* stream);
const char* policy_loss_backward_cuda(const PolicyLossBackward& op, void* stream);

// ---- scans (csrc/cpu/scan.cpp) -------------------------------------------------------------------------------------

// The results of a sequence depend only on its own tokens and their places in it: not on the rest of the batch, threads, or
// masked tokens after its end. Arithmetic is float64, and each result is rounded once. Tiles of kTile tokens are counted
// from the sequence's start. So are the cuts at every kCut tokens, at which two pieces are composed.
constexpr int kTile = 512;
constexpr int64_t kCut = 64 * kTile;

// y_t = x_t + a_t y_(t+1). At a masked token y_t = y_(t+1) in the recurrence, and 0 is stored. `forward` is the transpose,
// y_t = x_t + a_(t-1) y_(t-1).
struct Scan {
  Segments segments;
  int64_t longest;  // sequence, in tokens
  bool forward;
  DType dtype;          // float32 or float64
  const void* x;        // (total,)
  const void* decay;    // (total,) of x's dtype, or null
  const double* rates;  // if decay is null: (count,), or (1,) with stride 0
  int64_t rate_stride;
  void* out;  // (total,)
};

void scan_cpu(const Scan& op, Parallel parallel);

// y -> b + a y.
struct Map {
  double a, b;
};

// What the blocks that compute the pieces of one sequence pass to each other, by slot.
constexpr int64_t kPiece = 4096;  // tokens
struct Link {
  Map whole;     // of the piece
  double enter;  // y before it
  double value;  // GAE: the next value for the piece, as Ahead in kernels/cuda/scan.cuh
  int64_t state;
};

// Launches on the stream. Returns null, or the reason of a failure. links: workspace for slots(segments, kPiece) of them.
// A sequence with invalid bounds is not read and gives NaN. On a GPU, lanes compose spans of tokens in a tree
// (kernels/cuda/scan.cuh): the result is as accurate as the CPU's, but its bits may differ.
const char* scan_cuda(const Scan& op, Link* links, void* stream);

// ---- advantages (csrc/cpu/advantages.cpp) --------------------------------------------------------------------------

enum class Scale : int32_t { std = 0, clamp = 1, compat = 2 };

// x -> (x - μ) scale, plus μ unless `shift`; formulas.cuh computes μ and the scale.
struct Whitening {
  const double* moments;  // (5,) n, Σx, Σx², μ, Σ(x - μ)²; null: x stays as it is
  Scale scale;
  bool unbiased, shift;
};

// Rewards of segments from K models. A reward is for the last token of its segment that the mask keeps. Model k has the
// segments bounds[k (S + 1) + s] to bounds[k (S + 1) + s + 1] - 1 in sequence s.
struct SegmentRewards {
  int64_t models;         // K
  const double* reward;   // (M,), those of all models, times their weights
  const int64_t* end;     // (M,)
  const int64_t* start;   // (M,), or null
  const int64_t* bounds;  // (K, S + 1)
  bool overwrite, drop;   // of two rewards of a model at one token the later counts; segments without tokens give none
};

// The steps, each done only if its output is given: place rewards and subtract the KL penalty (shaped); moments of that;
// whiten them and compute advantages and returns; pivots by the sign of the advantages; moments of the advantages; whiten
// the advantages in place; pivots by their sign.
struct Advantages {
  Segments segments;
  int64_t longest;
  DType dtype;  // of all vectors of tokens: float32 or float64

  const void* rewards;  // (total,), or null: rewards of segments are given
  SegmentRewards segment_rewards;
  const void *old_logp, *ref_logp;  // (total,), or null
  Estimator estimator;
  double kl_coef;
  void *shaped, *kl;       // (total,); without shaped, rewards are the shaped ones
  double* reward_moments;  // (5,)

  Whitening whiten_rewards;
  const void* values;  // (total,), or null: discounted returns
  const double *gamma, *lam, *bootstrap;  // (count,), or (1,) with stride 0; bootstrap (count,) or null
  int64_t gamma_stride, lam_stride;
  bool zero;                   // masked tokens are steps with r = V = 0
  void *advantages, *returns;  // (total,); if returns is null, there is no scan and advantages are given

  bool pivots_first;          // true: pivots by the advantages before whitening, and whitening over the pivots only
  double* advantage_moments;  // (5,)
  Whitening whiten_advantages;
  void* whitened;  // (total,), may be advantages
  const void* score;   // (total,)
  double baseline;
  void* token_weight;  // (total,) float32: 1 where A >= 0 and score > baseline or A < 0 and score < baseline
};

void advantages_cpu(const Advantages& op, Parallel parallel);

// Moments are added up in parts of this many tokens.
constexpr int64_t kMomentTokens = 8192;
FINEALIGN_BOTH inline int64_t moment_parts(int64_t total) { return (total + kMomentTokens - 1) / kMomentTokens; }

// As scan_cuda. Rewards of segments must be placed before: rewards is given. parts: workspace for moment_parts(total) Moments.
const char* advantages_cuda(const Advantages& op, void* parts, Link* links, void* stream);

}  // namespace finealign
