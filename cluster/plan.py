"""The one door to planning: facts about a model and a machine in, a frozen plan with reasons out."""

from cluster.memory import DoesNotFit, MemoryItem, MemoryTable
from cluster.plan_serving import DType, Engine, ServingPlan, plan_serving
from cluster.plan_training import Method, Strategy, TrainingPlan, plan_training
from cluster.presets import Decision

__all__ = [
    "DType",
    "Decision",
    "DoesNotFit",
    "Engine",
    "MemoryItem",
    "MemoryTable",
    "Method",
    "ServingPlan",
    "Strategy",
    "TrainingPlan",
    "plan_serving",
    "plan_training",
]
