"""The one door to planning: facts about a model and a machine in, a frozen plan with reasons out."""

from cluster.memory import DoesNotFit, MemoryItem, MemoryTable
from cluster.plan_engine import Engine
from cluster.plan_serving import ServingPlan, plan_serving
from cluster.plan_training import TrainingPlan, plan_training
from cluster.presets import Decision, DType, Method, Strategy
from cluster.training_wishes import BadOverride
from cluster.traps import ImpossibleCombination

__all__ = [
    "BadOverride",
    "DType",
    "Decision",
    "DoesNotFit",
    "Engine",
    "ImpossibleCombination",
    "MemoryItem",
    "MemoryTable",
    "Method",
    "ServingPlan",
    "Strategy",
    "TrainingPlan",
    "plan_serving",
    "plan_training",
]
