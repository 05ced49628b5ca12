import pytest

from cluster.scopes import BadScope, Scopes, parse_scopes


def test_without_a_scope_everything_may_be_used() -> None:
    everything = parse_scopes([])
    assert everything.allow_model("m")
    assert everything.allow_adapter("m", "shop", 3)


def test_each_scope_grants_what_it_names_and_nothing_beside() -> None:
    base = parse_scopes(["models:m"])
    assert base.allow_model("m")
    assert not base.allow_model("m2")
    assert not base.allow_adapter("m", "shop", 1)
    adapter = parse_scopes(["adapters:m:shop"])
    assert adapter.allow_adapter("m", "shop", 1)
    assert adapter.allow_adapter("m", "shop", 2)
    assert not adapter.allow_model("m")
    assert not adapter.allow_adapter("m", "shopping", 1)
    assert not adapter.allow_adapter("n", "shop", 1)


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("m:*", ("m", "shop", 1), ("m2", "shop", 1)),
        ("*:shop", ("m2", "shop", 1), ("m", "poet", 1)),
        ("m:shop@1", ("m", "shop", 1), ("m", "shop", 11)),
        ("m:s*p", ("m", "shop", 7), ("m", "shops", 7)),
        ("m.1:shop", ("m.1", "shop", 1), ("mx1", "shop", 1)),  # a dot is a dot
    ],
)
def test_patterns(pattern: str, allowed: tuple[str, str, int], refused: tuple[str, str, int]) -> None:
    scopes = parse_scopes([f"adapters:{pattern}"])
    assert scopes.allow_adapter(*allowed)
    assert not scopes.allow_adapter(*refused)


def test_a_star_does_not_leave_its_part() -> None:
    assert not Scopes(models=("*",), adapters=()).allow_adapter("m", "shop", 1)
    assert not Scopes(models=("*",), adapters=()).allow_model("m:shop")
    assert not Scopes(models=(), adapters=("*shop:*",)).allow_adapter("m:shop", "x", 1)


def test_what_may_not_be_used_is_not_known() -> None:
    scopes = parse_scopes(["adapters:m:shop@2", "models:n"])
    assert scopes.may_know("m")  # its adapter says so
    assert scopes.may_know("n")
    assert not scopes.may_know("o")
    assert scopes.may_know("m", "shop")
    assert not scopes.may_know("m", "poet")
    assert not scopes.may_know("n", "shop")


def test_several_names_in_one_scope() -> None:
    scopes = parse_scopes(["models:a,b", "models:c", "adapters:a:x, b:y@2"])
    assert scopes == Scopes(models=("a", "b", "c"), adapters=("a:x", "b:y@2"))


@pytest.mark.parametrize(
    "word",
    ["models", "models:", "admin", "Models:m", "models:m:shop", "models:m@1", "adapters:m", "adapters:m:"],
)
def test_a_word_that_grants_nothing_is_refused(word: str) -> None:
    with pytest.raises(BadScope):
        parse_scopes([word])


@pytest.mark.parametrize("word", ["adapters::shop", "adapters:m:a:b", "models:a,,b", "adapters:*,m"])
def test_a_pattern_that_names_nothing_is_refused(word: str) -> None:
    with pytest.raises(BadScope, match="names nothing"):
        parse_scopes([word])
