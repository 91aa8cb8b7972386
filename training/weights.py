"""Whether a base model's files are there and whole: local folders, the Hugging Face cache, the hub.

Only names, sizes and headers are read, so a 60 GB model is checked in milliseconds. No torch, no
huggingface_hub.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import struct
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HUB_TIMEOUT_S = 5.0
MAX_HEADER_BYTES = 100_000_000          # the safetensors format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_NAME = 200                          # characters of a hub id or revision
_PART = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def offline() -> bool:
    """Whether the environment forbids the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
               for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, or None when it is missing or no JSON object."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def folder_problems(folder: Path) -> list[str]:
    """What keeps a model folder from being loaded, one phrase each; empty when it is whole."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    found = []
    if read_config(folder) is None:
        found.append("config.json is " + ("not valid "
                                          "JSON" if (folder / "config.json").exists() else "missing"))
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        found.append("the tokenizer is missing (tokenizer.json, tokenizer.model, or vocab.json and "
                     "merges.txt)")
    if (folder / "adapter_config.json").exists():
        found.append("it holds an adapter of its own (adapter_config.json), which Transformers would load "
                     "with it; remove it")
    return found + _weight_problems(folder)


def _weight_problems(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return _shard_problems(folder)
    if (folder / SINGLE).is_file():
        problem = file_problem(folder / SINGLE)
        return [problem] if problem else []
    if any((folder / name).is_file() for name in PICKLES):
        return [f"the weights are a pickle, which can run code when it is read; convert them to {SINGLE}"]
    return [f"the weights are missing ({SINGLE} or {INDEX} with its shards)"]


def _shard_problems(folder: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in shards if os.path.basename(name) != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{INDEX} is not a valid index"]
    if outside:
        return [f"{INDEX} names {outside[0]!r}, which is no file of this folder"]
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return [f"{missing[0]}{more} of {len(shards)} weight files is missing"]
    return [problem for name in shards if (problem := file_problem(folder / name))]


def file_problem(path: Path) -> str:
    """Why a weight file cannot be whole, from its size and header; empty when it can.

    A safetensors file is 8 bytes of header length, a JSON header, and data up to the last tensor's end
    offset.
    """
    size_bytes = path.stat().st_size
    if path.suffix != ".safetensors":
        return f"{path.name} is no safetensors file"
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(MAX_HEADER_BYTES, size_bytes):
                return f"{path.name} has no valid header"
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected_bytes = 8 + header_bytes + max(ends, default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, IndexError, AttributeError,
            RecursionError):
        return f"{path.name} has no valid header"
    if size_bytes != expected_bytes:
        return f"{path.name} has {size_bytes:,} bytes where its header says {expected_bytes:,}"
    return ""


def cache_root() -> Path:
    """The Hugging Face cache folder, found as huggingface_hub does (HF_HUB_CACHE, HF_HOME,
    XDG_CACHE_HOME)."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(own).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def cached_folder(hub_id: str, revision: str = "") -> Path | None:
    """The cached snapshot of a hub repository, or None. Its files may be incomplete: see
    `folder_problems`."""
    if not is_plain(hub_id) or not is_plain(revision):
        return None
    repository = cache_root() / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def is_plain(name: str) -> bool:
    """Whether a hub id or revision can be part of a path or URL without leading elsewhere.

    >>> is_plain("org/name"), is_plain("refs/pr/2"), is_plain("a/../../b"), is_plain("/etc"), is_plain("-x/y")
    (True, True, False, False, False)
    """
    return not name or (len(name) <= MAX_NAME and all(map(_PART.fullmatch, name.split("/"))))


def hub_url(hub_id: str, revision: str = "") -> str:
    """Address of a hub repository's config.json (HF_ENDPOINT names another hub)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{hub_id}/resolve/{revision or 'main'}/config.json"


def hub_problem(hub_id: str, revision: str = "") -> str:
    """Why the hub cannot serve this repository now, in one phrase; empty when it answers within 5 s."""
    try:
        _ask(hub_id, revision, "HEAD")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"the hub answers {error.code}: check the name, accept its licence, set HF_TOKEN"
        return f"the hub answers {error.code} for {hub_id}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"the hub does not answer ({reason})"
    return ""


def hub_config(hub_id: str) -> dict[str, Any] | None:
    """A hub repository's config.json fetched over the network, or None."""
    try:
        data = json.loads(_ask(hub_id, "", "GET"))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return None
    return data if isinstance(data, dict) else None


def _ask(hub_id: str, revision: str, method: str) -> bytes:
    request = urllib.request.Request(hub_url(hub_id, revision), method=method)
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as answer:
        content: bytes = answer.read(1 << 20)
    return content


def added_tokens(folder: Path) -> set[str]:
    """The special tokens a tokenizer folder declares, to find fill-in-the-middle sentinels by."""
    tokens: set[str] = set()
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        try:
            entries = json.loads((folder / name).read_text(encoding="utf-8")).get(key) or []
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        for entry in entries.values() if isinstance(entries, dict) else entries:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                tokens.add(entry["content"])
    return tokens
