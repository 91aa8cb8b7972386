"""The documentation names only commands, flags, keys, files and figures that exist."""

import re
import shlex
from pathlib import Path

import pytest

from training.settings import BY_NAME, SECTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(text: str) -> list[str]:
    """Every `elite_train.py ...` command line shown in code, without comments and placeholders."""
    shown = re.findall(r"^    (?:\$ )?(python3 elite_train\.py.*)$", text, re.M) + re.findall(
        r"`(?:python3 )?(elite_train\.py[^`]*)`", text)
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.S)
    shown += [line.strip() for block in blocks for line in block.splitlines() if "elite_train.py" in line]
    return [line.split("  #")[0].removeprefix("$ ") for line in shown]


def everything_shown() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in commands_in(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "line"), everything_shown())
def test_every_command_shown_is_accepted_by_the_command(page, line):
    import typer

    from elite_train import app

    words = shlex.split(re.sub(r"[\[\]|]|\.\.\.", " ", line).split("elite_train.py", 1)[1])
    group = typer.main.get_command(app)
    names = set(group.commands)
    command = next((group.commands[word] for word in words if word in names), group)
    parameters = [*command.params, *group.params]
    known = {option for parameter in parameters for option in parameter.opts} | {"--help"}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {line}: unknown {used - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
    broken = [target for target in targets
              if target and not target.startswith("http") and not (page.parent / target).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_key_named_exists(page):
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)", page.read_text(encoding="utf-8"))
    files = {"model.safetensors", "run.sh", "dataset.json"}
    assert [name for name in named if name not in BY_NAME and name not in files] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_praises_or_speaks_of_the_future(page):
    praise = (r"\b(blazing|amazing|powerful|seamless\w*|effortless\w*|cutting-edge|state-of-the-art|robust|"
              r"revolutionary|world-class|TODO|coming soon)\b")
    assert re.findall(praise, page.read_text(encoding="utf-8"), re.I) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_named_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:training|configs|benchmarks|tests|docs)/[\w/.-]+)`", text)
    assert [name for name in named if "<" not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["configuration.md", "models.md", "tiers.md", "optimizations.md",
                                  "planning.md", "research.md"])
def test_generated_pages_are_up_to_date(name):
    from training.documentation import PAGES as pages

    assert len(pages) == 7
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name](), "run `make docs`"
