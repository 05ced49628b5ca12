import pytest

from serve_apps.quotas import Bucket, Quota
from serve_apps.refusals import Refusal


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def quota(clock: Clock, *, requests: int | None = None, tokens: int | None = None) -> Quota:
    return Quota(
        requests=Bucket(requests, clock) if requests else None, tokens=Bucket(tokens, clock) if tokens else None
    )


def test_a_minutes_requests_may_come_at_once_and_the_next_when_one_has_flowed_in(clock: Clock) -> None:
    limited = quota(clock, requests=6)  # one in 10 s
    for _ in range(6):
        limited.admit()
    with pytest.raises(Refusal) as refused:
        limited.admit()
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after_s == 10
    clock.now_s += 7.5
    with pytest.raises(Refusal) as refused:
        limited.admit()
    assert refused.value.retry_after_s == 3  # 2.5 s, and a whole number that is long enough
    clock.now_s += 2.5
    limited.admit()


def test_a_refused_request_costs_nothing_and_a_full_bucket_does_not_flow_over(clock: Clock) -> None:
    limited = quota(clock, requests=2)
    clock.now_s += 3600
    limited.admit()
    limited.admit()
    for _ in range(5):
        with pytest.raises(Refusal):
            limited.admit()
    clock.now_s += 30
    limited.admit()


def test_tokens_are_reserved_first_and_settled_last(clock: Clock) -> None:
    limited = quota(clock, tokens=600)  # ten a second
    assert limited.reserve(400) == 400
    with pytest.raises(Refusal) as refused:
        limited.reserve(400)  # 200 are left, 200 more take 20 s
    assert refused.value.retry_after_s == 20
    limited.settle(reserved=400, used=100)  # 500 are left
    assert limited.reserve(400) == 400
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "100"


def test_what_may_exceed_a_minutes_worth_waits_for_a_full_bucket_and_is_paid_back(clock: Clock) -> None:
    limited = quota(clock, tokens=600)
    assert limited.reserve(10_000) == 600
    limited.settle(reserved=600, used=1200)  # 600 more than there were
    with pytest.raises(Refusal) as refused:
        limited.admit()
    assert refused.value.retry_after_s == 61  # 60 s up to zero, and 0.1 s to the first token
    clock.now_s += 60.1
    limited.admit()
    with pytest.raises(Refusal) as refused:
        limited.reserve(10_000)
    assert refused.value.retry_after_s == 60  # 1 of 600 is there


def test_headers_say_limits_what_is_left_and_when_it_is_full_again(clock: Clock) -> None:
    limited = quota(clock, requests=60, tokens=600)
    limited.admit()
    limited.reserve(150)
    assert limited.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15.000s",
    }


def test_a_key_without_limits_is_never_refused_and_has_no_headers(clock: Clock) -> None:
    free = quota(clock)
    for _ in range(1000):
        free.admit()
    assert free.reserve(10**9) == 0
    assert free.headers() == {}
