"""How many replicas a model has, when one is added or taken away, and how much waits for them."""

import math
from typing import Any

from cluster.plan import ServingPlan
from serve_apps.args import ModelArgs

TARGET_SHARE = 0.75
"""Of a batch that is full on average: another replica is asked for while the ones there can still take a quarter more,
because weights take longer to load than clients like to wait."""
ONGOING_SHARE = 1.5
"""Requests at a replica, per place in its batch: half a batch waits there to take the places of answers that end before
the router looks again; the rest waits in the ingress, where it can still go to a replica that has just started."""
MAX_BACKOFF_S = 0.05
"""After which time at most the router looks at a full replica again. With Serve's own 0.5 s, replicas stood empty: 256
streams of a model of two layers were let in at 7 a second, so at 40."""
UPSCALE_DELAY_S = 10.0
"""A third of Serve's own: the mean over `look_back_period_s` (30 s) has smoothed the load already."""
DOWNSCALE_DELAY_S = 300.0
"""Half of Serve's own; still longer than any model here takes to load again."""
DRAIN_TIMEOUT_S = 600.0
"""How long a replica that is taken away may finish its answers; Serve's own 20 s would cut long ones off."""
CHECK_PERIOD_S = 2.0
"""A fifth of Serve's own: a replica that died is made anew when a check finds it gone."""
FULL_QUEUE_STATUS = 429
RETRY_AFTER_S = 5
"""When to ask again: a replica that is being loaded, or a full queue, may well have room by then."""


def deployment_options(plan: ServingPlan, wish: ModelArgs) -> dict[str, Any]:
    """Return Serve's options that decide the number of replicas and the bounds of what they take at a time.

    Ray Serve LLM's own are a target and a bound of 1e9 requests, with which nothing ever scales.
    """
    return _replicas(plan, wish) | {
        "max_ongoing_requests": math.ceil(ONGOING_SHARE * plan.max_num_seqs),
        "max_queued_requests": wish.max_queued_requests,
        "backpressure_config": {"status_code": FULL_QUEUE_STATUS, "retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "health_check_period_s": CHECK_PERIOD_S,
        "request_router_config": {"max_backoff_s": MAX_BACKOFF_S},
    }


def max_replicas(plan: ServingPlan, wish: ModelArgs) -> int:
    """Return the upper bound: the wish, or what one node of the planned kind holds."""
    if wish.num_replicas is not None:
        return wish.num_replicas
    return wish.max_replicas or max(wish.min_replicas or 1, plan.replicas_per_node)


def _replicas(plan: ServingPlan, wish: ModelArgs) -> dict[str, Any]:
    low = 1 if wish.min_replicas is None else wish.min_replicas
    high = max_replicas(plan, wish)
    if wish.num_replicas is not None or low == high:
        return {"num_replicas": high}
    config = {
        "min_replicas": low,
        "max_replicas": high,
        "target_ongoing_requests": max(1, math.floor(TARGET_SHARE * plan.max_num_seqs)),
        "upscale_delay_s": UPSCALE_DELAY_S,
        "downscale_delay_s": DOWNSCALE_DELAY_S,
    }
    return {"autoscaling_config": config}
