import re

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from cluster.catalog import find
from cluster.catalog_rows import ROWS
from cluster.hardware import declared
from cluster.plan import ServingPlan, TrainingPlan, plan_serving, plan_training
from cluster.tables import models_table, plan_table

A10G = declared(gpu="A10G")


def printed(renderable: RenderableType) -> str:
    console = Console(width=100, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_catalog_shows_every_model_with_its_notes_at_100_columns() -> None:
    text = printed(models_table(ROWS, A10G))
    assert all(cell_len(line) <= 100 for line in text.splitlines())
    for card in ROWS:
        assert card.name in text
        for note in card.notes_ja:
            assert note in text


def test_a_row_sets_the_computed_weights_beside_the_specifications_label() -> None:
    lines = printed(models_table(ROWS, A10G)).splitlines()
    row = next(line for line in lines if line.startswith("qwen2.5-14b-instruct"))
    # int8: 16.34e9 bytes = 15.2 GiB; the specification says 14 GB
    assert re.search(r"14\.8 B +32,768 +transformers +15\.2 +14 +yes", row)
    row = next(line for line in lines if line.startswith("phi-3.5-moe-instruct"))
    assert re.search(r"41\.9 B +131,072 +- +78\.0 +32 +no", row)
    row = next(line for line in lines if line.startswith("smollm2"))
    assert re.search(r"135 M +8,192 +transformers +0\.5 +- +yes, 4x", row)


@pytest.mark.parametrize(
    "plan",
    [
        plan_serving(find("qwen2.5-14b-instruct"), A10G),
        plan_training(find("llama-3.1-70b-instruct"), declared(gpu="A100-40G")),
        plan_training(find("smollm2-135m-instruct"), declared(gpu=None, num_cpus=2)),
    ],
    ids=["serving", "offloaded training", "training on a CPU"],
)
def test_a_plan_shows_numbers_that_add_up_reasons_and_warnings(plan: ServingPlan | TrainingPlan) -> None:
    text = printed(plan_table(plan))
    assert all(cell_len(line) <= 100 for line in text.splitlines())
    tables = re.findall(r"what it is\s*\n(.*?)\navailable", text, re.DOTALL)
    assert tables
    for table in tables:
        *parts, total = [float(re.search(r" (\d+\.\d\d) ", line + " ").group(1)) for line in table.splitlines()]  # type: ignore[union-attr]  # a number is in every line
        assert sum(parts) == pytest.approx(total, abs=1e-6)
    for decision in plan.decisions:
        assert decision.field in text
    flat = re.sub(r"\s+", " ", text)
    for warning in plan.warnings:
        assert f"! {warning}" in flat
