"""Models of the Hugging Face Hub, in a cache of the Hub library's own layout (atomic, locked, resumable).

HF_TOKEN, HF_ENDPOINT and the library's other settings hold here too.
"""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import InvalidArgument, NotFound, TramontaneError, Unavailable

# What a folder of safetensors is read for. No code, no pickles, no second copy in another format.
FOLDER_PATTERNS = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
]
FOLDER_IGNORED = ["*/*", "consolidated*"]
_FORM = re.compile(r"([\w.-]+)/([\w.-]+?)(?:/(.+?))?(?:@([\w./-]+))?", re.ASCII)
_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)")


def fetch_huggingface(name: str, cache: Path, *, quiet: bool = True) -> Path:
    """`name` is owner/repo[/file][@revision]; the path of the file, or of a folder of safetensors.

    Raises InvalidArgument, NotFound, Unavailable or TramontaneError.
    """
    match = _FORM.fullmatch(name)
    if match is None:
        raise InvalidArgument("hf", f"{name[:80]!r} is not of the form owner/repo/file or owner/repo")
    repo, file, revision = f"{match[1]}/{match[2]}", match[3], match[4]
    import huggingface_hub as hub  # takes its time, and only downloads need it
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # it announces each of its retries
    if quiet:
        disable_progress_bars()
    shown = f"hf:{name}"
    try:
        if file is None:
            return _folder(hub, repo, revision, cache, shown)
        paths = [hub.hf_hub_download(repo, part, revision=revision, cache_dir=cache) for part in _parts(file)]
        return Path(paths[0])
    except errors.GatedRepoError:
        raise NotFound(
            "model", shown, "its owner asks you to accept terms on the Hub; then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound("model", shown, f"no repository {repo}, or it is private: set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise NotFound("model", shown, f"the repository has no revision {revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise Unavailable(f"{shown} is not cached and the Hugging Face Hub cannot be reached") from None
    except errors.EntryNotFoundError:
        raise NotFound(
            "model", shown, f"the repository has no such file{_offered(hub, repo, revision)}"
        ) from None
    except errors.HFValidationError as error:
        raise InvalidArgument("hf", str(error).splitlines()[0]) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise TramontaneError(f"{shown} could not be downloaded: {_line(error)}") from error


def _folder(hub, repo: str, revision: str | None, cache: Path, shown: str) -> Path:
    path = Path(
        hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=FOLDER_PATTERNS,
            ignore_patterns=FOLDER_IGNORED,
        )
    )
    if not any(path.glob("*.safetensors")):
        raise NotFound("model", shown, f"the repository has no safetensors{_offered(hub, repo, revision)}")
    return path


def _parts(file: str) -> list[str]:
    """All parts of a split GGUF, the first one first; else the file alone."""
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    head, _, of, count, tail = match.groups()
    return [f"{head}{number:05}{of}{count}{tail}" for number in range(1, int(count) + 1)] or [file]


def _offered(hub, repo: str, revision: str | None) -> str:
    """The GGUF files of a repository, as the end of an error's line."""
    try:
        names = [n for n in hub.list_repo_files(repo, revision=revision) if n.endswith(".gguf")]
    except (OSError, ValueError, hub.errors.HfHubHTTPError):
        return ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; it has {', '.join(names[:8])}{more}" if names else ""


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
