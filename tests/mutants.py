"""Plants bugs and says which ones the suite catches: python tests/mutants.py [--only TEXT] [--list]

Every mutant is one replacement of text in a copy of the installed package (csrc is rebuilt where a kernel is mutated); the
tests named beside it run against the copy and must fail. The checkout is not touched. Exit status 1 if a bug survives.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ("csrc/", "kernels/cuda/")
LOGPROBS, LOSSES, SEGMENTS = "tests/ops/test_logprobs.py", "tests/losses/test_losses.py", "tests/ops/test_segments.py"
LAUNCH, GPU = "tests/kernels/test_triton_launch.py", "tests/kernels/test_gpu.py"
LAUNCHES = "tests/kernels/test_launches.py"
TRITON, FEEDBACK = "tests/kernels/test_row_logprobs_triton.py", "tests/feedback/test_feedback.py"
REWARDS, GROUPS, PIVOTS = "tests/rl/test_rewards.py", "tests/rl/test_groups.py", "tests/losses/test_pivots.py"
CUTS, POINTWISE, TABLE = (
    "tests/feedback/test_feedback_segments.py",
    "tests/losses/test_losses_pointwise.py",
    "tests/losses/test_losses_table.py",
)
TRL, SEQUENCE, POLICY, VALUE = (
    "tests/integrations/test_trl.py",
    "tests/ops/test_sequence_loss.py",
    "tests/losses/test_policy.py",
    "tests/losses/test_value.py",
)
REWARD, STRENGTH, CONTRASTIVE = (
    "tests/losses/test_reward.py",
    "tests/losses/test_strength.py",
    "tests/losses/test_contrastive.py",
)
METARM, SEGMENT_REWARDS = "tests/losses/test_metarm.py", "tests/integrations/test_segment_rewards.py"
TRL_REWARD = "tests/integrations/test_trl_reward.py"
TRL_DPO, STEPS = "tests/integrations/test_trl_dpo.py", "tests/integrations/test_steps.py"
ADAPTERS = "tests/integrations/test_rl_adapters.py"
SEAMS = "tests/integrations/test_rl_seams.py"
TRL_POINTWISE, TRL_GRPO = "tests/integrations/test_trl_pointwise.py", "tests/integrations/test_trl_grpo.py"
FUSED_POLICY = "tests/ops/test_policy_loss.py"
NUMBERS = "tests/mistakes/test_numbers_elsewhere.py"
SILENT, LIMITS = "tests/mistakes/test_silent_faults.py", "tests/mistakes/test_limits.py"
MISTAKES = "tests/mistakes/test_ordinary_mistakes.py"
SURROUNDINGS = "tests/mistakes/test_surroundings.py"
DIVERGENCE, RETURNS, SCAN = "tests/losses/test_divergence.py", "tests/rl/test_returns.py", "tests/ops/test_scan.py"
ADVANTAGES, HEAD = "tests/rl/test_advantages.py", "tests/kernels/test_linear_logprobs_triton.py"
HOUSE = "tests/house/test_house.py"
PARALLEL, CONTEXT = "tests/ops/test_parallel.py", "tests/ops/test_context.py"
SMOOTHING, SUPPORT = "tests/ops/test_label_smoothing.py", "tests/ops/test_support.py"
FORMULA, CHUNKED, OP = "formulas/logprobs.py", "ops/_chunked.py", "ops/logprobs.py"
LOW_RANK, MODEL = "tests/ops/test_low_rank_head.py", "tests/integrations/test_model_logprobs.py"
HF = "integrations/transformers.py"
ROWS, PREFERENCE, REDUCE = "csrc/cpu/row_kernels.h", "losses/preference.py", "losses/reduce.py"


class Mutant(NamedTuple):
    what: str
    path: str  # below finealign_kernels/, or from the root for csrc/ and kernels/cuda/
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("a segment's reward at its first token", "integrations/_trl_grpo.py", "row[kept[max(int((kept < part.stop).sum()) - 1, 0)]] += ", "row[part.start] += ", TRL_GRPO),
    Mutant("a reward lost where one function gave none", "integrations/_trl_grpo.py", "every.nansum(0)", "every.sum(0)", TRL_GRPO),
    Mutant("advantages by values not whitened", "integrations/_trl_grpo.py", "return whiten(found,", "return found if True else whiten(found,", TRL_GRPO),
    # a head with LoRA, and the heads of models
    Mutant("the adapter left out forward", CHUNKED, "product(u[start:stop], bt, z, accumulate=True)", "pass", LOW_RANK),
    Mutant("the adapter left out of what is computed again", CHUNKED, "product(u[i:j], bc.to(u.dtype).t(), z, accumulate=True)", "pass", LOW_RANK),
    Mutant("b of a padded vocabulary", OP, "(low[0], low[1][:columns])", "low", LOW_RANK),
    Mutant("an adapter's scale", HF, "_parallel.whole(a)) * scale)", "_parallel.whole(a)))", MODEL),
    Mutant("an adapter's dropout", HF, "head.lora_dropout[name](hidden.to(a.dtype))", "hidden.to(a.dtype)", MODEL),
    Mutant("an adapter that is switched off", HF, "    if head.disable_adapters:\n", "    if False:\n", MODEL),
    Mutant("Falcon-H1's multiplier", HF, '("logit_scale", "lm_head_multiplier", 1)', "None", MODEL),
    Mutant("the padding in the router's loss", HF, "config.num_experts_per_tok, attention_mask)", "config.num_experts_per_tok, None)", MODEL),
    Mutant("a head of ZeRO-3 saved as it is gathered", "integrations/_zero3.py", ", saved_as_shards(gather, weight, bias, weight)", "", MODEL),
    # names that can be found
    Mutant("short forms hide their arguments", "losses/options.py", "*(p for p in passed if p.name not in hidden)", "", HOUSE),
    Mutant("numbers that float32 does not hold", "ops/_check.py", "abs(value) > LARGEST", "abs(value) > 1e300", LOGPROBS),
    Mutant("numbers that vanish in float32", "ops/_check.py", " or (above == 0 and value < SMALLEST)", "", LOGPROBS),
    Mutant("numpy's numbers are none", "ops/_check.py", "isinstance(value, (float, np.floating))", "isinstance(value, float)", MISTAKES),
    Mutant("a 2 in a mask", "ops/_check.py", "low < 0 or high > 1", "low < 0", MISTAKES),
    Mutant("a mask of integers as its values", "ops/_check.py", "return x != 0", "return x == 0", MISTAKES),
    Mutant("any truth for an option", "ops/_check.py", "if not isinstance(value, (bool, np.bool_)):", "if False:", MISTAKES),
    Mutant("outputs looked up unseen", "ops/_check.py", "if not isinstance(name, str) or name not in OUTPUTS:", "if False:", MISTAKES),
    Mutant("log-ratios of halves rounded", PREFERENCE, "tokens.x.to(wide) -", "tokens.x -", MISTAKES),
    Mutant("two gradients of halves added rounded", PREFERENCE, "tokens = tokens.widened()", "pass", MISTAKES),
    Mutant("a float32 bias from E of half precision", OP, "budget if keep and not wider else 0", "budget if keep else 0", LOGPROBS),
    Mutant("infinite rewards in a group", "rl/groups.py", "if infinite.any():", "if False:", GROUPS),
    Mutant("infinite rewards on a GPU", "rl/groups.py", "torch.where(infinite, torch.nan, wide)", "wide", GROUPS),
    Mutant("the entropy by this call's count beside the step's", "losses/policy.py", "        return denominator\n    if matters", "        return None\n    if matters", POLICY),
    Mutant("sharded tensors taken", "ops/_check.py", 'if hasattr(x, "placements") and hasattr(x, "full_tensor"):\n        expected', "if False:\n        expected", MISTAKES),
    Mutant("a reference of another transform", PREFERENCE, 'check_plain("ref_logp", part)', "pass", MISTAKES),
    Mutant("nested tensors taken", "ops/_check.py", " and not x.is_nested", "", MISTAKES),
    Mutant("a row's scale of another type", "losses/table.py", "if scale is None:", "if False:", NUMBERS),
    Mutant("a reward row of any margin", "losses/reward.py", 'margin = check_number("RewardRow.margin", margin)', "pass", NUMBERS),
    Mutant("weights of tokens beyond float32", "feedback/records.py", "abs(value) <= LARGEST", "True", NUMBERS),
    Mutant("numpy's arrays without dimensions in feedback", "feedback/records.py", 'type(value).__module__ == "numpy"', "False", NUMBERS),
    Mutant("whole numbers beyond int64", "ops/_check.py", " or abs(found) >= 2**63", "", NUMBERS),
    Mutant("tensors of torch.func taken", "ops/_check.py", " and not is_transformed(x)", "", MISTAKES),
    Mutant("the reference refuses transforms", OP, 'transforms=backend == "reference"', "transforms=False", MISTAKES),
    Mutant("sharded tensors taken on the short way", "ops/_layout.py", "usual = is_plain(y)", "usual = isinstance(y, Tensor)", MISTAKES),
    Mutant("soft targets of a loss of hard ones", "losses/pointwise.py", "        if len(soft):", "        if False:", SILENT),
    Mutant("unequal pairs taken", "ops/_layout.py", "shapes[0][0] != shapes[1][0]", "False", "tests/ops/test_layout.py"),
    # limits
    Mutant("EXO: 0 times an infinite slope", "formulas/margin.py", "times(up * down, m -", "(up * down) * (m -", LIMITS),
    Mutant("EXO: 0 times an infinite cost", "formulas/margin.py", "times(down, logsigmoid(-m) - unlikely)", "down * (logsigmoid(-m) - unlikely)", LIMITS),
    Mutant("EXO's limits changed places in the kernels", "kernels/cuda/formulas.cuh", "m > 0 ? rest : rest + a", "m < 0 ? rest : rest + a", LIMITS),
    Mutant("DiscoPOP's slope at -inf in the kernels", "kernels/cuda/formulas.cuh", "a > 1 ? -INFINITY : -1.0", "-1.0", LIMITS),
    Mutant("robust without noise in the kernels", "kernels/cuda/formulas.cuh", "if (a == 0) return {at.cost, -at.down};", "", LIMITS),
    Mutant("DiscoPOP: the difference of two infinite slopes", "formulas/margin.py", "torch.where(steep == torch.inf, -torch.inf, slope)", "slope", LIMITS),
    Mutant("DiscoPOP: e^(m/τ - m) of two infinities", "formulas/margin.py", "torch.where(lowest, times(1 / tau - 1, m), up - m)", "(up - m)", LIMITS),
    Mutant("robust: no noise times an infinite margin", "formulas/margin.py", "-logsigmoid(m) - times(push, m)", "-logsigmoid(m) - push * m", LIMITS),
    Mutant("smoothed: the difference of two infinities", "formulas/margin.py", "torch.where(m == -torch.inf, at_least, value)", "value", LIMITS),
    Mutant("smoothed: no noise times an infinite margin", "formulas/margin.py", "times(smoothing, m) - logsigmoid(m)", "smoothing * m - logsigmoid(m)", LIMITS),
    Mutant("accuracies by rewards that overflow", PREFERENCE, "torch.gt(*score.chunk(2))", "(chosen > rejected)", LIMITS),
    Mutant("a flat loss that a divergence tilts", PREFERENCE, "torch.where(slopes == 0, slopes, slopes * stretch)", "slopes * stretch", LIMITS),
    Mutant("aot: the policy's difference from an infinite reference", PREFERENCE, "torch.where(infinite, other, ratio + own)", "ratio + own", LIMITS),
    Mutant("0 times an infinite score", "metarm.py", "max(1, k) ** 2)) + r[:0].sum()", "max(1, k) ** 2)) + 0 * r.sum()", LIMITS),
    Mutant("a shift decides the dtype", PREFERENCE, "losses.to(score.dtype), slope.to(score.dtype)", "losses, slope", LIMITS),
    Mutant("a count decides the dtype", "ops/sequence_loss.py", ").to(total.dtype)", ")", LIMITS),
    Mutant("logits summed as they are", FORMULA, "part[:, 4] = torch.where(allowed, z / UNIT, 0)", "part[:, 4] = UNIT**-1 * torch.where(allowed, z, 0)", LIMITS),
    Mutant("the native sum of logits in another unit", ROWS, "total / 0x1p24", "total / 0x1p23", LIMITS),
    Mutant("squares of large float64 values overflow", "rl/whitening.py", "(top > 2.0**480)", "(top > 2.0**960)", LIMITS),
    Mutant("squares of large rewards overflow", "formulas/groups.py", "where(top > 2.0**480, size", "where(top > 2.0**2000, size", GROUPS),
    Mutant("squares of tiny rewards vanish", "formulas/groups.py", "(top < 2.0**-480)", "(top < 0)", GROUPS),
    Mutant("one unit for all groups", "formulas/groups.py", "unit, n = _unit(reward, key),", "unit, n = _unit(reward, 0 * key),", GROUPS),
    Mutant("differences of large differences", "losses/strength.py", "half = d / 2 - mean / 2", "half = (d - mean) / 2", STRENGTH),
    Mutant("half a surrogate pair", "feedback/spans.py", 'tokenizer(plain_text("prompt", prompt)', "tokenizer(prompt", FEEDBACK),
    Mutant("a kind that is almost a span's", "feedback/spans.py", "cutoff=0.85", "cutoff=1.0", FEEDBACK),
    Mutant("kinds that no span is of", "integrations/_trl_data.py", "for kind in sorted(set(map(str, by_kind)) - kinds):", "for kind in ():", TRL_DPO),
    Mutant("autocast narrows similarities", "ops/contrast.py", "torch.autocast(keys.device.type, enabled=False)", "torch.autocast(keys.device.type, enabled=True)", SURROUNDINGS),
    Mutant("autocast narrows prototypes", "losses/contrastive.py", "torch.autocast(first.device.type, enabled=False)", "torch.enable_grad()", SURROUNDINGS),
    Mutant("signs in the default dtype", "losses/pivots.py", "torch.where(advantage < 0, -1.0, torch.nan)).float()", "torch.where(advantage < 0, -1.0, torch.nan))", SURROUNDINGS),
    Mutant("options that no loss takes", "integrations/_trl_data.py", "if key not in known:", "if False:", TRL_REWARD),
    Mutant("variance about 0", "formulas/returns.py", "away = _kept(kept - near, mask, 0)", "near, away = 0, kept", RETURNS),
    Mutant("variance about 0, native", "kernels/cuda/formulas.cuh", "{n, n * first + d, first * (n * first + 2 * d) + dd, first + d / n, away < 0 ? 0 : away}", "{n, n * first + d, first * (n * first + 2 * d) + dd, first + d / n, first * (n * first + 2 * d) + dd - (n * first + d) * (n * first + d) / n}", RETURNS),
    Mutant("parts whose means are apart", "kernels/cuda/formulas.cuh", "x.away + y.away + apart * apart * x.n * share", "x.away + y.away", RETURNS),
    Mutant("float64 constant as float32 is", "kernels/cuda/formulas.cuh", "(wide ? 0x1p-104 : 0x1p-46)", "0x1p-46", RETURNS),
    Mutant("the mean of large values in their unit", "rl/whitening.py", "mean * unit", "mean", LIMITS),
    Mutant("sums that overflow count as one value", "formulas/returns.py", "v = torch.where(square == torch.inf, torch.nan, v)", "nothing = nothing | square.isinf()", LIMITS),
    # groups and heads over ranks
    Mutant("turns of this rank's responses alone", "rl/groups.py", "(wide,), own = rows_of_all(process_group, wide)", "own = slice(None); counts = cu_turns.diff()", "tests/ops/test_over_ranks.py"),
    Mutant("columns of sharded logits counted from 0", "ops/_parallel.py", "min(dist.get_rank(group) * step, vocab)", "0", "tests/ops/test_sharded_heads.py"),
    Mutant("a compiled shard begins at column 0", "ops/_parallel.py", "return group, shard.start, shard.columns,", "return group, 0, shard.columns,", PARALLEL),
    Mutant("a compiled head forgets temperatures of rows", "ops/_parallel.py", "    inv_temperature = inv_temperature if row_inv_temperature is None else row_inv_temperature\n", "", PARALLEL),
    Mutant("the plan without what is kept for backward", "ops/_plan.py", "        kept * columns * item,\n", "        0,\n", "tests/ops/test_plan_memory.py"),
    # sequences over ranks
    Mutant("the label at a chunk's end by this rank's tokens", "ops/context.py", "torch.where(mine, here, slot[after] if self.total else here)", "here", CONTEXT),
    Mutant("labels over the end of a sequence", "ops/context.py", "torch.where(kept.view(-1, *[1] * (flat.dim() - 1)), after, fill)", "after", CONTEXT),
    Mutant("zigzag that does not turn back", "ops/context.py", "torch.minimum(chunk, 2 * self.ranks - 1 - chunk)", "chunk % self.ranks", CONTEXT),
    Mutant("chunks in the order of ranks", "ops/context.py", "one[back].movedim(0, shard._dim)", "one.movedim(0, shard._dim)", CONTEXT),
    Mutant("the gradient of another rank's tokens", "ops/context.py", "g.index_select(shard._dim, shard._at(g, shard.index))", "g.index_select(shard._dim, shard._at(g, shard._order[: len(shard.index)]))", CONTEXT),
    Mutant("sums of sequences without the other ranks", "ops/context.py", "            whole += part", "            pass", CONTEXT),
    Mutant("partial sums without a gradient", "ops/context.py", "return None, dtotal, None", "return None, None, None", CONTEXT),
    # a mask that keeps nothing
    Mutant("a mask that keeps nothing is silent", "ops/_warn.py", "    if many:", "    if False:", SILENT),
    Mutant("the kept fraction of all columns", "losses/pivots.py", "else tokens.mask.sum().clamp(min=1)", "else weight.numel()", SILENT),
    # a head with an adapter
    Mutant("the base weight of a head with an adapter is silent", "ops/_adapter.py", "wrapper is None or not _is_active(wrapper)", "True", "tests/ops/test_adapter.py"),
    Mutant("a module with an adapter: no advice", "ops/_check.py", 'hint = f"; {ADVICE}" if has_adapter(x)', 'hint = "" if has_adapter(x)', "tests/ops/test_adapter.py"),
    Mutant("an adapter that is off is warned of", "ops/_adapter.py", 'getattr(wrapper, "disable_adapters", False) or', "", "tests/ops/test_adapter.py"),
    # words of errors
    Mutant("a keyword that does not exist lists none", "losses/table.py", "if known else", "if False else", "tests/mistakes/test_words_of_errors.py"),
    Mutant("a mask handed over whole is a pair", "ops/_layout.py", "if name in x._fields:", "if False:", "tests/mistakes/test_words_of_errors.py"),
    Mutant("any value of FINEALIGN_CPU", "ops/_native.py", "not in (None, \"\", *CPU)", "is ...", "tests/mistakes/test_words_of_errors.py"),
    # tensors as they come
    Mutant("a bias of other strides", "ops/logprobs.py", "(_chunked.wide(hidden.dtype)).contiguous()", "(_chunked.wide(hidden.dtype))", "tests/mistakes/test_strange_tensors.py"),
    # ends of segments
    Mutant("indices into the response for columns", "rl/rewards.py", "if tokens.mask[place].all():", "if True:", REWARDS),
    Mutant("a response without tokens refuses its ends", "rl/rewards.py", "& (kept[stop] > kept[first])", "", REWARDS),
    Mutant("a maker that leaves indices", "rl/rewards.py", "[columns[i] if columns else 0 for i in found]", "found", REWARDS),
    # the demo
    Mutant("the comparison trains with the weights, too", "demo/effect.py", "[_unweighted(batch) for batch in batches]", "batches", "tests/demo/test_cli.py"),
    Mutant("blue for less", "report/style.py", "--less: 214 74 60; --more: 47 118 200;", "--less: 47 118 200; --more: 214 74 60;", "tests/demo/test_report.py"),
    Mutant("parts of a pair are counted", "report/charts.py", "_ticks([0, *counts], whole=True)", "_ticks([0, *counts])", "tests/demo/test_report.py"),
    Mutant("a turned label is not remembered", "demo/reward_data.py", "planted=not pair.planted", "planted=pair.planted", "tests/demo/test_demo_reward.py"),
    Mutant("numbers of a pair stay in the order of the file", "demo/reward.py", "{name: x[index] for", "{name: x[: len(index)] for", "tests/demo/test_demo_reward.py"),
    Mutant("the best segment counts as the marked one", "demo/reward_summary.py", ".argmin())", ".argmax())", "tests/demo/test_demo_reward.py"),
    Mutant("layers by one name are halved alone", "demo/reward.py", "if isinstance(layers, torch.nn.ModuleList):", "if path == 'layers':", "tests/demo/test_demo_reward.py"),
    Mutant("parts of held-out pairs count from 0", "demo/reward_summary.py", "str(1 + part)", "str(part)", "tests/demo/test_demo_reward.py"),
    Mutant("answers are read without their prompt", "demo/reward_data.py", "**inputs, past_key_values=cache, use_cache=True", "**{**inputs, 'attention_mask': None}, use_cache=False", "tests/demo/test_demo_reward.py"),
    Mutant("noise of a head gradient divided by noise", "demo/heads.py", "of.dweight * NOISE / LIMIT", "0.0", "tests/demo/test_cli.py"),
    Mutant("a head gradient is held against everything", "demo/heads.py", "of.dweight * NOISE / LIMIT", "1e3 * of.dweight", "tests/demo/test_cli.py"),
    Mutant("an adapter's base weight trains after the warning", "ops/_adapter.py", 'if warned("adapter") and not trains:', 'if warned("adapter"):', "tests/ops/test_adapter.py"),
    # the vocabulary that a sampler kept
    Mutant("support: ids counted from the tile's start", FORMULA, "local = support.long() - col0", "local = support.long()", SUPPORT),
    Mutant("support: backward forgets it", CHUNKED, "                    ban(z, head.rows(slice(i, j)), c0)\n", "", SUPPORT),
    Mutant("support: rows that were read are not picked", FORMULA, "None if self.support is None else self.support[at]", "None if self.support is None else self.support[: len(self.support[at])]", SUPPORT),
    Mutant("labels of the general path are counted on a GPU alone", "ops/_parallel.py", "    note_errors(target, shard.bound)  #", "    if target.device.type != 'cpu':\n        note_errors(target, shard.bound)  #", SUPPORT),
    Mutant("the count of labels belongs to inference mode", "ops/_check.py", "with torch.inference_mode(False):", "if True:", "tests/ops/test_logprobs.py"),
    Mutant("support: ranks count ids from 0", "ops/_parallel.py", "head._replace(support=head.support - self.start)", "head", SUPPORT),
    Mutant("support: a label outside passes", "ops/_check.py", "lost = (target >= 0) & (ids != target[:, None]).all(-1)", "lost = (target >= 0) & (ids.shape[-1] == 0)", SUPPORT),
    Mutant("support: gradient in place forgets it", "ops/_tiles.py", "            _chunked.ban(to[r, c0:c1], head.rows(r), c0)\n", "            pass\n", SUPPORT),
    Mutant("support: the gradient of a row without a token", FORMULA, "torch.where(none, 0, d.to(m.dtype))", "d.to(m.dtype)", SUPPORT),
    Mutant("support: a row without a token by Triton", "kernels/_combine.py", 'tl.where(none, float("inf"), l)', "l", SUPPORT),
    Mutant("support: the reference's lse of a row without a token", FORMULA, "torch.where(m == -torch.inf, torch.nan, torch.logsumexp(z, -1))", "torch.logsumexp(z, -1)", SUPPORT),
    # label smoothing
    Mutant("smoothing: spread over banned tokens too", FORMULA, "spread = torch.where(z == -torch.inf, 0, coef.spread[:, None])", "spread = coef.spread[:, None]", SMOOTHING),
    Mutant("smoothing: none at the label", FORMULA, "dz_label if coef.spread is None else dz_label + coef.spread[:, None]", "dz_label", SMOOTHING),
    Mutant("smoothing: over all of the vocabulary", FORMULA, "dmean.to(m.dtype) / allowed)", "dmean.to(m.dtype) / 203)", SMOOTHING),
    Mutant("smoothing: rows with the mean's gradient alone are dropped", FORMULA, "active | (self.spread != 0)", "active", SMOOTHING),
    Mutant("smoothing: rows come from E, which does not know it", CHUNKED, "[] if coef.spread is None else [coef.spread != 0]", "[]", SMOOTHING),
    Mutant("smoothing: native kernel over banned tokens", ROWS, "select(z == -kInf, F{}, all(c.spread))", "all(c.spread)", SMOOTHING),
    Mutant("smoothing: native kernel without the label", ROWS, "  dz += c.spread;\n", "", SMOOTHING),
    Mutant("smoothing: weights of label and vocabulary changed places", "losses/nll.py", "(1 - epsilon) * wide.x + epsilon * mean", "epsilon * wide.x + (1 - epsilon) * mean", SMOOTHING),
    # the mathematics of a row
    Mutant("sign of the label's gradient", FORMULA, "-g * torch.expm1(logp)", "g * torch.expm1(logp)", LOGPROBS),
    Mutant("label's gradient from p", FORMULA, "-g * torch.expm1(logp)", "g * (1 - logp.exp())", LOGPROBS),
    Mutant("1 summed into R", FORMULA, "others = e.scatter(1, index[:, None], 0)", "others = e", LOGPROBS),
    Mutant("T without the shift of the maximum", FORMULA, "(t_tile + d * one) * w", "t_tile * w", LOGPROBS),
    Mutant("Q scaled once, not squared", FORMULA, "* w * w).sum(-1)", "* w).sum(-1)", LOGPROBS),
    Mutant("entropy gradient without H", FORMULA, "(logp_all + entropy)", "logp_all", LOGPROBS),
    Mutant("entropy gradient's sign", FORMULA, "dz = p * (k - g) - torch", "dz = p * (k - g) + torch", LOGPROBS),
    Mutant("lse gradient lost at the label", FORMULA, "+ k * p_label", "", LOGPROBS),
    Mutant("temperature lost in backward", FORMULA, "dz * (head.scale * head.temperature_factor)", "dz * head.scale", LOGPROBS),
    Mutant("softcap's slope lost", FORMULA, "dz * torch.where(is_label, label_slope, curve)", "dz", LOGPROBS),
    Mutant("softcap turns -inf into -c", FORMULA, "torch.where(y == -torch.inf, y, capped)", "capped", LOGPROBS),
    Mutant("mean over banned tokens too", FORMULA, "mean = total / count", "mean = total / 203", LOGPROBS),
    Mutant("any argmax", FORMULA, "top == target", "(first.amax(-1)) == target", LOGPROBS),
    Mutant("bad label gives a number", FORMULA, "torch.where(bad, torch.nan, x)", "x", LOGPROBS),
    # the chunked layer
    Mutant("rows shifted by one in backward", CHUNKED, "at, coef = rows.take(target)", "at, coef = rows.take(target).roll(1)", LOGPROBS),
    Mutant("every block overwrites dW", CHUNKED, "accumulate=start > 0", "accumulate=False", LOGPROBS),
    Mutant("every chunk overwrites dX", CHUNKED, "self.dx[start:stop], accumulate=True", "self.dx[start:stop], accumulate=False", LOGPROBS),
    Mutant("dbias of the last block only", CHUNKED, "self.db[self.span] += dz", "self.db[self.span] = dz", LOGPROBS),
    Mutant("dX rounded to bfloat16", CHUNKED, "dx = dx.to(self.hidden.dtype)", "dx = dx.to(torch.bfloat16).to(self.hidden.dtype)", LOGPROBS),
    Mutant("mask lost in forward", CHUNKED, "index = None if on_device else rows_in(read)", "index = None", LOGPROBS),
    Mutant("masked rows not cleaned", CHUNKED, "matrix = torch.where(keep[:, None], matrix, 0)", "pass", LOGPROBS),
    Mutant("dropped rows by logp's gradient alone", FORMULA, "torch.stack(self[:3]).ne(0).any(0)", "self.dlogp != 0", LOGPROBS),
    Mutant("workspace one row too large", CHUNKED, "min(rows, workspace // (vocab * dtype.itemsize))", "min(rows, -(-workspace // (vocab * dtype.itemsize)))", LOGPROBS),
    Mutant("E of another row", CHUNKED, "(read.cumsum(0) if rank is None else rank)[index] - 1", "index", LOGPROBS),
    Mutant("maxima of the first tile", CHUNKED, "tops[t, i:j]", "tops[0, i:j]", LOGPROBS),
    Mutant("near-uniform rows from bf16 E", CHUNKED, "tokens.log() - coef.entropy < 0.5", "tokens.log() - coef.entropy < -1", LOGPROBS),
    Mutant("rows without E take the products of a block's first", CHUNKED, "[(cut + i, cut + j) for", "[(start + i, start + j) for", LAUNCHES),
    Mutant("errors counted without order", "ops/_check.py", "word.index_add_(0, at, (target == BAD).sum()[None])", "word.add_((target == BAD).sum())", LAUNCHES),
    Mutant("a count of labels that each replay begins anew", "ops/_check.py", "captured = key not in _words and capturing(target)", "captured = False", LAUNCHES),
    Mutant("memory of a captured count taken for a count", "ops/_check.py", "word.mul_(at == MARK)", "word.mul_(1)", LAUNCHES),
    Mutant("a captured count nobody reads", "ops/_check.py", "if int(mark) == MARK]", "if False]", LAUNCHES),
    Mutant("a second read of the host", CHUNKED, "    stored, count = on_host(from_e.sum(), active.sum())", "    stored, count = on_host(from_e.sum(), active.sum()) if bool(active.any()) else (0, 0)", LAUNCHES),
    Mutant("dW of several blocks not summed in float32", CHUNKED, "direct=len(blocks) == 1 and dtype == weight.dtype", "direct=dtype == weight.dtype", LAUNCHES),
    Mutant("no active row leaves dW unwritten", CHUNKED, "self.slice.zero_()", "pass", LOGPROBS),
    Mutant("dW for a frozen head", OP, "ctx.needs_input_grad[:3]", "(True, True, False)", LOGPROBS),
    Mutant("E kept under no_grad", OP, "keep = torch.is_grad_enabled() and any", "keep = any", LOGPROBS),
    Mutant("gradients of lse ignored", OP, "formula.coefficients(dlogp, dlse, dentropy, dmean, logp, entropy, m, l, label_slope, allowed)\n    needs", "formula.coefficients(dlogp, None, dentropy, dmean, logp, entropy, m, l, label_slope, allowed)\n    needs", LOGPROBS),
    Mutant("logits overwritten in backward", OP, "grad = logits if ctx.inplace else torch", "grad = logits if True else torch", LOGPROBS),
    Mutant("a packed head for a head of another shape", "ops/_check.py", "isinstance(x, Tensor) and any(getattr", "False and any(getattr", LOGPROBS),
    Mutant("the base weight of an adapter advised", "ops/_adapter.py", "merge it, leave", "merge it or pass its base weight, leave", LOGPROBS),
    Mutant("label check off", "ops/_check.py", "flat != flat.clamp(0, vocab - 1)", "flat > vocab", LOGPROBS),
    Mutant("autocast reaches the products", OP, "with torch.autocast(device, enabled=False):", "if True:", LOGPROBS),
    # the vocabulary split over ranks
    Mutant("ranks: non-owners have no gradient", "ops/_parallel.py", "coef, summing = formula.coefficients(dlogp, dlse, dentropy, dmean, *state), Summing(shard)", "coef, summing = formula.coefficients(*(None if d is None else d * (local < 2**29) for d in (dlogp, dlse, dentropy)), dmean, *state), Summing(shard)", PARALLEL),
    Mutant("ranks: log TP added to lse", "ops/_parallel.py", "return formula.combine(part, first, torch.stack", "part = part.repeat_interleave(shard.ranks, 1); first = first.repeat_interleave(shard.ranks, 1)\n    return formula.combine(part, first, torch.stack", PARALLEL),
    Mutant("ranks: padding counted", "ops/_parallel.py", "else min(columns, max(vocab_size - start, 0))", "else columns", PARALLEL),
    Mutant("ranks: dX of this rank alone", "ops/_parallel.py", "self.work = dist.all_reduce(dx, group=group, async_op=True)", "pass", PARALLEL),
    Mutant("ranks: dX rounded before the sum", CHUNKED, "        self.handed = True\n", "        self.handed = True\n        self.dx = self.dx.to(self.hidden.dtype).to(self.dx.dtype)\n", PARALLEL),
    Mutant("ranks: first upstream gradient for all rows", FORMULA, "torch.where(none, 0, d.to(m.dtype)) for", "torch.where(none, 0, d[:1].expand_as(m).to(m.dtype)) for", PARALLEL),
    Mutant("ranks: temperature after the softmax", "ops/_parallel.py", "[*exchange(state, target, want, top, shard), local, e, e_max]", "[exchange(state, target, want, top, shard)[0] * head.inv_temperature, *exchange(state, target, want, top, shard)[1:], local, e, e_max]", PARALLEL),
    Mutant("ranks: combined from this rank on", "ops/_parallel.py", "all_gather(wire, shard.group)).permute", "all_gather(wire, shard.group).roll(-dist.get_rank(shard.group), 0)).permute", PARALLEL),
    Mutant("ranks: no collective where all is masked", "ops/_parallel.py", "[*exchange(state, target, want, top, shard), local, e, e_max]", "[*(exchange(state, target, want, top, shard) if bool((target >= 0).any()) else formula.combine(state.part[:, None], state.first[:, None], state.label, target, want)), local, e, e_max]", PARALLEL),
    Mutant("ranks: a label that two ranks hold counts twice", "ops/_parallel.py", "lost = (target >= 0) & (owners != 1)", "lost = (target >= 0) & (owners < 1)", PARALLEL),
    Mutant("ranks: the shard's dX overwritten by rows of another", "ops/_parallel.py", "reduce(self.out, dx, group=group, async_op=True)", "reduce(self.out, dx.roll(1, 0), group=group, async_op=True)", PARALLEL),
    Mutant("ranks: dX waits for dW", CHUNKED, "shard if last else None", "None", PARALLEL),
    Mutant("ranks: bytes of a column as they lie", "ops/ranks.py", "[part.clone(memory_format=torch.contiguous_format) for", "[part.contiguous() for", "tests/ops/test_over_ranks.py"),
    Mutant("ranks: each count of its own", "ops/ranks.py", "    dist.all_reduce(flat, group=group)", "    pass", "tests/ops/test_over_ranks.py"),
    Mutant("ranks: the bytes of a single row are read where they lie", "ops/ranks.py", "part.clone(memory_format=torch.contiguous_format).view(-1)", "part.contiguous().view(-1)", "tests/ops/test_over_ranks.py"),
    Mutant("ranks: rows of the first rank for all", "ops/ranks.py", "first = sum(sizes[: dist.get_rank(group)])", "first = 0", "tests/ops/test_over_ranks.py"),
    Mutant("Megatron: dX of sequence parallelism summed twice", "integrations/megatron.py", '"reduce_scatter" if output_layer.sequence_parallel else "all_reduce"', '"all_reduce" if output_layer.sequence_parallel else "none"', "tests/integrations/test_megatron.py"),
    Mutant("Megatron: labels not turned", "integrations/megatron.py", "labels.t().contiguous()", "labels.reshape(labels.shape[::-1])", "tests/integrations/test_megatron.py"),
    Mutant("FSDP2: the head's gradient of this rank alone", "ops/_parallel.py", 'return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)', "return x.full_tensor()", "tests/ops/test_sharded_heads.py"),
    Mutant("FSDP2: TRL gathers its head itself", "integrations/trl.py", "        utils.DTensor = Elsewhere\n", "", TRL),
    Mutant("DTensor heads begin at even places", "ops/_parallel.py", "min(dist.get_rank(group) * step, vocab)", "dist.get_rank(group) * (vocab // dist.get_world_size(group))", "tests/ops/test_sharded_heads.py"),
    Mutant("temperatures of other rows in backward", CHUNKED, "head = head.rows(rows.index)", "head = head.rows(None if rows.index is None else rows.index.flip(0))", "tests/ops/test_temperatures.py"),
    Mutant("the first temperature for all rows", FORMULA, "return t[:, None] if isinstance(t, Tensor) else t", "return t[:1, None] if isinstance(t, Tensor) else t", "tests/ops/test_temperatures.py"),
    # two copies of the package in a process
    Mutant("a second copy registers its ops too", "ops/_native.py", 'if _spec is not None and hasattr(torch.ops.finealign, "_cpu_state"):', "if False:", "tests/house/test_two_copies.py"),
    Mutant("ops of other sources are taken", "ops/_native.py", "if now is None or now == compiled_from:", "if True:", "tests/house/test_two_copies.py"),
    Mutant("ops of another build are taken", "ops/_native.py", "filecmp.cmp(loaded, file, shallow=False)", "True", "tests/house/test_two_copies.py"),
    Mutant("code for one GPU taken for its family's", "ops/_native.py", 'if suffix == "a" else', 'if suffix == "x" else', "tests/house/test_release.py"),
    Mutant("PTX for a later GPU taken", "ops/_native.py", "version <= (major, minor))", "version)", "tests/house/test_release.py"),
    Mutant("a GPU without code for it is taken", "ops/_native.py", "if serves(architectures(), properties.major, properties.minor):", "if True:", "tests/house/test_release.py"),
    Mutant("a trace cannot ask for a GPU", "ops/_native.py", "cuda._dynamo_marked_constant = True", "cuda = torch.compiler.disable(cuda)", "tests/house/test_release.py"),
    # the native row kernels
    Mutant("C++: sum includes the maximum", ROWS, "from = side ? first + 1 : 0", "from = side ? first : 0", LOGPROBS),
    Mutant("C++: maximum starts at 0", ROWS, "float m = -kInf;\n  *max_block", "float m = 0;\n  *max_block", LOGPROBS),
    Mutant("C++: tail of a row lost", ROWS, "const int64_t stop = block + kBlock < end ? block + kBlock : end;", "const int64_t stop = (block + kBlock < end ? block + kBlock : end) / W * W;", LOGPROBS),
    Mutant("C++: phantom columns are zeros", ROWS, "load_tail<f32>(z + j, n, -kInf)) - m", "load_tail<f32>(z + j, n, 0.0f)) - m", LOGPROBS),
    Mutant("C++: bf16 truncated", ROWS, "(u + 0x7fff + ((u >> 16) & 1)) >> 16", "u >> 16", LOGPROBS),
    Mutant("C++: expm1 written as p - 1", ROWS, "-c.g * ::expm1f(c.logp)", "-c.g * (p - 1)", LOGPROBS),
    Mutant("C++: E of the tile's own row", ROWS, "op.index ? op.index[row] : row", "row", LOGPROBS),
    Mutant("C++: entropy term's sign", ROWS, "dz -= c.h * p * (d + c.entropy)", "dz += c.h * p * (d + c.entropy)", LOGPROBS),
    Mutant("C++: T lost", ROWS, "if (kWantT) sums.t += sum(t);", "", LOGPROBS),
    # Triton
    Mutant("Triton: sign of entropy's gradient", "kernels/_tiles.py", "a = f * (k - g) + tl.where", "a = f * (k - g) - tl.where", TRITON),
    Mutant("Triton: a state for all spans", "kernels/row_logprobs.py", "row * part_stride + place * PARTS", "row * part_stride", TRITON),
    Mutant("Triton: a span's labels from the row's start", "kernels/row_logprobs.py", "col0 += begin", "pass", TRITON),
    Mutant("Triton: a span longer than its columns", "kernels/row_logprobs.py", "tl.minimum(columns - begin, SPAN)", "columns - begin", TRITON),
    Mutant("Triton: every span under the first maximum of E", "kernels/row_logprobs.py", "e_max_ptr += begin // E_COLUMNS", "pass", TRITON),
    Mutant("Triton: rows that are not read have numbers", "kernels/_combine.py", "tl.where(target == SKIP, 0.0, tl.where(target == BAD, float(\"nan\"), x))", "tl.where(target == BAD, float(\"nan\"), x)", TRITON),
    Mutant("Triton: every number of rows compiles anew", "kernels/row_logprobs.py", 'do_not_specialize=["e_max_stride", "coef_stride", "col0"]', 'do_not_specialize=["e_max_stride", "col0"]', LAUNCH),
    Mutant("Triton: a product compiled for its rows", "kernels/linear_logprobs.py", "rows if across else 0, 0 if across else inner", "rows, inner", LAUNCH),
    Mutant("Triton: label column off by one", "kernels/row_logprobs.py", "tl.store(out_ptr + label, dx", "tl.store(out_ptr + label + 1, dx", TRITON),
    Mutant("Triton: a block of banned tokens under their maximum", "kernels/_tiles.py", 'return tl.where(m == float("-inf"), 0.0, m)', "return m", TRITON),
    Mutant("Triton: a NaN that no sum sees", "kernels/_tiles.py", "below = tl.where(d >= 0, 0.0, e)", "below = tl.where(d < 0, e, 0.0)", TRITON),
    Mutant("Triton: one maximum of several", "kernels/_tiles.py", "tl.where(ties > 1, below + (ties - 1.0), below)", "below", TRITON),
    Mutant("Triton: last of ties", "kernels/row_logprobs.py", "inv_temperature, CAPPED, SCALED) < m):", "inv_temperature, CAPPED, SCALED) <= m):", TRITON),
    Mutant("Triton: a ragged end left out", "kernels/row_logprobs.py", "if whole < stop:", "if whole < 0:", TRITON),
    Mutant("Triton: the exponent of E lost from its log", "kernels/_tiles.py", "0.6931471805599453 / 2**23", "0.6931471805599453 / 2**22", TRITON),
    # losses
    Mutant("chosen and rejected exchanged", PREFERENCE, "torch.cat([slope, -slope])", "torch.cat([-slope, slope])", LOSSES),
    Mutant("shift inside beta", PREFERENCE, "beta * (chosen - rejected) - shift", "beta * (chosen - rejected - shift)", LOSSES),
    Mutant("beta lost in the slope", PREFERENCE, "slope = beta * scale * slope", "slope = scale * slope", LOSSES),
    Mutant("interleaved read as halves", PREFERENCE, "torch.cat([score[0::2], score[1::2]])", "score", LOSSES),
    Mutant("reference not weighted", PREFERENCE, "sequence_scores(tokens.x.to(wide) - flatten_like(ref_logp, tokens, \"ref_logp\").detach(), weight, tokens)", "sequence_scores(tokens.x, weight, tokens) - segment_sum(flatten_like(ref_logp, tokens, \"ref_logp\"), tokens.cu_seqlens, mask=tokens.mask)", LOSSES),
    Mutant("rewards carry a gradient", PREFERENCE, "    score = score.detach()\n", "", LOSSES),
    Mutant("empty pairs stay in the denominator", REDUCE, "counted.sum().clamp(min=1) if counted is not None else ", "", LOSSES),
    Mutant("kept and all exchanged", REDUCE, "weight if average == \"kept\" else ones", "ones if average == \"kept\" else weight", LOSSES),
    Mutant("mask by multiplication", REDUCE, "torch.where(tokens.mask, weight, 0)", "weight * tokens.mask", LOSSES),
    Mutant("NaN at a weight of 0", REDUCE, "weight * torch.where(weight != 0, x, 0)", "weight * x", LOSSES),
    Mutant("denominator ignored", REDUCE, "return over_count(total, check_denominator(denominator, given=given))", "return total / items.numel()", LOSSES),
    Mutant("IPO's slope halved", "formulas/margin.py", "2 * (m - center)", "(m - center)", LOSSES),
    # point-wise losses, the further rows, weights
    Mutant("KTO's z0 outside beta", "losses/pointwise.py", "shift=beta * z0", "shift=z0", POINTWISE),
    Mutant("KTO's z0 below 0", "losses/pointwise.py", "max(0.0, z0)", "z0", POINTWISE),
    Mutant("weights of the classes exchanged", "losses/pointwise.py", "masked_fill(positive, positive_weight), losses)", "masked_fill(~positive, positive_weight), losses)", POINTWISE),
    Mutant("class means over the batch", "losses/pointwise.py", "[inside.sum().clamp(min=1) for inside in classes]", "[positive.numel()] * 2", POINTWISE),
    Mutant("EXO's slope without its odds", "formulas/margin.py", "m - (likely - unlikely))", "m)", TABLE),
    Mutant("DiscoPOP's slope without tau", "formulas/margin.py", "turn / tau -", "turn -", TABLE),
    Mutant("NCA's slope", "formulas/margin.py", "m.sigmoid() - 2 * (-m).sigmoid()", "m.sigmoid() - (-m).sigmoid()", TABLE),
    Mutant("a slope beyond the exponent's bound", "formulas/margin.py", "torch.where(beyond, 0, exponent.exp())", "exponent.exp()", TABLE),
    Mutant("WPO divides by the rejected", "losses/weights.py", "(chosen + rejected).exp()", "(chosen - rejected).exp()", TABLE),
    Mutant("verl's global count of all ranks", "integrations/verl.py", "total / ranks", "total", ADAPTERS),
    Mutant("verl's dual clip forgotten", "integrations/verl.py", 'if name == "ppo" else {})', "if False else {})", ADAPTERS),
    Mutant("verl's head forgets the temperature", "integrations/verl.py", "labels, temperature=temperature, outputs", "labels, outputs", ADAPTERS),
    Mutant("verl's plugin fails in silence", "integrations/verl_plugin.py", "logging.getLogger(__name__).exception(", "str(", ADAPTERS),
    Mutant("OpenRLHF's GAE carries over masked tokens", "integrations/openrlhf.py", 'lam=lambd, masked="zero"', 'lam=lambd, masked="carry"', ADAPTERS),
    Mutant("OpenRLHF's sampler correction dropped", "integrations/openrlhf.py", "sampler_weight=weight,", "sampler_weight=None,", ADAPTERS),
    Mutant("slime's shares of the reducer dropped", "integrations/slime.py", "token_weight=_shares(of_policy, logp)", "token_weight=None", SEAMS),
    Mutant("slime's sampler weights dropped", "integrations/slime.py", "sampler_weight=correction", "sampler_weight=None", SEAMS),
    Mutant("slime's KL from the rewards left out", "integrations/slime.py", "reward - args.kl_coef * torch.cat(kl)", "reward", SEAMS),
    Mutant("SkyRL's mask after its correction dropped", "integrations/skyrl.py", "token_weight=kept.to(log_probs.dtype)", "token_weight=None", SEAMS),
    Mutant("SkyRL's anchor is always old", "integrations/skyrl.py", "    return rollout\n", "    return old\n", SEAMS),
    Mutant("SkyRL's GAE steps through masked tokens", "integrations/_token_losses.py", "mask=mask, gamma=gamma", "mask=torch.ones_like(mask), gamma=gamma", SEAMS),
    Mutant("prime-rl's token weights dropped", "integrations/prime_rl.py", "None if weight is None else weight[None]", "None", SEAMS),
    Mutant("NeMo-RL's mean of responses over all tokens", "integrations/nemo_rl.py", 'average="kept"', 'average="all"', SEAMS),
    Mutant("NeMo-RL's gate of tokens for sequences", "integrations/nemo_rl.py", 'gated = {"mode": "sequence_mask", "gate": "geometric"}', 'gated = {"mode": "token_mask"}', SEAMS),
    Mutant("a segment's last token left out", "integrations/_trl_grpo.py", "max(stop, last + 1)", "max(stop, last)", TRL_GRPO),
    Mutant("the advantages of another rank", "integrations/_trl_grpo.py", "self.accelerator.process_index * rows", "0", TRL_GRPO),
    Mutant("GSPO's ratio of the token", "integrations/_trl_grpo.py", "= logp - mean", "= logp - ratio", TRL_GRPO),
    Mutant("a rank's share without / world", "integrations/steps.py", "(count / self.world)", "count", STEPS),
    Mutant("the Trainer counts each batch alone", "integrations/steps.py", "self.model.training and self._step_counts", "False and self._step_counts", STEPS),
    Mutant("the Trainer divides by the number of batches", "integrations/steps.py", "loss_is_scaled_for_ga = True\n    _step", "loss_is_scaled_for_ga = False\n    _step", STEPS),
    Mutant("DDP is stepped around", "integrations/transformers.py", "isinstance(model, DistributedDataParallel) or", "", STEPS),
    Mutant("a dropped column of weights goes unsaid", "integrations/trl.py", "    if new:\n", "    if False:\n", TRL),
    Mutant("a fault raised in a good response", "integrations/_trl_data.py", '["label"]) >= 0.5', '["label"]) < 0.5', TRL_POINTWISE),
    Mutant("weights of the pair's sides swapped", "integrations/_trl_data.py", '("token_weight", ours.weights, 1.0)', '("token_weight", ours.weights[::-1], 1.0)', TRL_DPO),
    Mutant("weights one token late", "integrations/_trl_common.py", 'inputs["token_weight"][:, 1:]', 'inputs["token_weight"][:, :-1]', TRL_DPO),
    Mutant("spans counted from the template's text", "integrations/_trl_data.py", "max(x - start, 0)", "max(x, 0)", TRL_DPO),
    Mutant("reference of a cut completion at its wrong end", "integrations/_trl_data.py", '[*missing, *kept] if mode == "keep_end"', '[*kept, *missing] if mode == "keep_end"', TRL_DPO),
    Mutant("implicit pivots from the first step", "integrations/_trl_common.py", "0.5 if own else 0.0", "0.0", TRL_DPO),
    Mutant("TRL's temperature lost", "integrations/trl.py", "temperature=temperature,", "temperature=1.0,", TRL),
    # the fused sequence loss
    Mutant("soft labels exchanged", "losses/pointwise.py", "smoothing=1 - target", "smoothing=target", POINTWISE),
    Mutant("a label's sign", "losses/pointwise.py", "torch.where(positive, 1.0, 0 * target - 1)", "torch.where(positive, -1.0, 0 * target + 1)", POINTWISE),
    # the fused policy loss
    Mutant("a mean over rows not over their tokens", "ops/policy_loss.py", '"sequence": 1, "sequence_sum": 2', '"sequence": 2, "sequence_sum": 2', FUSED_POLICY),
    Mutant("no dual bound in the fused op", "ops/policy_loss.py", 'hyper.get("dual") or torch.inf,', "torch.inf,", FUSED_POLICY),
    Mutant("the clip's bounds exchanged in the fused op", "ops/policy_loss.py", "(1 - low, 1 + high)", "(1 - high, 1 + low)", FUSED_POLICY),
    Mutant("tokens counted where weights are kept", "ops/policy_loss.py", 'reduction.average == "kept",', "False,", FUSED_POLICY),
    Mutant("the entropy's gradient is the log-prob's", "ops/policy_loss.py", "backward(up, dentropy, entropy.dtype)", "backward(up, dlogp, entropy.dtype)", FUSED_POLICY),
    Mutant("SAPO's temperatures exchanged in the fused op", "ops/policy_loss.py", "(tau_pos, tau_neg)),", "(tau_neg, tau_pos)),", FUSED_POLICY),
    Mutant("numbers of rows taken for numbers of tokens", "losses/policy.py", "return not (single and any(", "return not (False and any(", FUSED_POLICY),
    Mutant("C++: a token moves its row's sum by its share alone", "csrc/cpu/policy_loss.cpp", "if (op.ratio == RatioOf::row_sum) multiply(at.slope, at.stretch, n);", "", FUSED_POLICY),
    Mutant("C++: KL weighed by the row's ratio", "csrc/cpu/policy_loss.cpp", "own_ratio = at.own_ratio;", "own_ratio = at.ratio;", FUSED_POLICY),
    Mutant("EXO's center negated", "ops/sequence_loss.py", "return math.log1p(-smoothing) - math.log(smoothing)", "return math.log(smoothing) - math.log1p(-smoothing)", SEQUENCE),
    Mutant("C++: no reference", "csrc/cpu/sequence_loss_kernels.h", "if (H::ref) x -= load(at.ref[i]);", "", SEQUENCE),
    Mutant("C++: a slope that nobody counts", "csrc/cpu/sequence_loss_kernels.h", "upstream[i] == 0 ? 0 : upstream[i] * slope[i])", "upstream[i] * slope[i])", SEQUENCE),
    Mutant("C++: the chosen beside the chosen", "csrc/cpu/sequence_loss_kernels.h", "scores_of<T>(op, sums, items + from, n, at.rejected)", "scores_of<T>(op, sums, from, n, at.rejected)", SEQUENCE),
    Mutant("C++: 0 / 0 of an empty sequence", "csrc/cpu/sequence_loss_kernels.h", "weight[i] = weight[i] == 0 ? 1 : weight[i];", "", SEQUENCE),
    Mutant("C++: a short sequence's slope one token on", "csrc/cpu/sequence_loss_kernels.h", "value[token - first] = *each", "value[token - first] = each[token > first]", SEQUENCE),
    Mutant("C++: three lanes of four", "csrc/cpu/sequence_loss_kernels.h", "if (n <= 4) return sum_of_few<4>(n, add);", "if (n <= 4) return sum_of_few<4>(std::min<int64_t>(n, 3), add);", SEQUENCE),
    Mutant("the gradient of a batch's loss not divided", "ops/sequence_loss.py", "over_count(each, denominator).to(", "each.to(", SEQUENCE),
    Mutant("an NLL over all tokens", "losses/nll.py", 'token_weight if average == "kept" else None', "None", LOSSES),
    Mutant("a NaN label is a negative", "losses/pointwise.py", "torch.where(positive, 1.0, 0 * target - 1)", "torch.where(positive, 1.0, -1.0)", POINTWISE),
    Mutant("a tangent of 0", "ops/_layout.py", "        refuse_transforms(name, part)\n", "", LOSSES),
    Mutant("a preference loss without a worked example", "losses/table.py", "PREFERENCE: dict[str, Row] = {", "PREFERENCE: dict[str, Row] = {\"new\": Row(margin.logistic, \"\", \"\"),", TABLE),
    Mutant("a loss of reward models without a worked example", "losses/reward.py", "REWARD: dict[str, RewardRow] = {", "REWARD: dict[str, RewardRow] = {\"new\": RewardRow(\"\", \"\"),", REWARD),
    Mutant("a wrong slope of one's own", "losses/table.py", "wrong.any()", "wrong.all()", LOSSES),
    Mutant("a NaN offset", PREFERENCE, "not least >= row.least_shift", "least < row.least_shift", LOSSES),
    # what gave a wrong number without an error
    Mutant("an absent class divides by its count", "losses/pointwise.py", 'reduce(losses, "sum", count, inside)', 'reduce(losses, "sum", None, inside) / count', SILENT),
    Mutant("margins of rewards that overflow", PREFERENCE, "margins=beta * torch.sub(*score.chunk(2))", "margins=chosen - rejected", SILENT),
    Mutant("a count of pairs alone beside an NLL over tokens", PREFERENCE, 'nll_denominator is None and nll == "token"', 'nll_denominator is None and nll == "none"', SILENT),
    Mutant("four sums of a loss that counts tokens", PREFERENCE, "isinstance(logp, Sums) and (average or nll_weight)", "False", "tests/mistakes/test_words_of_errors.py"),
    Mutant("four sums in the order of pairs", "losses/options.py", "for pair in (given[-4:-2], given[-2:])", "for pair in (given[-4::2], given[-3::2])", "tests/mistakes/test_words_of_errors.py"),
    Mutant("pivots count from the step before", "integrations/_trl_common.py", "self._pivots_from = math.ceil(start * self.state.max_steps) + 1", "self._pivots_from = math.ceil(start * self.state.max_steps)", TRL_DPO),
    Mutant("a count of 0 divides", "ops/sequence_loss.py", "torch.where(none, 0, total) / torch.where(none, 1, count)", "total / count", SILENT),
    Mutant("a weight of 0 multiplies a NaN", "losses/pointwise.py", "losses = weigh(torch.full_like(losses, other_weight).masked_fill(positive, positive_weight), losses)", "losses = torch.full_like(losses, other_weight).masked_fill(positive, positive_weight) * losses", SILENT),
    Mutant("class weights in the default dtype", "losses/pointwise.py", "torch.full_like(losses, other_weight).masked_fill(positive, positive_weight)", "torch.where(positive, positive_weight, other_weight).to(losses.dtype)", SILENT),
    # policy losses
    Mutant("gradient beyond the clamp", "formulas/surrogate.py", "(held > free) | is_beyond(log_ratio)", "held > free", POLICY),
    Mutant("dual clip on both sides", "formulas/surrogate.py", "flat | ((advantage < 0) & (ratio > dual))", "flat | (ratio > dual)", POLICY),
    Mutant("no half in the value loss", "formulas/surrogate.py", "((x - target) * ((x - target) / 2) for x in (value, near))", "((x - target) * (x - target) for x in (value, near))", VALUE),
    Mutant("what a clamp holds moves", "formulas/divergence.py", "held = (is_beyond(d) | is_beyond(log_ratio))", "held = is_beyond(log_ratio)", DIVERGENCE),
    Mutant("a product's gradient of one token", "losses/policy.py", "slope = slope * _lengths(tokens)", "slope = slope * 1", POLICY),
    Mutant("an advantage of 0 hides a NaN", "losses/policy.py", "none = (advantage == 0) & (log_ratio == log_ratio)", "none = advantage == 0", POLICY),
    Mutant("KL by the kept tokens", "losses/policy.py", "kl_coef * (share * push)", "kl_coef * (kept * push)", POLICY),
    Mutant("upstream of a policy loss lost", REDUCE, "torch.where(d != 0, d * upstream, 0)", "torch.where(d != 0, d, 0)", POLICY),
    Mutant("the trainer's NaN hidden", "losses/sampler.py", "sampler.isnan() & ~old.isnan()", "sampler.isnan()", POLICY),
    Mutant("a module by the package's own name", "ops/_choose.py", '"..kernels.linear_logprobs", __package__', '"finealign_kernels.kernels.linear_logprobs"', HOUSE),
    Mutant("a gate over masked tokens", "losses/sampler.py", "segment_mean(each, tokens.cu_seqlens, mask=tokens.mask)", "segment_mean(each, tokens.cu_seqlens)", POLICY),
    Mutant("binary KL the other way round", "losses/sampler.py", "for logp in (sampler, old))", "for logp in (old, sampler))", POLICY),
    # segments and spans
    Mutant("C++: mean over masked tokens too", "csrc/cpu/segments.cpp", "total /= std::max<int64_t>(1, kept(segments, start, stop))", "total /= std::max<int64_t>(1, stop - start)", SEGMENTS),
    Mutant("C++: the rest of a segment lost", "csrc/cpu/segments.cpp", "total += chunk_sum(x + token, segments.mask ? segments.mask + token : nullptr, stop - token);", "", SEGMENTS),
    Mutant("C++: last token before the last", "csrc/cpu/segments.cpp", "int64_t i = stop - 1;", "int64_t i = stop - 2;", SEGMENTS),
    Mutant("U+FFFD of the text for a part of a character", "feedback/spans.py", " and not spells_replacement(first, t + 1)", "", CUTS),
    Mutant("a closed pipe is told by a traceback", "cli.py", "except BrokenPipeError:", "except ZeroDivisionError:", "tests/demo/test_cli.py"),
    Mutant("a fault raised as much as praise", "feedback/spans.py", "((faults, -side), (praise, side))", "((faults, side), (praise, side))", FEEDBACK),
    Mutant("UTF-16 offsets taken as code points", "feedback/records.py", "units[: 2 * offset]", "units[: 4 * offset]", FEEDBACK),
    Mutant("a span's own text not compared", "feedback/records.py", "span.text == covered", "True", FEEDBACK),
    Mutant("span loses its last token", "feedback/spans.py", "(shared[0], shared[-1] + 1)", "(shared[0], shared[-1])", FEEDBACK),
    Mutant("span reaches the token behind it", "feedback/spans.py", "max(first, start) < min(stop, end)", "max(first, start) <= min(stop, end)", FEEDBACK),
    # segment rewards, groups, pivots
    Mutant("reward to the sequence before", "formulas/rewards.py", "torch.where(receiver >= first, receiver,", "torch.where(receiver >= 0, receiver,", REWARDS),
    Mutant("reward beyond its sequence", "formulas/rewards.py", "received = receiver < limit", "received = receiver < total", REWARDS),
    Mutant("overwrite adds", "formulas/rewards.py", "return at.received & (latest == segment)", "return at.received", REWARDS),
    Mutant("sums to go cross a border", "formulas/rewards.py", "place + step < limit", "place + step <= limit", REWARDS),
    Mutant("weight of a reward model lost", "rl/rewards.py", "total + model.weight * formula", "total + formula", REWARDS),
    Mutant("baseline over those that reached the turn", "formulas/groups.py", "at_turn, n)", "at_turn)", GROUPS),
    Mutant("leave-one-out without its factor", "formulas/groups.py", "n / (n - 1).clamp(min=1)", "n / n.clamp(min=1)", GROUPS),
    Mutant("equal rewards leave a residue", "formulas/groups.py", "known, member = ~x.isnan(), _first_known(x, key)", "known, member = ~x.isnan(), torch.zeros_like(x)", GROUPS),
    Mutant("advantage 0 is to be suppressed", "losses/pivots.py", "torch.where(advantage >= 0, 1.0", "torch.where(advantage > 0, 1.0", PIVOTS),
    Mutant("a segment's side from its last token", "losses/pivots.py", "_segment_scores(advantage, inside, starts, \"mean\")", "_segment_scores(advantage, inside, starts, \"last\")", PIVOTS),
    Mutant("a segment's side from its scored tokens", "losses/pivots.py", "_segment_scores(advantage, inside, starts", "_segment_scores(advantage, read, starts", PIVOTS),
    Mutant("a pivot at the threshold", "formulas/pivots.py", ".abs() > tau)", ".abs() >= tau)", PIVOTS),
    Mutant("a score at the baseline is kept", "formulas/pivots.py", "(side > 0) & (score > baseline)", "(side > 0) & (score >= baseline)", PIVOTS),
    Mutant("a row without a salient token", "formulas/pivots.py", "many.clamp(min=1)[row]", "many[row]", PIVOTS),
    Mutant("the token before is another row's", "formulas/pivots.py", "torch.where(place >= start, place, -1)", "place", PIVOTS),
    Mutant("a short last part", "feedback/segments.py", "i + least >= len(words)", "i + least > len(words)", CUTS),
    Mutant("a segment ends at its first token", "feedback/segments.py", "max(at, own[-1])", "max(at, own[0])", CUTS),
    # returns and advantages
    Mutant("bootstrap lost", "formulas/returns.py", "value[after], beyond)", "value[after], 0)", RETURNS),
    Mutant("a step too many through masked tokens", "formulas/returns.py", "decay ** (_gap(after, found) - 1), 1)", "decay ** _gap(after, found), 1)", RETURNS),
    Mutant("a sequence runs into the next", "formulas/returns.py", "inside = place[step:] < stop[:-step]", "inside = place[step:] <= stop[:-step]", RETURNS),
    Mutant("variance of a sample is that of the population", "formulas/returns.py", "v = v * (n / (n - 1).clamp(min=1))", "v = v * (n / n)", RETURNS),
    Mutant("C++: values beyond masked tokens", "csrc/cpu/advantages.cpp", "op.zero && !beside ? 0", "op.zero ? 0", RETURNS),
    Mutant("C++: pieces of two sequences joined", "csrc/cpu/advantages.cpp", "if (pieces[i - 1].s == pieces[i].s) right", "if (true) right", RETURNS),
    Mutant("C++: a short sequence runs into the next", "csrc/cpu/advantages.cpp", "a[behind - 1] = 0;", "a[behind - 1] = rates.decay;", RETURNS),
    Mutant("C++: NaN over a cut between short sequences", "csrc/cpu/advantages.cpp", "if (end - s > 1 && scan_packed<T>(op, s, end, longest, by)) continue;", "if (end - s > 1) { scan_packed<T>(op, s, end, longest, by); continue; }", RETURNS),
    Mutant("C++: what enters a tile is lost", "csrc/cpu/recurrence_kernels.h", "Recurrence<false> recurrence(state.y);", "Recurrence<false> recurrence(0);", RETURNS),
    Mutant("C++: sums over four tokens from those beside", "csrc/cpu/recurrence_kernels.h", "(sum4 + a4 * sum4_) + a8 * far_);", "(sum4 + a4 * sum4_) + a8 * near_);", RETURNS),
    Mutant("the transpose of a scan is the scan", "ops/scan.py", "cu_seqlens, not ctx.forward)", "cu_seqlens, ctx.forward)", SCAN),
    Mutant("the gradient of a decay from the other side", "ops/scan.py", "(y, dx) if ctx.forward else (dx, y)", "(dx, y) if ctx.forward else (y, dx)", SCAN),
    Mutant("segments of the first model for all", "rl/advantages.py", "[sum(counts[:k]) for k in range(len(counts))]", "[0 for k in range(len(counts))]", ADVANTAGES),
    Mutant("an advantage of 0 makes no pivot", "rl/advantages.py", "keep = ((signs >= 0)", "keep = ((signs > 0)", ADVANTAGES),
    Mutant("pivots first, but whitened with all", "rl/advantages.py", "weight = _pivots(plan, raw) if plan.pivots_first else None", "weight = None", ADVANTAGES),
    # reward models
    Mutant("the margin of a flipped pair keeps its sign", "losses/reward.py", "shift, sign = abs(shift),", "shift, sign = shift,", REWARD),
    Mutant("the margin relaxes", "losses/reward.py", "else scale * shift", "else -scale * shift", REWARD),
    Mutant("a pair of weight 0 is read", "losses/reward.py", "kept = weight != 0", "kept = weight == weight", REWARD),
    Mutant("smoothing of strong pairs too", "losses/reward.py", "smoothing * (strength < 0).to(dtype)", "smoothing * (strength == strength).to(dtype)", REWARD),
    Mutant("a soft label taken for its complement", "losses/reward.py", '1 - constant("label"', '0 + constant("label"', REWARD),
    Mutant("a pair that is not counted is not 0", "losses/reward.py", "torch.where(each == 0, 0, grad)", "grad + 0 * each", REWARD),
    Mutant("an interleaved gradient in halves", "losses/reward.py", 'if pairs == "halves" else', 'if pairs else', REWARD),
    Mutant("an infinity among constants is not seen", "losses/reward.py", "math.isfinite(x.sum().item())", "x.sum().item() == x.sum().item()", REWARD),
    Mutant("centering of the difference", "losses/reward.py", "both = chosen + rejected", "both = chosen - rejected", REWARD),
    Mutant("ties kept as pairs", "losses/pairs.py", "kept = up | down", "kept = up | ~up", REWARD),
    Mutant("the last token of the padding", "losses/pairs.py", "last = torch.searchsorted(kept, kept[bounds[1:]]) - 1", "last = bounds[1:] - 1", REWARD),
    Mutant("the margin of a flipped pair turned with it", "losses/reward.py", "shift if sign is None else sign * shift", "shift", REWARD),
    Mutant("the spread of a sample", "losses/strength.py", "vote = vote + (d > 0)", "vote, spread = vote + (d > 0), spread * (count / max(1, count - 1)) ** 0.5", STRENGTH),
    Mutant("ties counted as votes", "losses/strength.py", "vote + (d > 0)", "vote + (d >= 0)", STRENGTH),
    Mutant("the strongest pairs taken for the weakest", "losses/strength.py", "self.mean.argsort(stable=True)", "self.mean.argsort(stable=True, descending=True)", STRENGTH),
    Mutant("the command's page over a file it reads", "strength.py", "        if place in taken:", "        if place in taken and flag == '--out':", STRENGTH),
    Mutant("prototypes held to the dtype of widened differences", "losses/contrastive.py", "{first.dtype, torch.promote_types(first.dtype, torch.float32)}", "{torch.promote_types(first.dtype, torch.float32)}", CONTRASTIVE),
    Mutant("NaN logits taken for a class", "integrations/segment_rewards.py", "torch.where(scores.isnan().any(1), torch.nan, reward)", "torch.where(scores.isnan().all(0).all(), torch.nan, reward)", SEGMENT_REWARDS),
    Mutant("segments behind the length lost without a word", "integrations/segment_rewards.py", "        if lost:", "        if lost < 0:", SEGMENT_REWARDS),
    Mutant("the model's positions not looked at", "integrations/segment_rewards.py", "min(max_length, takes, tokenizer", "min(max_length, tokenizer", SEGMENT_REWARDS),
    Mutant("a negative count reverses a loss", "losses/reduce.py", "if value < 0 or value", "if value < -9 or value", SILENT),
    Mutant("offsets beyond the text", "feedback/records.py", "0 <= pair[0] <= pair[1] <= most", "0 <= pair[0] <= pair[1]", FEEDBACK),
    Mutant("NaN among a trainer's weights", "integrations/_trl_data.py", "or not math.isfinite(value)", "or False", TRL_DPO),
    Mutant("feedback that truncation cuts off", "integrations/_trl_data.py", "return any(x != outside for x in whole) and all(x == outside for x in kept)", "return False", TRL_DPO),
    Mutant("options of pivots first read half way through", "integrations/_trl_common.py", "        check_pivots(pivots)\n", "", TRL_DPO),
    Mutant("a shared parameter moves twice", "metarm.py", "self.parameters = list(each.values())", "self.parameters = [p for p in parameters if p.requires_grad]", METARM),
    Mutant("margins that scale makes infinite", "losses/reward.py", "        _check_scaled(shift, scale)\n", "        pass\n", REWARD),
    Mutant("weights of NaN taken", "feedback/records.py", "_is_number(value) and abs(value) <= LARGEST", "isinstance(value, (int, float)) and not abs(value) > LARGEST", FEEDBACK),
    Mutant("columns of chosen and rejected taken for tokens without a word", "losses/pairs.py", "    if bare and parts[0].shape[1:] == (2,)", "    if bare and parts[0].shape[1:] == (-2,)", SILENT),
    Mutant("margins of the command unscaled", "strength.py", "margin = options.scale * strength.mean", "margin = strength.mean", STRENGTH),
    Mutant("a norm that overflowed is infinite", "formulas/contrast.py", "torch.where(length == torch.inf, torch.nan, length)", "length", CONTRASTIVE),
    Mutant("an own key among the negatives", "ops/contrast.py", ".scatter_(1, own, -torch.inf)", "", CONTRASTIVE),
    Mutant("mirrored keys pull", "ops/contrast.py", "similar.sub_(minus)", "similar.add_(minus)", CONTRASTIVE),
    Mutant("a push along the key", "ops/contrast.py", "push.addcmul_((push * part).sum(1, keepdim=True), part, value=-1)", "push", CONTRASTIVE),
    Mutant("own keys of rank 0 on all ranks", "losses/contrastive.py", "start=sum(sizes[:rank])", "start=0", CONTRASTIVE),
    Mutant("a gather without the other ranks' gradient", "losses/contrastive.py", "dist.all_reduce(total, group=ctx.group)", "pass", CONTRASTIVE),
    Mutant("the last Sinkhorn step on prototypes", "formulas/contrast.py", "        log_q = log_q - over_ranks(log_q.logsumexp(0))\n        log_q = log_q - log_q.logsumexp(1, keepdim=True)", "        log_q = log_q - log_q.logsumexp(1, keepdim=True)\n        log_q = log_q - over_ranks(log_q.logsumexp(0))", CONTRASTIVE),
    Mutant("gradient through the codes", "losses/contrastive.py", "formula.sinkhorn(scores.detach(),", "formula.sinkhorn(scores,", CONTRASTIVE),
    Mutant("codes not swapped", "formulas/contrast.py", "zip(codes, (second, first), strict=True)", "zip(codes, (first, second), strict=True)", CONTRASTIVE),
    Mutant("Sinkhorn of a rank alone", "losses/contrastive.py", "return torch.stack(found).logsumexp(0)", "return lse", CONTRASTIVE),
    Mutant("classes at other tokens counted", "losses/segment_classes.py", "judged = labels != ignore_index", "judged = labels == labels", SEGMENT_REWARDS),
    Mutant("the separator of the segment before", "integrations/segment_rewards.py", "len(words) + 1 if self.placed", "0 if self.placed", SEGMENT_REWARDS),
    Mutant("a response's rewards at its neighbour's tokens", "integrations/segment_rewards.py", "ends += [start + t", "ends += [t", SEGMENT_REWARDS),
    Mutant("the strength column unread", "integrations/_trl_reward.py", 'needed = {"strength": "strength"} if row.reads(None, None) else {}', "needed = {}", TRL_REWARD),
    Mutant("contrast left out", "integrations/_trl_reward.py", "loss = loss + self.contrast_weight * contrast", "pass", TRL_REWARD),
    Mutant("MetaRM without its inner step", "integrations/_trl_reward.py", "        with self.meta.ascend(objective):\n            return", "        if True:\n            return", TRL_REWARD),
    Mutant("TRL's margin column unread", "integrations/_trl_reward.py", 'constants["margin"] = margin', "pass", TRL_REWARD),
    Mutant("each rank climbs by its own rows", "metarm.py", "found[i] /= dist.get_world_size(self.group)", "found[i] /= 1", METARM),
    Mutant("every rank takes the first part of the gradient", "metarm.py", "start = dist.get_rank(self.group) * part.numel()", "start = 0 * part.numel()", METARM),
    Mutant("a parameter that is kept whole stays behind", "metarm.py", "if p.data.numel() == push.numel() else held", "if False else held", METARM),
    Mutant("MetaRM descends", "metarm.py", "alpha=self.eta)", "alpha=-self.eta)", METARM),
    Mutant("parameters stay at the inner step", "metarm.py", "x.copy_(old)", "pass", METARM),
    Mutant("parameters restored by subtraction", "metarm.py", "x.copy_(old)", "x.sub_(x - old)", METARM),
    Mutant("gathered gradients enter the inner step", "metarm.py", "                p.grad = None\n", "                pass\n", METARM),
    Mutant("the number of pairs for k²", "metarm.py", "(2 / (max(1, m) * max(1, k) ** 2))", "(2 / (max(1, m) * max(1, k * (k - 1))))", METARM),
    Mutant("the slope of the floored loss", "formulas/margin.py", "-up * (-m).sigmoid() / (up + floor)", "-(-m).sigmoid()", REWARD),
    # the fused head
    Mutant("a graph that is traced asks for a capture", "ops/_check.py", "not torch.compiler.is_compiling() and torch.cuda", "torch.cuda", GPU),
    Mutant("fused head: one maximum of several", "kernels/_tiles.py", "tl.where(ties > 1, below + (ties - 1.0), below)", "below", HEAD),
    Mutant("fused head: a tile of banned tokens under their maximum", "kernels/_tiles.py", 'return tl.where(m == float("-inf"), 0.0, m)', "return m", HEAD),
    Mutant("fused head: a NaN that no sum sees", "kernels/_tiles.py", "below = tl.where(d >= 0, 0.0, e)", "below = tl.where(d < 0, e, 0.0)", HEAD),
    Mutant("fused head: the label of the last ragged tile", "kernels/linear_logprobs.py", "(target < tl.minimum(start + BLOCK_N, vocab))", "(target < tl.minimum(start + BLOCK_N, vocab - vocab % BLOCK_N))", HEAD),
    Mutant("fused head: no entropy where E is dropped", "kernels/linear_logprobs.py", "t += _fold(slanted, SUMS)", "t += _fold(slanted, SUMS) if e_rows is not None else 0.0", HEAD),
    Mutant("fused head: phantom columns", "kernels/linear_logprobs.py", "if start + BLOCK_N > vocab:", "if start > vocab:", HEAD),
    Mutant("fused head: T without its shift", "kernels/_combine.py", "(t_tile + d * one) * w", "t_tile * w", HEAD),
    Mutant("fused head: E at another column", "kernels/linear_logprobs.py", "rows * width + (start - c0)", "rows * width", HEAD),
    Mutant("fused head: last of ties", "kernels/linear_logprobs.py", "(z >= m) & ((above < m)", "(z >= m) & ((above <= m)", HEAD),
    Mutant("fused head: start lost from the count", "kernels/linear_logprobs.py", "tl.minimum(count - start, height)", "tl.minimum(count, height)", HEAD),
    Mutant("fused head: one row more from E", "kernels/linear_logprobs.py", "from_e = rows < kept", "from_e = rows <= kept", HEAD),
    Mutant("fused head: no slope at the label", "kernels/linear_logprobs.py", "tl.where(dx == 0, 0.0, dx * label_slope)", "dx", HEAD),
    Mutant("fused head: products again by the library", "ops/_fused.py", "again=again", "again=None", HEAD),
    Mutant("fused head: blocks of the first rows in backward", "ops/_fused.py", "x[rows], wc", "x[: stop - start], wc", HEAD),
    Mutant("fused head: every block overwrites dW", "ops/_fused.py", "add=block.start > 0", "add=False", HEAD),
    Mutant("fused head: near-uniform rows from E", "ops/_fused.py", "recompute = _chunked.unfit_for_e(coef, curved and e.dtype != torch.float32, bias, vocab)", "recompute = None", HEAD),
    Mutant("fused head: a count read on the host", "ops/_fused.py", "return Order(read.shape[0], _chunked.front(read, read), read.sum())", "return Order(read.shape[0], _chunked.front(read, read), torch.tensor(int(read.sum())))", HEAD),
    Mutant("fused head: a step past the width", "kernels/linear_logprobs.py", "x = tl.load(x_rows + ks.to(tl.int64) * x_stride_d, mask=ks < depth, other=0.0)", "x = tl.load(x_rows + ks.to(tl.int64) * x_stride_d)", HEAD),
    Mutant("fused head: a maximum that starts at 0", "kernels/linear_logprobs.py", 'tl.where(top == top, top, float("-inf"))', "tl.maximum(top, 0.0)", HEAD),
    Mutant("fused head: the last group as high as others", "kernels/linear_logprobs.py", "height = tl.minimum(row_tiles - first, GROUP)", "height = GROUP", HEAD),
    Mutant("fused head: slim tiles of other columns", "kernels/linear_logprobs.py", "tile._replace(rows=min(tile.rows, 64),", "tile._replace(columns=min(tile.columns, 8), rows=min(tile.rows, 64),", HEAD),
    Mutant("fused head: float32 by descriptors", "kernels/linear_logprobs.py", "arch in TMA and weight.dtype != torch.float32", "arch in TMA", HEAD),
    Mutant("fused head: every output by a tile of other columns", "kernels/linear_logprobs.py", "want == every and small.columns == tile.columns", "want == every", HEAD),
    Mutant("fused head: wide tiles for odd heads", "ops/_fused.py", "tile if by_blocks else kernels.by_pointers(weight, tile)", "tile", HEAD),
    Mutant("fused head: E by the first tile's maximum", "kernels/linear_logprobs.py", "place * e_max_stride + tile,", "place * e_max_stride,", HEAD),
    Mutant("fused head: E without the sum", "kernels/linear_logprobs.py", "tl.where(from_e, (top - m) - l, -l)", "tl.where(from_e, top - m, -l)", HEAD),
]  # fmt: skip


def sh(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def install(target: Path) -> None:
    """A copy of the package with its extension, importable before the installed one."""
    shutil.copytree(
        ROOT / "finealign_kernels", target / "finealign_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        ROOT / "kernels/triton", target / "finealign_kernels/kernels", ignore=shutil.ignore_patterns("__pycache__")
    )


def rebuild(sources: Path, target: Path) -> None:
    built = sh(
        sys.executable, "setup.py", "build_ext", "--inplace", cwd=sources, env={**os.environ, "FINEALIGN_CUDA": "off"}
    )
    if built.returncode:
        raise RuntimeError(built.stdout[-2000:] + built.stderr[-2000:])
    shutil.copy(sources / "finealign_kernels/_C.abi3.so", target / "finealign_kernels/_C.abi3.so")


CRASHES = -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT  # of an address outside of a tensor, say


def caught(mutant: Mutant, site: Path, sources: Path) -> bool:
    native = mutant.path.startswith(NATIVE)
    path = sources / mutant.path if native else site / "finealign_kernels" / mutant.path
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.what}: its text stands {text.count(mutant.old)} times in {mutant.path}")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if native:
            rebuild(sources, site)
        env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "FINEALIGN_REQUIRE_NATIVE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
        command += (
            [] if mutant.tests in (TRITON, HEAD, LAUNCH) or "Triton" in mutant.what else ["-k", "not triton"]
        )  # its interpreter is slow, and its rows are there
        run = sh(*command, cwd=ROOT, env=env, timeout=1200)
        if run.returncode not in (0, 1, 2, *CRASHES):
            raise RuntimeError(run.stdout[-2000:] + run.stderr[-2000:])
        return run.returncode != 0
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose description or path contains this")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only.lower() in f"{m.what} {m.path}".lower()]
    if args.list:
        print("\n".join(f"{m.path}: {m.what}" for m in chosen))
        return 0
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        site, sources = Path(folder) / "site", Path(folder) / "sources"
        install(site)
        if any(mutant.path.startswith(NATIVE) for mutant in chosen):
            shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.so"))
            rebuild(sources, site)
        pristine = shutil.copy(site / "finealign_kernels/_C.abi3.so", Path(folder) / "pristine.so")
        for count, mutant in enumerate(chosen, 1):
            found = caught(mutant, site, sources)
            if mutant.path.startswith(NATIVE):
                shutil.copy(pristine, site / "finealign_kernels/_C.abi3.so")
            alive += [] if found else [mutant]
            print(
                f"{count:3}/{len(chosen)} {'caught  ' if found else 'SURVIVED'} {mutant.path}: {mutant.what}",
                flush=True,
            )
    print(f"mutation score {len(chosen) - len(alive)}/{len(chosen)}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
