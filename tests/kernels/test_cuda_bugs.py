"""Bugs planted in kernels/cuda, one at a time, are found by the tests that run it on the CPU."""

import pytest
import test_cuda_scan as scan
import torch
from cuda_host import DeviceFailure, on_host
from test_cuda_host import (
    SIDES,
    check,
    check_bad_bounds_of_policies,
    check_bad_bounds_of_sequences,
    check_bad_cu_seqlens,
    check_policies,
    check_sequences,
)

SEGMENT_BUGS = {
    "no barrier before reading": ("    __syncthreads();\n#pragma unroll 1", "#pragma unroll 1"),
    "no barrier before the next round": ("    __syncthreads();  // before the next round writes chunks\n", ""),
    "barrier in a branch": (
        "__syncthreads();  // before the next round",
        "if (mine < stop) __syncthreads();  // before the next round",
    ),
    "shuffle of a part of the warp": (
        "const Tally chunk = mine < stop",
        "const Tally chunk = mine + threadIdx.x % kLanes < stop",
    ),
    "half the warp is not added": ("int half = kLanes / 2", "int half = kLanes / 4"),
    "last token left out": ("const bool has = i < n;", "const bool has = i < n - 1;"),
    "one token beyond the end": ("const bool has = i < n;", "const bool has = i <= n;"),
    "empty segment not written": (
        "if (b.stop - b.start <= kChunk) by_warp",
        "if (b.stop > b.start && b.stop - b.start <= kChunk) by_warp",
    ),
    "segments beyond the last": (
        "const int64_t end = first + each < segments.count ? first + each : segments.count;",
        "const int64_t end = first + each;",
    ),
    "segment skipped": ("s += kWarps) {", "s += kWarps + 1) {"),
    "summed in the dtype of x": ("sum += load(values[k]);", "sum = load(static_cast<T>(sum + load(values[k])));"),
    "chunks added in float32": ("tally.sum += chunk.sum;", "tally.sum = static_cast<float>(tally.sum + chunk.sum);"),
    "mask not looked at": ("(mask == nullptr || mask[i] != 0);", "true;"),
    "masked tokens counted": ("      ++kept;\n      last =", "      kept = k + 1;\n      last ="),
    "first instead of last": ("last > other ? last : other", "last < other ? last : other"),
    "end instead of last kept": ("i == tally.last", "i == b.stop - 1"),
    "mean over none": ("tally.kept > 0 ? tally.kept : 1));\n  else *out", "tally.kept));\n  else *out"),
    "bounds not checked": ("stop <= segments.total && ends_fit", "ends_fit"),
    "head not filled": ("first ? 0 : clamp(start", "clamp(start"),
    "parts of another segment": ("parts + first_slot(segments, s, kChunk)", "parts"),
    "parts of a segment that has none": ("parts == nullptr || b.stop - b.start <= kChunk", "parts == nullptr"),
    "parts made from bad bounds": ("op.parts != nullptr && all_valid(op.segments) ?", "op.parts != nullptr ?"),
    "the first chunk of a long segment, each time": ("+ at.index * kChunk;", ";"),
    "a chunk of a long segment in two slots": ("parts[slot] = part;", "parts[slot - at.index % 2] = part;"),
    "the last tokens of a piece left out": ("b.stop = b.start + kSpread;", "b.stop = b.start + kSpread - 1;"),
    "a piece again": ("b.start += at.index * kSpread;", "b.start += 0 * kSpread;"),
    "pieces trusted with bad bounds": ("const bool valid = all_valid(segments);", "const bool valid = true;"),
}  # fmt: skip


def check_segments(lib):
    for sizes in ("empty", "mixed", "rounds"):
        check(lib, sizes, torch.bfloat16)
    check_bad_cu_seqlens(lib)


SEQUENCE_BUGS = {
    "mask not looked at": ("(mask == nullptr || mask[i] != 0);", "true;"),
    "weight of 0 not left out": ("else if (w != 0) part.score", "else part.score"),
    "weights counted": ("part.weight += counts ? A(1) : w;", "part.weight += A(1);"),
    "half the warp is not added": ("int half = kLanes / 2", "int half = kLanes / 4"),
    "no barrier before the losses": ("  __syncthreads();\n  if (threadIdx.x < n)", "  if (threadIdx.x < n)"),
    "no barrier before the next round": ("    __syncthreads();  // before the next round writes parts\n", ""),
    "rejected of the next": ("score[threadIdx.x + n]", "score[threadIdx.x + 1]"),
    "reference's sum added": ("score -= static_cast", "score += static_cast"),
    "divided before": ("(op.slope)[s] / under", "(op.slope)[s]"),
    "weight lost in backward": ("(weights[k] != 0 ? value : A(0)) * weights[k] : value;", "value : value;"),
    "bounds not looked at": ("valid ? total.score : static_cast<double>(NAN)", "total.score"),
    "parts of another": ("op.parts + first_slot(segments, sequence(q), kChunk)", "op.parts"),
    "a piece again": ("before = at.index * kSpread", "before = 0 * kSpread"),
    "first and phi exchanged": ("k == 0 ? op.first : op.phi", "k == 0 ? op.phi : op.first"),
}  # fmt: skip


def check_all_sequences(lib):
    for layout in ("ragged", "rounds"):
        check_sequences(lib, layout, torch.bfloat16, SIDES if layout == "ragged" else SIDES[:3])
    check_bad_bounds_of_sequences(lib)


POLICY_BUGS = {
    "mask not looked at by rows": ("keeps[k] = has && op.segments.keeps(i);", "keeps[k] = has;"),
    "mask not looked at by tokens": ("if (!keeps) {", "if (false) {"),
    "half the lanes left out": ("x += __shfl_xor_sync(kAllLanes, x, half);", "x += 0 * __shfl_xor_sync(~0u, x, half);"),
    "no barrier before the next round": ("    __syncthreads();  // before the next round writes parts\n", ""),
    "no barrier before terms are added": ("= adds[k];\n    __syncthreads();", "= adds[k];"),
    "no barrier before the totals": ("sums[warp] = sum;\n  }\n  __syncthreads();\n", "sums[warp] = sum;\n  }\n"),
    "no barrier before the results": ("  __syncthreads();\n  const int term", "  const int term"),
    "the row before": ("<= token) low = middle;", "< token) low = middle;"),
    "bounds not looked at": ("bad += bounds(op.segments, s).valid ? 0 : 1;", ""),
    "rows not all counted": ("s += chunks * kLanes", "s += chunks * kLanes + 1"),
    "empty rows counted": ("op.rows[s].length > 0 ? 1 : 0", "1"),
    "tokens for weights": ("if (!op.kept) part.weight = part.length;", "part.weight = part.length;"),
    "stretch lost": ("psi.slope * stretch_of(op.ratio, row)", "psi.slope"),
    "sampler by token lost": ("if (op.sampler != nullptr && !op.sampler_by_row) weight", "if (false) weight"),
    "the row's ratio in k3_is": ("op.ratio == RatioOf::token ? ratio : ratio_of(log_ratio)", "ratio"),
    "one token beyond the end": ("if (i < op.segments.total) one_token", "if (i <= op.segments.total) one_token"),
    "terms added out of order": ("const int j = k * kLanes + lane;", "const int j = (kWarps - 1 - k) * kLanes + lane;"),
    "a warp's counts left out": ("w = 1; w < kWarps; ++w)\n    count", "w = 2; w < kWarps; ++w)\n    count"),
    "chunks of a long row out of order": ("op.row_parts[slot] = part;", "op.row_parts[slot ^ 1] = part;"),
    "the first chunk of a long row, each time": ("+ at.index * kChunk;\n  const Row part", ";\n  const Row part"),
    "the first part left out": ("for (int k = 0; k < n; ++k) add(", "for (int k = 1; k < n; ++k) add(", "segments"),
    "backward stops early": ("i < op.total; i += step", "i < op.total; i += op.total"),
}  # fmt: skip


def check_all_policies(lib):
    for layout in ("ragged", "rounds", "many"):
        check_policies(lib, layout, torch.bfloat16)
    check_policies(lib, "ragged", torch.float64)  # where another order of additions is seen
    check_bad_bounds_of_policies(lib)


SCAN_BUGS = {
    "no barrier before reading": ("shared[warp] = own;\n    __syncthreads();", "shared[warp] = own;"),
    "no barrier before the next round": ("    __syncthreads();  // before the next round writes\n", ""),
    "carry not moved on": ("      carry = join(shared[w], carry);\n", ""),
    "enters a warp late": ("if (w == warp) enter = carry;\n      carry = join", "carry = join"),
    "y enters a piece through its last span": ("    y = through(course.whole, y);\n", "    y = course.y;\n"),
    "what enters a piece is what leaves it": ("if (l == lane) enter = y;\n      y = through", "y = through"),
    "pieces the other way": ("index = kForward ? k : pieces - 1 - k;\n    const", "index = k;\n    const"),
    "decay before a piece lost": ("const int lowest = index == 0 ? 0 : -1;", "const int lowest = 0;"),
    "what enters the first piece": ("Course course{links[blockIdx.x].enter,", "Course course{links[0].enter,"),
    "masked pieces not passed": ("if (first == kPiece) continue;", "if (first == kPiece) break;"),
    "slots trusted with bad bounds": ("return __syncthreads_and(valid) != 0;", "return true;", "segments"),
    "half the tree": ("steps < kLanes; steps *= 2", "steps < kLanes / 2; steps *= 2"),
    "own map included": ("return order<kForward>() == 0 ? none : previous;", "return mine;"),
    "decay of the token itself": ("at = kForward ? i - 1 : i;", "at = i;"),
    "masked token ends the sum": ("starts ? 0 : 1;", "0;"),
    "masked token read": ("read.keeps[e] ? static_cast<double>(read.x[e]) : 0", "read.x[e]"),
    "masked token written": ("out[place.first + e] = read.keeps[e] ?", "out[place.first + e] = place.has(e) ?"),
    "one token beyond the end": ("first + e < stop; }", "first + e <= stop; }"),
    "masked value taken": ("{zero ? 0 : earlier.value, 2}", "{earlier.value, 2}"),
    "bootstrap lost": ("return {op.bootstrap ? op.bootstrap[s] : 0, 0};", "return {0, 0};"),
    "steps after the last valid token": ("zero && ahead.state == 2 ? gamma", "zero ? gamma"),
    "decay without lambda": ("decay = gamma * op.lam[s * op.lam_stride];", "decay = gamma * op.lam[0];"),
    "returns without the value": ("static_cast<T>(d[e] + v[e])", "static_cast<T>(d[e])"),
    "rewards not whitened": ("if (whitens) d[e] =", "if (false) d[e] ="),
    "mean not put back": ("shift ? y : y + by.mean", "y"),
    "masked tokens counted": ("kept[i] != 0 : mask == nullptr || mask[i] != 0;", "kept[i] != 0 : true;"),
    "warp left out of a sum": ("int w = 1; w < kWarps", "int w = 2; w < kWarps"),
    "pivot on the wrong side": ("advantage < 0 && q < baseline", "advantage <= 0 && q < baseline"),
    "pivots of masked tokens": ("valid && (up || down)", "(up || down)"),
    "kl not masked": ("keep ? divergence(op.estimator, d) : 0", "divergence(op.estimator, keep ? d : old)"),
}  # fmt: skip


def check_scans(lib):
    scan.check_tokens(lib, 300, torch.float32)
    scan.check_far_values(lib, False, [5000, 12_300])
    for each in (0, 1):
        scan.check_bad_cu_seqlens(lib, each)
    scan.check_gae(lib, "mixed", torch.float32)
    scan.check_scan(lib, "mixed", torch.float32)
    scan.check_bits(lib, False, 8_300)


# file of kernels/cuda -> what is planted in it (the text that is replaced, by what, and in which file
# if it is another), and the checks that must fail
PLANTED = {
    "segments": (SEGMENT_BUGS, check_segments),
    "sequence_loss": (SEQUENCE_BUGS, check_all_sequences),
    "policy_loss": (POLICY_BUGS, check_all_policies),
    "scan": (SCAN_BUGS, check_scans),
}


@on_host
@pytest.mark.parametrize("module, name", [(module, name) for module, (bugs, _) in PLANTED.items() for name in bugs])
def test_planted_bug_is_found(host, module, name, tmp_path):
    bugs, check_all = PLANTED[module]
    lib = host.mutant(module, tmp_path, *bugs[name])
    with pytest.raises((AssertionError, DeviceFailure)):
        check_all(lib)
