import itertools
import math
import subprocess

import pytest
from pydantic import ValidationError

from cluster.alias import Alias, Canary, percentile

USERS = [f"user-{i}" for i in range(10_000)]


def of_candidate(percent: float, *, version: int = 2) -> set[str]:
    alias = Alias(version=1, canary=Canary(version=version, percent=percent))
    return {user for user in USERS if alias.version_for("tiny:shop", user) == version}


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_a_canary_gets_its_share_of_the_users(percent: float) -> None:
    # Binomial: a fair draw of 10,000 stays within 4 deviations in 15,999 of 16,000 cases.
    expected, deviation = 100 * percent, math.sqrt(10_000 * percent / 100 * (1 - percent / 100))
    assert abs(len(of_candidate(percent)) - expected) < 4 * deviation


def test_a_larger_percentage_only_moves_users_to_the_candidate() -> None:
    shares = [of_candidate(percent) for percent in (0.5, 5, 10, 30, 100)]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller < larger
    assert shares[-1] == set(USERS)


def test_a_user_stays_on_one_side() -> None:
    assert of_candidate(10) == of_candidate(10)


def test_another_candidate_is_tried_on_other_users() -> None:
    # of two independent tenths, a tenth is common: 100 of 10,000, deviation 10
    assert abs(len(of_candidate(10) & of_candidate(10, version=3)) - 100) < 4 * 10


def test_places_are_those_of_sha256() -> None:
    said = subprocess.run(["sha256sum"], input=b"tiny:shop@2\0user-7", capture_output=True, check=True).stdout
    assert percentile("tiny:shop@2", "user-7") == pytest.approx(100 * int(said[:16], 16) / 2**64)


def test_promoting_the_candidate_ends_the_canary_and_can_be_rolled_back() -> None:
    trying = Alias(version=1, canary=Canary(version=2, percent=10), is_pinned=True)
    promoted = trying.promoted(2)
    assert promoted == Alias(version=2, previous=(1,), is_pinned=True)
    assert promoted.rolled_back() == Alias(version=1, is_pinned=True)


def test_promoting_what_is_current_ends_the_canary_and_adds_no_step() -> None:
    assert Alias(version=1, canary=Canary(version=2, percent=10)).promoted(1) == Alias(version=1)


def test_a_rollback_takes_the_canary_first() -> None:
    trying = Alias(version=2, previous=(1,), canary=Canary(version=3, percent=10))
    dropped = trying.rolled_back()
    assert dropped == Alias(version=2, previous=(1,))
    assert dropped.rolled_back() == Alias(version=1)
    assert Alias(version=1).rolled_back() is None


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan")])
def test_a_share_is_more_than_nothing_and_at_most_all(percent: float) -> None:
    with pytest.raises(ValidationError):
        Canary(version=2, percent=percent)


def test_an_alias_written_before_there_were_canaries_is_read() -> None:
    assert Alias.model_validate_json('{"version": 2, "previous": [1]}') == Alias(version=2, previous=(1,))
