"""Tables for people: the catalog, and one plan."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from cluster.hardware import Hardware
from cluster.model_card import ModelCard
from cluster.plan import ServingPlan, TrainingPlan


def models_table(cards: Sequence[ModelCard], hardware: Hardware) -> Table:
    """Return one row per model, and whether it fits on `hardware`."""
    raise NotImplementedError


def plan_table(plan: ServingPlan | TrainingPlan) -> Group:
    """Return the plan's numbers, its memory as a table that adds up, its reasons and warnings."""
    raise NotImplementedError
