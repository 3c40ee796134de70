"""What the metrics of a run are alarming for: said by the run as it happens, once each, and by the page of the run.

docs/reliability.md has them in its table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST_MISMATCH = 0.02  # of |learner's - sampler's log-prob|, the mean over a step's tokens, in nats
LEAST_ENTROPY = 1e-3  # nats a token, below which the policy has all but one response to a prompt
MOST_TRUNCATED = 0.5  # share of responses that are cut at the length limit
STUCK = 5  # steps in a row whose responses all had one reward


def of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """{name: sentence without its end} for the last of these rows.

    rows: of metrics.jsonl, one after the other; the last STUCK are enough. A metric that is missing is well, one that is None
    was not finite. settings: the run's config.json; what is missing there is off.
    """
    row, found = rows[-1], {}
    rollout, update = settings.get("rollout", {}), settings.get("update", {})
    gap = row.get("rollout/logp_mismatch", 0.0)
    if (gap is None or not gap <= MOST_MISMATCH) and not update.get("recompute_old_logp"):  # nan too
        gap = math.nan if gap is None else gap
        found["mismatch"] = (
            f"the log-probs of sampler and learner differ by {gap:.3f} nats a token on average (alarm at {MOST_MISMATCH}); try "
            "--learner.attention tiles, or, in a new run, --update.recompute_old_logp"
        )
    if len(rows) >= STUCK and all(one.get("reward/std") == 0 for one in rows[-STUCK:]):
        mean = row.get("reward/mean", 0.0)
        found["stuck"] = f"all responses of {STUCK} steps had the reward {mean:.3g}, so they teach nothing; " + (
            "the data holds nothing more to learn"
            if mean >= 1
            else "see reason/* in the metrics, and docs/training.md, section 3"
        )
    entropy = row.get("entropy/mean")
    if entropy is not None and entropy < LEAST_ENTROPY:
        found["entropy"] = (
            f"the entropy has fallen to {entropy:.2g} nats a token (alarm at {LEAST_ENTROPY}): nothing is tried any more; in a "
            "new run take a lower --optimizer.learning_rate, --loss.clip_high 0.28 or --loss.entropy_coefficient 1e-3"
        )
    cut = row.get("response_tokens/truncated_share") or 0.0
    if cut >= MOST_TRUNCATED:
        found["length"] = (
            f"{cut:.0%} of the responses were cut at the length limit (alarm at {MOST_TRUNCATED:.0%}), and a cut one is seldom "
            "right; look at some in rollouts.jsonl, and raise --rollout.max_response_tokens in a new run"
        )
    wanted = rollout.get("prompts_per_step", 0)
    if rollout.get("refills") and (learned := row.get("learner/prompts", wanted)) < wanted:
        found["refills"] = (
            f"of {row.get('rollout/prompts', wanted):,} prompts {learned:,} have responses of different reward, and it learned "
            "from these; the data is too hard or too easy for this model (see groups/zero_variance), or raise "
            "--rollout.refills or --rollout.group_size"
        )
    return found
