"""Put the application on a running cluster through Ray's REST interface, beside whatever else is served there."""

import time
from collections.abc import Callable
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster.errors import UserError
from serve_apps.args import ServeArgs

APP_NAME = "kajiya"
IMPORT_PATH = "serve_apps.app:build"
POLL_S = 0.5


class DeployFailed(UserError, RuntimeError):
    """The application did not come up; the message is Ray Serve's."""


def deploy(
    dashboard_url: str,
    args: ServeArgs,
    *,
    port: int,
    timeout_s: float,
    on_status: Callable[[str], None],
    host: str = "127.0.0.1",
) -> None:
    """Deploy `args` and return once the application answers.

    At `host` and `port`, through Serve's proxy and where Serve does not listen elsewhere already; where `args` have a
    port of their own, the ingress listens there, and there is no proxy.

    Raises:
        DeployFailed: Serve gave up, or `timeout_s` passed.
    """
    client = ServeSubmissionClient(dashboard_url)
    deadline_s = time.monotonic() + timeout_s
    _clear_failed(client, deadline_s)
    app = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args.model_dump(mode="json", exclude_none=True),
    }
    client.deploy_applications(
        {
            "http_options": {"host": host, "port": port},
            "proxy_location": "Disabled" if args.port else "HeadOnly",
            "applications": [*_others(client), app],
        }
    )
    while time.monotonic() < deadline_s:
        status = _status(client)
        if status.get("status") == "RUNNING":
            return
        if status.get("status") in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise DeployFailed(_reason(status))
        on_status(_progress(status))
        time.sleep(POLL_S)
    raise DeployFailed(f"The application did not come up within {timeout_s:.0f} s; see {dashboard_url}/#/serve.")


def undeploy(dashboard_url: str) -> None:
    """Remove our application and leave the others."""
    client = ServeSubmissionClient(dashboard_url)
    client.deploy_applications({"applications": _others(client)})


def served_args(dashboard_url: str) -> dict[str, Any]:
    """Return the args of the running application as they were given; nothing where there is none."""
    config = _status(ServeSubmissionClient(dashboard_url)).get("deployed_app_config") or {}
    args: dict[str, Any] = config.get("args", {})
    return args


def _clear_failed(client: ServeSubmissionClient, deadline_s: float) -> None:
    """Remove what of ours did not come up before: Serve would not try the same again, and tell the old reason."""
    if _status(client).get("status") != "DEPLOY_FAILED":
        return
    client.deploy_applications({"applications": _others(client)})
    while _status(client) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


def _status(client: ServeSubmissionClient) -> dict[str, Any]:
    """Return what Serve knows of our application; nothing where there is none."""
    status: dict[str, Any] = client.get_serve_details()["applications"].get(APP_NAME, {})
    return status


def _others(client: ServeSubmissionClient) -> list[dict[str, Any]]:
    # Deploying is declarative: an application that the request leaves out is deleted.
    applications = client.get_serve_details()["applications"]
    return [a["deployed_app_config"] for n, a in applications.items() if n != APP_NAME and a["deployed_app_config"]]


def _progress(app: dict[str, Any]) -> str:
    """Return what Serve says of a deployment that takes long (what it waits for), else its word for the whole."""
    deployments = app.get("deployments", {}).values()
    messages = [d["message"] for d in deployments if d["status"] != "HEALTHY" and d.get("message")]
    return " ".join(messages) or str(app.get("status", "STARTING")).lower().replace("_", " ")


def _reason(status: dict[str, Any]) -> str:
    """Return the last line of Serve's message that says something: the exception of a traceback comes last."""
    messages = [status.get("message", "")]
    messages += [d.get("message", "") for d in status.get("deployments", {}).values()]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else f"Ray Serve reports {status['status']} and no reason."
