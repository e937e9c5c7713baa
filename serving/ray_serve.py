"""The same application as replicas of Ray Serve, as many as the load needs.

>>> app = deployment(Recipe(model={"model": "models/8b"}), Replicas(1, 8, gpus=1))
>>> serve.run(app)                         # or name it in a Serve config file

Every replica holds a model and an engine of its own, so requests on one replica share passes, and encoded images are
kept per replica. Ray's router spreads requests and adds and removes replicas by the number of requests under way.
"""

from dataclasses import dataclass
from typing import Any

from perceptiondlm.serving.server.run import Recipe


try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig
except ImportError as error:
    raise ImportError(f'replicas need Ray Serve ({error}): pip install "perceptiondlm[ray]"') from error


NAME = "perceptiondlm"


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and what each takes.

    Args:
        least, most: replicas; where they differ, the load decides.
        cpus, gpus: of each replica.
        requests: under way on a replica at which another one is worth starting.
        up_seconds, down_seconds: for which the load must call for more, or fewer, before that is done.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    requests: float = 16.0
    up_seconds: float = 10.0
    down_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"replicas must be 1 or more, the most at least the least, got {self.least}, {self.most}")

    def options(self) -> dict[str, Any]:
        """Keywords of `serve.deployment`."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        scaling = AutoscalingConfig(
            min_replicas=self.least,
            max_replicas=self.most,
            target_ongoing_requests=self.requests,
            upscale_delay_s=self.up_seconds,
            downscale_delay_s=self.down_seconds,
        )
        return {"autoscaling_config": scaling}


def deployment(recipe: Recipe, replicas: Replicas | None = None) -> Any:
    """A Serve application, to be given to `serve.run`."""
    replicas = replicas or Replicas()

    def build() -> Any:  # in the replica's process
        return recipe.app()

    made: Any = serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=recipe.limits.max_requests,
        graceful_shutdown_timeout_s=recipe.drain_seconds,
        **replicas.options(),
    )
    return made.bind()


class Replica:
    """A process that runs the application; Ray makes it in there."""


def serve_on_ray(
    recipe: Recipe, replicas: Replicas, host: str, port: int, address: str | None = None, blocking: bool = True
) -> None:
    """Serve on a cluster, by default until told to stop.

    Args:
        address: of a running cluster; None starts one on this machine.
        blocking: False returns when the replicas are ready; `serve.shutdown()` then ends them.
    """
    ray.init(address=address, ignore_reinit_error=True)
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment(recipe, replicas), name=NAME, route_prefix="/", blocking=blocking)
