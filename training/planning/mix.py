"""What an epoch is made of: kinds of windows by their shares, how many there are, and what each trains on.

Of the file tokens F of an epoch fim_share f and whole_share w lie in dense windows, where every token is a
target; the others are the last `target_tokens` of cross-file windows, whose beginning is context composed for
them. Commits (share c) and replay (share r) come on top: all targets are F / (1 - c - r). Replay is dense; of
a commit message and old text are context. Where a window has no more context than target it is packed, and
all files are dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from training.settings import DENSE

# Best-fit packing wasted 0.03 % at 4,096 tokens, 0.36 % at 32,768 and 1.5 % at 131,072 (docs/dataset.md).
PACKING_WASTE = 0.01
# Measured on PEFT, Accelerate and NetworkX at 512, 2,048, 7,168 and 16,384 targets a window: cross-file
# windows had 76 to 92 % of their targets. Commit windows of requests, Express, ripgrep, Flask and LevelDB had
# 2.6 to 4.1 tokens for each target.
CROSS_FILL = 0.84
COMMIT_CONTEXT = 3.3
MOST_ADDED = 0.9                 # of the targets: commits and replay (settings.RULES)
LEAST_COMMITS = 20               # fewer tell nothing of how a repository changes (chosen, not measured)
FIM_SHARE, WHOLE_SHARE, FIM_RATE, COMMIT_SHARE, REPLAY_SHARE = 0.25, 0.15, 0.5, 0.1, 0.2


def packed(values: Mapping[str, Any]) -> bool:
    """Whether windows have no context besides their targets."""
    return int(values["dataset.target_tokens"]) >= int(values["dataset.context_tokens"])


def per_file_token(values: Mapping[str, Any]) -> tuple[float, float, float]:
    """Target tokens of cross-file, dense and commit windows for each token of the files. A share that is left
    out counts as 0; shares that cannot be (settings.RULES refuses them) as the most that can.

    >>> values = {"dataset.context_tokens": 4096, "dataset.target_tokens": 512, "dataset.fim_share": 0.25,
    ...           "dataset.whole_share": 0.15, "dataset.commit_share": 0.1}
    >>> [round(share, 4) for share in per_file_token(values)]      # 1 - 0.4; 0.4; 0.1 / 0.9
    [0.6, 0.4, 0.1111]
    """
    dense = float(values.get("dataset.fim_share", 0.0)) + float(values.get("dataset.whole_share", 0.0))
    dense = 1.0 if packed(values) else min(1.0, dense)
    commits = float(values.get("dataset.commit_share", 0.0))
    replay = float(values.get("dataset.replay_share", 0.0)) if values.get("dataset.replay") else 0.0
    files = 1.0 - min(MOST_ADDED, commits + replay)
    return 1.0 - dense, dense + replay / files, commits / files


def windows(file_tokens: float, values: Mapping[str, Any]) -> int:
    """Training windows of one epoch in which each of `file_tokens` is a target once.

    >>> windows(1_000_000, {"dataset.context_tokens": 4096, "dataset.target_tokens": 512,
    ...                     "dataset.whole_share": 0.5})        # 500,000 / 430; 500,000 x 1.01 / 4,096
    1287
    """
    cross, dense, commits = (file_tokens * share for share in per_file_token(values))
    packed_tokens = (dense + commits * COMMIT_CONTEXT) * (1 + PACKING_WASTE)
    return max(1, math.ceil(cross / (CROSS_FILL * int(values["dataset.target_tokens"])))
               + math.ceil(packed_tokens / int(values["dataset.context_tokens"])))


def mean_targets(values: Mapping[str, Any]) -> float:
    """Targets of a window on average.

    >>> round(mean_targets({"dataset.context_tokens": 4096, "dataset.target_tokens": 512,
    ...                     "dataset.whole_share": 0.5}))        # 1 / (0.5 / 430 + 0.5 / 4,096)
    778
    """
    context, target = int(values["dataset.context_tokens"]), CROSS_FILL * int(values["dataset.target_tokens"])
    cross, dense, commits = per_file_token(values)
    return (cross + dense + commits) / (cross / target + (dense + commits * COMMIT_CONTEXT) / context)


def uniform(values: Mapping[str, Any], context_tokens: int, target_tokens: int) -> dict[str, Any]:
    """The same configuration with windows of one kind only, of this size."""
    return {**values, **dict.fromkeys((*DENSE, "dataset.replay_share"), 0.0),
            "dataset.context_tokens": context_tokens, "dataset.target_tokens": target_tokens}


def problems(user: Mapping[str, Any], base: str, sentinels: bool) -> list[str]:
    """Why shares that the user set cannot be honoured, one line each."""
    found = [f"{name} is {user[name]:g} and {base} knows no fill-in-the-middle sentinels; leave it out, or "
             "take a base that docs/models.md lists with FIM."
             for name in ("dataset.fim_share", "dataset.fim_rate") if user.get(name) and not sentinels]
    if user.get("dataset.replay_share") and not user.get("dataset.replay"):
        found.append(f"dataset.replay_share is {user['dataset.replay_share']:g} and no second corpus is "
                     "named; set dataset.replay to a folder or git URL, or leave it out.")
    return found


# -- planned shares: value and reason ------------------------------------------------------------------------


def held_out(files: int) -> tuple[float, str]:
    """The share of the files kept for evaluation."""
    share = min(0.2, max(0.05, 2 / max(1, files)))
    return round(share, 4), "a twentieth of the files" if share == 0.05 else f"at least two of {files} files"


def shares(*, sentinels: bool, base: str, embedded: bool, is_packed: bool, commits: int,
           replay: str) -> dict[str, tuple[float, str]]:
    """Value and reason of every share of the mix. `sentinels`: the base knows fill-in-the-middle ones;
    `base`: its name; `commits`: of the history; `replay`: the second corpus, "" for none."""
    return {"dataset.fim_share": _infilled(FIM_SHARE, sentinels, base, embedded),
            "dataset.fim_rate": _rate(sentinels, base, embedded, is_packed),
            "dataset.whole_share": _whole(embedded, is_packed),
            "dataset.commit_share": _commits(embedded, commits),
            "dataset.replay_share": (REPLAY_SHARE, "the least of the 20-30 % that hold against forgetting")
            if replay else (0.0, "unused: no second corpus (dataset.replay)")}


def _infilled(share: float, sentinels: bool, base: str, embedded: bool) -> tuple[float, str]:
    if embedded:
        return 0.0, "the few tokens it sees are spent on left-to-right text"
    if not sentinels:
        return 0.0, f"{base} knows no fill-in-the-middle sentinels, so cross-file windows take it"
    return share, "a quarter of the targets, in files by themselves; the base knows these sentinels"


def _rate(sentinels: bool, base: str, embedded: bool, is_packed: bool) -> tuple[float, str]:
    if sentinels and not embedded and is_packed:
        return 0.0, "unused: packed windows have no composed context"
    value, why = _infilled(FIM_RATE, sentinels, base, embedded)
    return value, "half of the code targets, as bases are trained (50-70 %)" if value else why


def _whole(embedded: bool, is_packed: bool) -> tuple[float, str]:
    if is_packed:
        return 0.0, "unused: packed windows are whole files already"
    if embedded:
        return 0.0, "a model this small gains nothing from more context"
    return WHOLE_SHARE, "every token of a full window is a target, files after what they depend on"


def _commits(embedded: bool, commits: int) -> tuple[float, str]:
    if embedded:
        return 0.0, "a model this small learns the files first"
    if commits < LEAST_COMMITS:
        return 0.0, f"{commits} commits in git's history; from {LEAST_COMMITS} on they are trained on"
    return COMMIT_SHARE, f"{commits:,} commits: message and old text, then the patch"
