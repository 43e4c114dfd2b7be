"""prime-rl 0.8: policy losses of this library by its custom loss, with prime-rl's own token weights.

    [trainer.loss]
    type = "custom"
    import_path = "finealign_kernels.integrations.prime_rl.loss"
    kwargs = { name = "cispo", low = 0.0, high = 5.0 }

    here                     prime-rl's own
    ppo, gspo_token, cispo,  none. Its "default" is a policy gradient with a ratio, tokens masked by the difference of
    sapo, reinforce          their probabilities (DPPO), and a squared log-ratio: kl_coef = 2 kl_tau with kl = "k2",
                             reference = "sampler" here
    token_weight             loss_weights, the stream of the rl component; 0 leaves prime-rl's count of tokens

prime-rl hands over one sample at a time and wants a sum, which it divides by the tokens of the whole step: no reduction
by responses. old_logp are the sampler's log-probs. Its "ce" and "ref_kl" components are not touched.
"""

import importlib
from functools import cache

from ..losses.policy import policy_loss
from ..ops._check import check_one_of, fail
from ._token_losses import LOSSES
from ._versions import check_version

VERSIONS = ("0.8",)  # of prime-rl, that this adapter was written for and tested with
LOSS = "prime_rl.trainer.rl.loss"


@cache
def _prime_rl():
    check_version("prime-rl", VERSIONS)
    return importlib.import_module(LOSS)


def loss(inputs, name: str = "ppo", kl_coef: float = 0.0, reference: str = "ref", **options):
    """The loss of one sample, a sum over its tokens, as prime-rl's LossOutputs.

    inputs     prime-rl's LossInputs
    name       "ppo", "gspo_token", "cispo", "sapo", "reinforce"
    kl_coef    β of the KL to the reference, which token weights leave alone; kl, low, high, dual, tau_pos and tau_neg
               as in policy_loss
    reference  "ref": inputs.ref_logprobs; "sampler": inputs.inference_logprobs

    Raises  ValueError, TypeError as policy_loss; RuntimeError for another version of prime-rl.
    """
    prime_rl = _prime_rl()
    check_one_of("name", name, LOSSES)
    check_one_of("reference", reference, ("ref", "sampler"))
    for option in ("reduction", "denominator", "average", "max_length", "count_empty"):
        if option in options:
            fail(option, "be left to prime-rl, which divides by the tokens of the step", options[option])
    sampler, weight = inputs.inference_logprobs[None], inputs.loss_weights
    to = inputs.ref_logprobs if reference == "ref" else inputs.inference_logprobs
    if kl_coef and to is None:
        fail("ref_logprobs", f"be there for kl_coef = {kl_coef}: prime-rl has no reference model here", None)
    out = policy_loss(
        name,
        inputs.trainer_logprobs[None],
        sampler,
        inputs.advantages[None],
        mask=inputs.loss_mask[None],
        ref_logp=to[None] if kl_coef else None,
        token_weight=None if weight is None else weight[None],
        reduction="token_global",
        denominator=1,
        kl_coef=kl_coef,
        **options,
    )
    metrics = {"clip_low": out.clip_fraction_low, "clip_high": out.clip_fraction_high, "ratio": out.ratio}
    return prime_rl.LossOutputs(loss=out.loss, metrics=metrics | {"sampler_kl": out.old_kl})
