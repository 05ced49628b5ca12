"""Products by oneDNN beside those of float64, and what does not go there."""

import pytest
import torch
from torch.nn import functional

from cluster.models import products


@pytest.mark.parametrize(("num_rows", "d", "o"), [(1, 576, 192), (37, 192, 576), (300, 576, 1536)])
def test_products_are_those_of_float64_but_for_rounding(num_rows: int, d: int, o: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator) for shape in ((num_rows, d), (o, d), (o,), (num_rows, o))
    )
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(products.linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-4)
    exact = grad.double() @ weight.double()
    torch.testing.assert_close(products.times(grad, weight).double(), exact, rtol=1e-5, atol=1e-4)


def test_rows_and_weights_may_lie_apart() -> None:
    x, weight = torch.randn(40, 200)[::2, :64], torch.randn(64, 48).T
    torch.testing.assert_close(products.linear(x, weight), functional.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_stay_with_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(products.linear(x, weight), functional.linear(x, weight))


def test_no_rows_make_no_product() -> None:
    assert products.linear(torch.empty(0, 8), torch.randn(4, 8)).shape == (0, 4)
