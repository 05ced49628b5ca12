"""What Serve is told to start, against what Ray Serve LLM's own builder makes of the same plan."""

import subprocess
import sys

import pytest
from ray.serve.llm import build_llm_deployment

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import plan_serving
from serve_apps.args import ModelArgs
from serve_apps.llm_configs import llm_config_of
from serve_apps.replicas import ModelReplica, model_deployment

HEAVY = ("torch", "transformers", "vllm", "ray.llm")


def test_building_an_application_imports_nothing_that_only_replicas_need() -> None:
    code = f"import sys, serve_apps.app; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "wish",
    [
        ModelArgs(model="qwen2.5-14b-instruct", num_replicas=2),
        ModelArgs(model="qwen2.5-14b-instruct", min_replicas=0, max_replicas=3),
    ],
)
def test_a_model_is_deployed_as_rays_builder_would(wish: ModelArgs) -> None:
    plan = plan_serving(find(wish.model), declared(gpu="A100-80G", num_gpus=1), engine="transformers")
    ours = model_deployment(plan, wish)._bound_deployment
    rays = build_llm_deployment(llm_config_of(plan, wish))._bound_deployment
    assert ours.name == rays.name
    assert ours.ray_actor_options == rays.ray_actor_options
    ignored = {"user_configured_option_names"}
    assert ours._deployment_config.model_dump(exclude=ignored) == rays._deployment_config.model_dump(exclude=ignored)


def test_a_replica_has_the_methods_of_its_server_once_that_is_made() -> None:
    replica = ModelReplica.__new__(ModelReplica)
    assert not hasattr(replica, "chat")
    replica._server = pytest  # type: ignore[assignment]
    assert replica.raises is pytest.raises
    assert not hasattr(replica, "chat")
