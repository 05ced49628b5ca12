"""How much each field of a space matters to the objective."""

from collections.abc import Sequence
from typing import Any

from ray.tune import Result

from tune_spaces.objectives import badness


def importances(trials: Sequence[Result], objectives: Sequence[str]) -> dict[str, float]:
    """Return each field's share by PED-ANOVA (arXiv:2304.10255), as Optuna computes it; nothing for few trials."""
    varied = [field for field in trials[0].config if len(values_of(trials, field)) > 1] if trials else []
    if len(trials) < 4 or len(varied) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    distributions = {field: _distribution(optuna, values_of(trials, field)) for field in varied}
    for result in trials:
        params = {field: result.config[field] for field in varied}
        value = badness(objectives, result.metrics)[0]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=True)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def values_of(trials: Sequence[Result], field: str) -> list[Any]:
    """Return the values of a field that were tried, in their order."""
    return sorted({result.config[field] for result in trials if field in result.config})


def _distribution(optuna: Any, values: list[Any]) -> Any:
    if all(isinstance(value, float) for value in values):
        return optuna.distributions.FloatDistribution(values[0], values[-1], log=values[0] > 0)
    return optuna.distributions.CategoricalDistribution(values)
