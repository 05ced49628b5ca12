"""Where the tokens of samples lie in the products of a pass, by hand."""

import torch

from cluster.models.sample_groups import Groups, group_samples

CPU = torch.device("cpu")


def own(rows: torch.Tensor, groups: Groups, first: int, last: int) -> list[int]:
    """Return what of `rows` belongs to the tokens from `first` to `last`."""
    return rows[groups.tokens[first : last + 1]].tolist()


def test_samples_of_nearly_one_length_are_one_product_and_each_token_has_its_place() -> None:
    groups = group_samples((3, 17, 16), (None, None, None), masked_keys=512, device=CPU)
    assert groups.shapes == ((2, 16, 16), (1, 32, 32))
    assert groups.keys.tolist() == [0, 1, *[2] * 14, *range(20, 36), *range(3, 20), *[19] * 15]
    assert groups.queries.tolist() == groups.keys.tolist()
    assert groups.tokens.tolist() == [0, 1, 2, *range(32, 49), *range(16, 32)]
    queries, _ = groups.split_queries(groups.queries)
    assert queries[1].tolist() == list(range(20, 36))


def test_a_sample_sees_the_one_it_goes_on_from() -> None:
    groups = group_samples((2, 4, 15), (None, 0, 0), masked_keys=512, device=CPU)
    assert groups.shapes == ((1, 16, 16), (2, 16, 18))
    _, keys = groups.split_keys(groups.keys)
    assert keys.tolist() == [[0, 1, 2, 3, 4, *[5] * 13], [0, 1, *range(6, 21), 20]]
    assert own(groups.queries, groups, 2, 5) == [2, 3, 4, 5]


def test_beyond_the_mask_the_one_before_is_computed_along_but_stays_in_its_own_place() -> None:
    groups = group_samples((2, 4), (None, 0), masked_keys=17, device=CPU)
    assert groups.shapes == ((1, 16, 16), (1, 18, 18))
    assert groups.tokens.tolist() == [0, 1, 18, 19, 20, 21]
