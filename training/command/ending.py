"""How a command ends: one line on standard error and the exit code of what happened, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from training.errors import EliteError, Interrupted, Problems, StoppedByUser
from training.texts import visible


@dataclass
class Session:
    """What a started command knows about itself. `run`: its run directory, once something is there."""

    argv: list[str]
    json: bool = False
    run: Path | None = None


def guarded(act: Callable[[Session], Any], argv: Sequence[str]) -> int:
    """Run a command; returns its exit code. Everything it raises is told in one line a problem."""
    session = Session(argv=list(argv), json="--json" in argv)
    with contextlib.suppress(ValueError):  # outside the main thread there are no handlers
        signal.signal(signal.SIGTERM, _terminated)
    try:
        act(session)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        _mute(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return _tell(StoppedByUser(f"Stopped by Ctrl+C. {_kept(session)}"), session)
    except EliteError as error:
        return _tell(error, session)
    except Exception as error:  # the last line of defence
        return _ended_by(error, session)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Interrupted("Stopped by SIGTERM. What was written is kept; `python3 elite_train.py runs` lists it.")


def _kept(session: Session) -> str:
    if session.run is None or not session.run.exists():
        return "Nothing was written."
    return f"{session.run} is kept; `python3 elite_train.py resume {session.run}` continues it."


def _ended_by(error: Exception, session: Session) -> int:
    """Typer's errors by their form (their classes are private to it), anything else as a fault of ours."""
    if hasattr(error, "format_message"):
        return _tell(_usage(error, session), session)
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 130))
    place = _save_traceback(error, session.run)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    fault = EliteError(f"A fault in ELITE ({reason}). The traceback is in {place}; please report it.")
    return _tell(fault, session)


def _usage(error: Any, session: Session) -> EliteError:
    """Typer's message as one line, with the nearest flag, or the value that was refused."""
    from training.settings import nearest
    text = " ".join(str(error.format_message()).split())
    if type(error).__name__ == "NoSuchOption":
        near = nearest(error.option_name, tuple(getattr(error, "possibilities", None) or ()))
        text = f"Unknown flag {error.option_name}.{near or ' --help lists them all.'}"
    elif type(error).__name__ == "BadParameter" and getattr(error, "param", None) is not None:
        text = _refused(error, session.argv)
    problem = EliteError(text if text.endswith((".", "?")) else text + ".")
    problem.exit_code = int(error.exit_code)
    return problem


def _refused(error: Any, argv: Sequence[str]) -> str:
    """`--tier is 'abc'; it must be a whole number`: Typer's own sentence leaves out the value."""
    flag = error.param.opts[-1]
    given = next((each.partition("=")[2] or after for each, after in zip(argv, [*argv[1:], ""], strict=True)
                  if each.partition("=")[0] == flag), "")
    kind = "a whole number" if "integer" in error.message else "a number" if "number" in error.message else ""
    return f"{flag} is {given!r}; it must be {kind}." if kind else " ".join(error.format_message().split())


def _tell(error: EliteError, session: Session) -> int:
    problems = error.problems if isinstance(error, Problems) else (error,)
    told = [visible(each) for each in problems]
    if session.json:
        data = {"error": visible(error), "exit_code": error.exit_code, "problems": told}
        _write(sys.stdout, json.dumps(data, ensure_ascii=False) + "\n")
    _write(sys.stderr, "".join(f"{each}\n" for each in told))
    return error.exit_code


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text.encode(stream.encoding or "utf-8", "replace").decode(stream.encoding or "utf-8"))
        stream.flush()
    except (OSError, ValueError):
        _mute(stream)


def _mute(stream: Any) -> None:
    from training.console.theme import mute  # loads Rich, which an undisturbed end does not need

    mute(stream)


def _save_traceback(error: Exception, run: Path | None) -> str:
    """Where the traceback was saved: the run directory, or else the folder for temporary files."""
    text = "".join(traceback.format_exception(error))
    name = time.strftime("elite-fault-%Y%m%d-%H%M%S-")
    for folder in (run, Path(tempfile.gettempdir())):
        try:
            if folder is not None and folder.is_dir():
                handle, path = tempfile.mkstemp(prefix=name, suffix=".txt", dir=folder)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                return path
        except OSError:
            continue
    return "no file (the disk refused it)"
