"""The set-up: what is missing is found, what is broken is mended, and nobody's own environment is touched."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training import bootstrap, pipview, setup_venv
from training.bootstrap import Place, hollow, installed, missing, pins, stamp_text
from training.errors import CannotWrite, MissingInput

ROOT = Path(__file__).resolve().parent.parent
PIP_LINES = Path(__file__).with_name("pip_output.txt")


def checkout(folder, requirements="left-pad==1.0\n"):
    """A copy of what a start needs, with requirements that no environment has."""
    (folder / "training").mkdir(parents=True)
    for name in ("__init__", "errors", "bootstrap", "setup_venv", "pipview"):
        shutil.copy(ROOT / "training" / f"{name}.py", folder / "training")
    (folder / "requirements.txt").write_text(requirements)
    (folder / "start.py").write_text("import sys\nfrom training.bootstrap import ensure\nensure(sys.argv)\n"
                                     "print('inside', sys.prefix)\n", encoding="utf-8")
    return folder


def start(folder, *arguments, env=None):
    return subprocess.run([sys.executable, "start.py", *arguments], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, **(env or {})}, timeout=120)


def package(folder, name, version, record=True):
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / name).mkdir(exist_ok=True)
    if record:
        (info / "RECORD").write_text("")


def fake_venv(folder, stamp=True):
    """A `.venv` whose Python is this one and that holds the one requirement."""
    place = Place(str(folder))
    Path(place.python).parent.mkdir(parents=True)
    os.symlink(sys.executable, place.python)
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {Path(sys.executable).parent}\n")
    site = folder / f".venv/lib/python3.{sys.version_info[1]}/site-packages"
    package(site, "left_pad", "1.0")
    if stamp:
        Path(place.stamp).write_text(stamp_text(sys.version_info[:2], place.text()))
    return place


def test_requirements_pin_every_package_for_each_supported_python():
    text = (ROOT / "requirements.txt").read_text()
    for minor in (10, 11, 12, 13):
        wanted = pins(text, (3, minor))
        assert wanted["torch"] == "2.13.0"
        assert {"transformers", "numpy", "typer", "deepspeed", "bitsandbytes"} <= wanted.keys()
    assert pins(text, (3, 10))["numpy"] == "2.2.6"
    assert pins(text, (3, 11))["numpy"] == "2.4.6"


def test_a_requirement_that_is_no_exact_pin_is_refused():
    with pytest.raises(ValueError, match="'torch>=2' is no exact pin"):
        pins("torch>=2\n", (3, 11))


def test_a_local_version_meets_its_pin_and_a_package_cut_short_does_not(tmp_path):
    package(tmp_path, "torch", "2.13.0+cpu")
    package(tmp_path, "Rich_Extra", "1.0", record=False)
    present = installed([str(tmp_path)])
    assert missing({"torch": "2.13.0"}, present) == []
    assert missing({"rich-extra": "1.0"}, present) == ["rich-extra==1.0"]
    assert missing({"torch": "2.12.0"}, present) == ["torch==2.12.0"]


def test_a_registered_package_without_its_code_is_found(tmp_path):
    package(tmp_path, "yaml", "1")
    assert hollow(["pyyaml", "rich"], [str(tmp_path)]) == ["rich"]


def test_this_interpreter_has_everything_so_nothing_is_restarted():
    assert bootstrap.ensure(["elite_train.py"]) is None


def test_help_without_requirements_is_plain_text_and_installs_nothing(tmp_path):
    done = start(checkout(tmp_path / "c"), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: python3 elite_train.py" in done.stdout
    assert not (tmp_path / "c/.venv").exists()


def test_no_setup_refuses_with_the_command_to_run(tmp_path):
    folder = checkout(tmp_path / "a b")
    done = start(folder, "--auto", "--no-setup", "--json")
    assert done.returncode == 66
    assert f"-m venv '{folder}/.venv' && '{folder}/.venv/bin/python' -m pip install -r" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 66
    assert not (folder / ".venv").exists()


def test_a_whole_venv_is_entered_at_once(tmp_path):
    folder = checkout(tmp_path / "c")
    fake_venv(folder)
    done = start(folder, "--auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"inside {folder / '.venv'}\n"


def test_no_setup_enters_a_venv_that_was_made_by_hand(tmp_path):
    folder = checkout(tmp_path / "c")
    fake_venv(folder, stamp=False)
    assert start(folder, "--no-setup").returncode == 0


@pytest.mark.parametrize(("damage", "words"), [
    (lambda venv: shutil.rmtree(venv), "there is no .venv yet"),
    (lambda venv: (venv / ".elite-ready").unlink(), ".venv was left half-made"),
    (lambda venv: (venv / ".elite-ready").write_text("# Python 3.9\nold==1\n"),
     ".venv was made for other requirements"),
    (lambda venv: (venv / "bin/python").unlink(), ".venv has no Python that runs"),
    (lambda venv: ((venv / "bin/python").unlink(), (venv / "bin/python").write_text("junk")),
     ".venv has no Python that runs"),
    (lambda venv: shutil.rmtree(next(venv.glob("lib/*/site-packages/left_pad"))), ".venv lacks left-pad"),
    (lambda venv: next(venv.glob("lib/*/site-packages/*/RECORD")).unlink(), ".venv lacks left-pad==1.0"),
])
def test_damage_to_the_venv_is_noticed_and_named(tmp_path, damage, words):
    place = fake_venv(checkout(tmp_path / "c"))
    assert setup_venv.venv_problem(place) == ""
    damage(Path(place.venv))
    assert setup_venv.venv_problem(place) == words


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    place = Place(str(checkout(tmp_path / "c")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(CannotWrite, match=r"needs 1\.7 GB free at .*; 100 MB is"):
        setup_venv.set_up(place, "there is no .venv yet")
    assert "PyTorch among them" in capsys.readouterr().err
    assert not Path(place.venv).exists()


def test_debians_python_without_venv_gets_the_apt_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(MissingInput, match=rf"sudo apt install python3\.{sys.version_info[1]}-venv"):
        setup_venv._make_venv(Place(str(tmp_path)))


def test_a_failing_pip_shows_its_last_lines_and_the_next_start_goes_on(tmp_path):
    folder = checkout(tmp_path / "c", "no-such-package-of-elite==1.0\n")
    done = start(folder, "--auto", env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)})
    assert done.returncode == 66
    assert "No matching distribution found for no-such-package-of-elite==1.0" in done.stderr
    assert f"all it said: {folder / '.venv/setup.log'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert setup_venv.venv_problem(Place(str(folder))) == ".venv was left half-made"


def test_progress_follows_pips_own_lines():
    progress = pipview.PipProgress(49)
    for line in ("Collecting torch==2.13.0+cpu", "  Downloading sympy-1.14.0-py3-none-any.whl (6.3 MB)",
                 "Collecting sympy>=1.13.3 (from torch)",
                 "Installing collected packages: mpmath, sympy, torch"):
        progress.feed(line)
    progress.advance({"mpmath", "sympy"}, 10.0)
    before = progress.share
    assert "2/49 packages, unpacking 3 packages" in progress.text(2, 10.0)
    progress.advance({"mpmath", "sympy", "torch"}, 40.0)
    assert progress.share > before + 0.3
    assert "0:40, about 1:" in progress.text(3, 40.0)


def test_the_short_help_names_every_flag_of_the_real_one():
    from typer.main import get_command

    from elite_train import app
    command = get_command(app)
    flags = {name for each in command.params for name in each.opts if name.startswith("--")}
    assert {flag for flag in flags if flag not in bootstrap.USAGE} == set()
    assert {name for name in command.commands if name not in bootstrap.USAGE} == set()


@pytest.mark.parametrize("name", ["elite_train.py", "training/__init__.py"])
def test_python_3_6_can_read_as_far_as_the_message(name):
    ast.parse((ROOT / name).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("minor", [6, 8, 9])
def test_an_old_python_gets_one_line(minor):
    known = next(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"), None)
    found = known or shutil.which(f"python3.{minor}")
    if not found:
        pytest.skip(f"no Python 3.{minor} here")
    done = subprocess.run([str(found), "elite_train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 66
    assert done.stderr.startswith("ELITE needs Python 3.10 or newer; ")
    assert done.stderr.count("\n") == 1
