"""The server of flashclient as replicas of Ray Serve, beside one weightd on each node with flash.

    ray start --head --resources '{"weightd": 1}'
    serve run --app-dir deploy --working-dir deploy ray_serve:app model=opt-1.3b \\
        address=unix:/run/weightd/weightd.sock replicas_max=4

Replicas of a node share its weightd, and so one copy of the weights in memory. Ray places them on nodes that have the
resource `weightd`, restarts those that die, and adds some while more requests run than `requests_wanted` for each.
"""

# No postponed annotations: Ray reads the type of app() to check what it is given.

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from flashclient import FlashClient
from flashclient.batching.bounds import SEQUENCES_MAX, WAITING_MAX
from flashclient.batching.scheduler import Scheduler
from flashclient.batching.step_order import StepOrder
from flashclient.server.access import Access, read_keys
from flashclient.server.api import make_api
from flashclient.server.hosted_model import HostedModel

REPLICAS_OF_NODE_MAX = 1000
HEALTH_S = 10.0


class Settings(BaseModel):
    """What `serve run` takes, as NAME=VALUE.

    Attributes:
        model: names of served models, separated by commas.
        address: of the weightd of each node.
        mode: of generation.
        api_key_file: keys that may ask, one a line, at this path on each node.
        replicas_min, replicas_max: of the whole cluster.
        requests_wanted: that run at once in a replica; with more, Ray adds another one.
        threads: of a replica's kernels; Ray counts as many processors for it.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    address: str
    mode: str = "auto"
    api_key_file: Path | None = None
    replicas_min: int = Field(default=1, ge=1)
    replicas_max: int = Field(default=1, ge=1)
    requests_wanted: int = Field(default=SEQUENCES_MAX // 2, ge=1)
    threads: int = Field(default=1, ge=1)


class Server:
    """A replica: its clients, and the routes of flashclient's server."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._opened = ExitStack()
        self._models: dict[str, HostedModel] = {}
        self._keys = [] if settings.api_key_file is None else read_keys(settings.api_key_file)
        order = StepOrder()
        for name in settings.model.split(","):
            client = self._opened.enter_context(FlashClient(name, address=settings.address, mode=settings.mode))
            scheduler = Scheduler(client.loaded, order=order)
            self._opened.callback(scheduler.close)
            self._models[name] = HostedModel(name, client, scheduler)

    def __serve_build_asgi_app__(self) -> Any:
        return make_api(self._models, Access(self._keys))

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises: one whose model has ended."""
        for model in self._models.values():
            model.scheduler.check_runs()

    def __del__(self) -> None:
        self._opened.close()


def app(settings: Settings) -> serve.Application:
    """The application for `serve run`."""
    deployment = serve.deployment(
        name="flashclient",
        ray_actor_options={
            "num_cpus": settings.threads,
            "resources": {"weightd": 1 / REPLICAS_OF_NODE_MAX},
        },
        autoscaling_config={
            "min_replicas": settings.replicas_min,
            "max_replicas": max(settings.replicas_min, settings.replicas_max),
            "target_ongoing_requests": settings.requests_wanted,
        },
        max_ongoing_requests=SEQUENCES_MAX + WAITING_MAX,
        health_check_period_s=HEALTH_S,
    )
    return deployment(serve.ingress()(Server)).bind(settings)
