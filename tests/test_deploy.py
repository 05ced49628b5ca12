"""What `kajiya up` asks of Ray Serve."""

from typing import Any

import pytest

from serve_apps import deploy as module
from serve_apps.args import ServeArgs
from serve_apps.deploy import APP_NAME, DeployFailed, deploy

OTHER = {"name": "other", "import_path": "theirs:app"}


class Serve:
    """Does what Ray Serve does: what failed stays failed while the same is asked for."""

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.applications: dict[str, Any] = {"other": {"status": "RUNNING", "deployed_app_config": OTHER}}

    def __call__(self, dashboard_url: str) -> "Serve":
        del dashboard_url
        return self

    def get_serve_details(self) -> dict[str, Any]:
        return {"applications": self.applications}

    def deploy_applications(self, config: dict[str, Any]) -> None:
        asked = {app["name"]: app for app in config["applications"]}
        self.applications = {name: app for name, app in self.applications.items() if name in asked}
        status = {"status": "RUNNING"} if self.works else {"status": "DEPLOY_FAILED", "message": "The disk is full."}
        for name, app in asked.items():
            self.applications.setdefault(name, {**status, "deployed_app_config": app})


def test_what_did_not_come_up_is_tried_again_and_nobody_elses_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(works=False)
    monkeypatch.setattr(module, "ServeSubmissionClient", serve)

    def up() -> None:
        args = ServeArgs.model_validate({"models": ["smollm2-135m-instruct"]})
        deploy("http://127.0.0.1:8265", args, port=8000, timeout_s=5, on_status=lambda _: None)

    with pytest.raises(DeployFailed, match="The disk is full"):
        up()
    others = serve.applications["other"]
    serve.works = True
    up()
    assert serve.applications[APP_NAME]["status"] == "RUNNING"
    assert serve.applications["other"] is others
