"""A finished run as a data set on the Hub: parquet, card, and what was exported."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id


PUBLISHED = ("data/*.parquet", "images/*.parquet", "README.md", "failures.jsonl", "preview.jpg", "exports/**")


def check_publishing(name: str) -> None:
    """Refuse a name that cannot be, and a machine that is not logged in, before any work.

    Raises:
        ValueError: naming what is wrong.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {name}: {error}; accepted: user/name") from error
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "--push-to-hub needs a token of the Hub: run `hf auth login` first, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"--push-to-hub: the Hub does not take this machine's token: {error}") from error


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload a finished run; returns its address. What is there already is not sent again."""
    api = HfApi()
    url = api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=name,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=list(PUBLISHED),
        delete_patterns=["data/*.parquet", "images/*.parquet"],
        commit_message="Region captions by perceptiondlm annotate",
    )
    return str(url)
