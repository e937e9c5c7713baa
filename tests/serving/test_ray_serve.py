"""The server as replicas of Ray Serve, on a cluster of this machine."""

import json
import socket
from pathlib import Path

import pytest


ray = pytest.importorskip("ray", reason='Ray is an extra: pip install "perceptiondlm[ray]"')
pytest.importorskip("fastapi", reason='the server is an extra: pip install "perceptiondlm[serve]"')
pytest.importorskip("ray.serve", reason='Ray Serve is part of the extra: pip install "perceptiondlm[ray]"')

import httpx  # noqa: E402
from PIL import Image  # noqa: E402
from ray import serve  # noqa: E402
from served import data_url, encoded  # noqa: E402

from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY  # noqa: E402
from perceptiondlm.serving.ray_serve import Replicas, deployment, serve_on_ray  # noqa: E402
from perceptiondlm.serving.server.limits import Limits  # noqa: E402
from perceptiondlm.serving.server.run import Recipe  # noqa: E402


def test_replicas_become_options_of_a_deployment():
    assert Replicas(2, 2).options() == {"num_replicas": 2}
    scaling = Replicas(1, 8, requests=4).options()["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 8, 4)
    with pytest.raises(ValueError, match="replicas must be 1 or more"):
        Replicas(3, 2)


@pytest.fixture
def cluster():
    """A small cluster without a dashboard, ended in any case."""
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )  # fmt: skip
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_cluster_answers_like_a_single_server(cluster):
    """Captions of the sample scene, limits and errors included; the deployment scales between one and two replicas."""
    recipe = Recipe(
        model={"model": str(DRAWN_MODEL)}, engine={"settings": {"preset": "fast"}}, limits=Limits(max_regions=8)
    )
    port = free_port()
    serve_on_ray(recipe, Replicas(1, 2, cpus=0.5), "127.0.0.1", port, blocking=False)
    with Image.open(Path(REPOSITORY) / "examples" / "scene.png") as scene:
        image = scene.convert("RGB")
    annotations = json.loads((Path(REPOSITORY) / "examples" / "scene_masks.json").read_text())["annotations"]
    body = {"image": data_url(image), "masks": [entry["mask_rle"] for entry in annotations]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        reply = client.post("/v1/captions", json=body)
        assert reply.status_code == 200, reply.text
        named = [
            entry["category_name"] in r["caption"]
            for entry, r in zip(annotations, reply.json()["regions"], strict=True)
        ]
        assert all(named)
        files = [("image", encoded(image))]
        boxes = json.dumps({"boxes": [[10, 10, 60, 60]]})
        again = client.post("/v1/captions", files=files, data={"request": boxes}).json()
        assert again["usage"]["image_was_known"]
        refused = client.post("/v1/captions", json={**body, "boxes": [[1, 1, 9, 9]] * 9})
        assert (refused.status_code, "accepted: 8" in refused.json()["error"]["message"]) == (413, True)
        assert client.get("/ready").json()["ready"]
        with client.stream("POST", "/v1/captions", json={**body, "stream": True}) as stream:
            text = "".join(stream.iter_text())
        assert text.index("event: draft") < text.index("event: result")
    status = serve.status().applications["perceptiondlm"].deployments["perceptiondlm"]
    assert status.replica_states.get("RUNNING") == 1
    assert deployment(recipe, Replicas(1, 2)) is not None
