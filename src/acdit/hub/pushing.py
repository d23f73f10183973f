"""The way to the Hugging Face hub, through huggingface_hub, with one clear message for whatever stands in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from acdit.errors import AcditError, ConfigError, StorageError, first_line
from acdit.shims import PIPELINE

# What an export may hold: of an earlier one, what the new one has not is removed; other files stay.
_OURS = ("*.safetensors", "*/config.json", "*.safetensors.index.json", "classifier/*", "vae/*", "tokenizer/*",
         "scheduler/*", "samples.*", "recipe.yaml", "metrics.json")  # fmt: skip


def require_pushable(repo_id: str) -> str:
    """What can be known before anything is written: the name is one, and there is a token.

    Returns:
        The token.

    Raises:
        ConfigError: they are not.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    expected = "OWNER/NAME, a repository that may be new"
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigError("--push", found=f"{repo_id!r} ({first_line(error)})", expected=expected) from None
    if not re.fullmatch(r"[^/]+/[^/]+", repo_id):
        raise ConfigError("--push", found=repr(repo_id), expected=expected)
    token = huggingface_hub.get_token()
    if token is None:
        raise ConfigError(
            "--push", found="no token of the hub", expected="one that may write to the repository",
            fix="hf auth login, or set HF_TOKEN (huggingface.co/settings/tokens)",
        )  # fmt: skip
    return token


def push(folder: str | Path, repo_id: str, *, private: bool = False, message: str = "A model from acdit") -> str:
    """Upload an export, into a new repository or over an earlier export, as one commit.

    Args:
        folder: what `share` has written.
        repo_id: OWNER/NAME.
        private: of a new repository; an old one has to be so already.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ConfigError: no token or a wrong one, no right to write there, a repository that holds something else or that
            everybody can read where `private` was asked for.
        StorageError: the hub cannot be reached, or fails.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    token = require_pushable(repo_id)
    api = huggingface_hub.HfApi(token=token)
    try:
        try:
            api.create_repo(repo_id, private=private or None)
        except HfHubHTTPError as error:
            if _status(error) != 409:  # 409: there is one
                raise
            _require_ours(api.repo_info(repo_id), repo_id, private)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=list(_OURS),
            ignore_patterns=[".*"],
        )  # fmt: skip
    except AcditError:
        raise
    except HfHubHTTPError as error:
        raise _refused(error, repo_id, folder) from error
    except Exception as error:  # the network's: requests' or httpx's, as the version of huggingface_hub has it
        raise StorageError(
            f"--push {repo_id}", found=f"an upload that failed ({type(error).__name__}: {first_line(error)})",
            expected="a hub that can be reached", fix=_later(repo_id, folder),
        ) from error  # fmt: skip
    return f"{api.endpoint}/{repo_id}"


def _require_ours(info: Any, repo_id: str, private: bool) -> None:
    """An existing repository: empty or an earlier export, and as private as asked."""
    if private and not info.private:
        raise ConfigError(
            "--private", found=f"{repo_id}, which everybody can read", expected="a new repository, or a private one",
            fix="make it private in its settings first, or choose another name",
        )  # fmt: skip
    names = {file.rfilename for file in info.siblings or ()}
    if names - {".gitattributes", "README.md"} and f"{PIPELINE}.py" not in names:
        raise ConfigError(
            f"--push {repo_id}", found=f"a repository with something else in it ({', '.join(sorted(names)[:3])}, …)",
            expected="a new one, an empty one or an earlier export", fix="choose another name",
        )  # fmt: skip


def _refused(error: Any, repo_id: str, folder: str | Path) -> AcditError:
    status = _status(error)
    if status == 401:
        return ConfigError(
            f"--push {repo_id}", found="a token that the hub does not know", expected="a valid one",
            fix=f"hf auth login, or set HF_TOKEN; then {_later(repo_id, folder)}",
        )  # fmt: skip
    if status in (403, 404):
        return ConfigError(
            f"--push {repo_id}", found=f"no right to write there ({first_line(error)})",
            expected="a name of your own, or of an organisation of yours, and a token that may write",
            fix="correct OWNER, or make a token with the role `write`",
        )  # fmt: skip
    return StorageError(
        f"--push {repo_id}", found=f"the hub answers {status or 'nothing'} ({first_line(error)})", expected="success",
        fix=_later(repo_id, folder),
    )  # fmt: skip


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _later(repo_id: str, folder: str | Path) -> str:
    return f"{folder} is whole: the same command later, or hf upload {repo_id} {folder}"
