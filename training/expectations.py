"""What a repository of its size lets a model learn, in sentences for the plan and the dataset's manifest.

The plan estimates the tokens, the dataset counts them; the words are the same.
"""

from __future__ import annotations

SMALL_TOKENS = 100_000           # below this a repository has little to teach (chosen, not measured)


def notes(tokens: int, context_tokens: int, files: int, dependencies: int | None = None,
          epochs: int | None = None) -> list[str]:
    """What to expect of `tokens` of text in `files` files at windows of `context_tokens`; empty when there is
    nothing to say.

    `dependencies`: imports between the files (None: not counted); `epochs`: of the run (None: not known).

    >>> notes(12_300, 65_536, 14, None, 8)
    ['12,300 tokens of code in 14 files: windows hold at most that, not the 65,536 asked for. Expect the \
model to learn names and style of these files, no more; 8 epochs repeat the same text.']
    >>> notes(5_000_000, 65_536, 900, 2_000, 3)
    []
    """
    size = f"{tokens:,} tokens of code in {files:,} file{'s' if files != 1 else ''}"
    learnt = f"Expect the model to learn names and style of these files, no more{_repeated(epochs)}."
    found: list[str] = []
    if tokens < context_tokens:
        found.append(f"{size}: windows hold at most that, not the {context_tokens:,} asked for. {learnt}")
    elif tokens < SMALL_TOKENS:
        found.append(f"{size}. {learnt}")
    if dependencies == 0 and files > 1:
        found.append("No file imports another one of this repository: the context of a window is chosen by "
                     "folder and name.")
    if files == 1:
        found.append("One file: its beginning is trained on and its end held out, so the loss on held-out "
                     "text says little of other files.")
    return found


def _repeated(epochs: int | None) -> str:
    return "" if not epochs or epochs < 2 else f"; {epochs} epochs repeat the same text"
