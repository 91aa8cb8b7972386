"""Rows 71 to 77 of docs/reliability.md: repositories, names, secrets, texts and other users."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import forked
import pytest
from report_samples import finished
from rich.console import Console
from run_maker import SMALL, configure
from security_repositories import CANARY, FLIP, SCRIPTS, arguments, bases, trapped
from security_slots import outcome
from trainer_fakes import training_of

from benchmarks.secrets_recall import planted
from tests.dataset.repositories import FUNCTION, git, write_tree
from training import models, weights
from training.command import places
from training.command.ending import _save_traceback
from training.console import stages
from training.console.theme import STYLES, plain
from training.dataset import DatasetGenerator
from training.dataset import tokenizer as tokenizers_
from training.dataset.sources import checkout
from training.dataset.sources.checkout import locate
from training.dataset.sources.repository import list_repository, read_all
from training.dataset.store import WindowStore
from training.errors import EliteError
from training.hardware.profiler import HardwareProfiler
from training.manager import launcher, report
from training.manager.facts import gather, summary
from training.manager.lock import RunLock
from training.records import HardwareProfile
from training.rundir import RunDirectory, write_record, write_text
from training.settings import Config

ROOT = Path(__file__).resolve().parents[2]
CPU_ONLY = HardwareProfile(name="here", source="measured", date="", system="", cpu_name="", cpu_cores=1,
                           cpu_flags=(), ram_total_bytes=8 << 30, ram_available_bytes=6 << 30, gpus=(),
                           disk_path="/", disk_free_bytes=1 << 30)


def everything(*folders):
    """All bytes of all regular files below these folders, and their names."""
    found = bytearray()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found += os.fsencode(path.name) + b"\n"
            if path.is_file() and not path.is_symlink():
                found += path.read_bytes()
    return bytes(found)


def decoded(dataset):
    """All tokens of a dataset as text."""
    found = WindowStore.open(dataset)
    coder = tokenizers_.open_folder(dataset / "tokenizer", {})
    return coder.decode(found.tokens(0, (dataset / "tokens.bin").stat().st_size))


def small_dataset(repo, run, **values):
    """A dataset of a repository, as the whole command makes it; its configuration."""
    config = Config(SMALL | {"dataset.repo": str(repo), "dataset.commit_share": 0.2} | values)
    DatasetGenerator(config, run).generate()
    return config


@pytest.mark.real
def test_a_repository_of_traps_gives_nothing_of_the_outside_and_runs_nothing(tmp_path, started, matrix):
    files = matrix.count(300, 100_000)
    root, canary = trapped(tmp_path, files)
    canary.unlink(missing_ok=True)
    began_s = time.monotonic()
    facts = DatasetGenerator.survey(str(root))
    survey_s = time.monotonic() - began_s
    run = tmp_path / "run"
    small = root
    if files > 5_000:       # the survey is what has to bear any number; windows of all take minutes
        small, canary = trapped(tmp_path / "small", 300)
        canary.unlink(missing_ok=True)
    small_dataset(small, run)
    programs = {line.split()[0] for line in started}
    checks = {"all files are seen": facts.code_files == files, "in time": survey_s < 60,
              "nothing of the outside is written": CANARY.encode() not in everything(run),
              "nor any token of it": CANARY not in decoded(run / "dataset"),
              "no command was run": not canary.exists() and not (tmp_path / "canary").exists(),
              "git and the parser alone were started": programs <= {"git", sys.executable},
              "the passwords of this machine are not in it": b"root:x:0" not in everything(run)}
    bad = [name for name, holds in checks.items() if not holds]
    matrix.record(71, len(checks) - len(bad), len(checks),
                  f"{files:,} files surveyed in {survey_s:.1f} s; wrong: {bad or 'none'}")


@pytest.mark.real
def test_a_name_that_becomes_a_link_between_listing_and_reading_leaks_nothing(tmp_path, matrix):
    secret = write_tree(tmp_path / "outside", {"a.py": f"{CANARY} = 1\n" * 9}) / "a.py"
    root = write_tree(tmp_path / "root", {"sub/a.py": FUNCTION.format(name="one"),
                                          "kept.py": FUNCTION.format(name="one")})
    turns, leaks, seen = matrix.count(2_000, 100_000), 0, Counter()
    with subprocess.Popen([*FLIP, root, secret, str(turns)]) as flipper:
        while flipper.poll() is None:
            for found in read_all(list_repository(root)):
                leaks += CANARY in repr(found)
                if found.path == "sub/a.py":
                    seen[getattr(found, "reason", "read")] += 1
    assert flipper.returncode == 0
    assert 0 < seen["read"] < seen.total(), "the race took place"
    matrix.record(72, turns - leaks, turns, f"swaps under {seen.total():,} reads: {dict(seen)}")


@pytest.mark.real
def test_no_name_is_taken_for_an_option_or_a_command(tmp_path, monkeypatch, calls, matrix):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    canary, bad, tried = tmp_path / "canary", [], 0
    acts = [(name, lambda name=name: DatasetGenerator.survey(name)) for name in arguments(canary)]
    acts += [(name, lambda name=name: models.choose(name, CPU_ONLY, online=False)) for name in bases(canary)]
    acts += [(name, lambda name=name: weights.cached_folder("a/b", name)) for name in bases(canary)]
    acts += [(name, lambda name=name: places.name_of(name)) for name in arguments(canary) + bases(canary)]
    for name, act in acts:
        tried += 1
        told = outcome(act)
        if canary.exists() or told not in ("read", "UsageError", "MissingInput", "DataError"):
            bad.append((name[:60], told))
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    matrix.record(73, tried - len(bad) - len(left), tried, f"wrong: {bad or 'none'}, left: {left or 'none'}")


def repository_with(secrets, folder):
    """A git repository that holds each secret in a file, and some in earlier texts and commit messages."""
    values = {f"app/part{index}.py": f"def use_{index}(client):\n    return client({index})\n\n\n{item.text}"
              for index, item in enumerate(secrets)}
    root = write_tree(folder, values | {f"plain{index}.py": FUNCTION.format(name=f"plain{index}")
                                        for index in range(20)})
    git(root, "init", "-q")
    for index, item in enumerate(secrets[::4]):
        (root / "gone.py").write_text(f"{item.text}\ndef gone_{index}():\n    return {index}\n")
        git(root, "add", ".")
        git(root, "commit", "-qm", f"Use this key from now on\n\n{item.text}")
    (root / "gone.py").write_text(FUNCTION.format(name="gone"))
    git(root, "commit", "-qam", "Remove it")
    return root


def home_with(address, login, root, monkeypatch):
    """A home whose git finds the repository `root` under an address, with and without a login."""
    home = write_tree(root.parent / "home", {".gitconfig": "".join(
        f'[url "{root.as_uri()}"]\n\tinsteadOf = "https://{who}{address}"\n' for who in ("", f"{login}@"))})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    return home


def shown(act):
    """What the console shows of something."""
    console = Console(file=io.StringIO(), theme=STYLES, width=100, highlight=False)
    act(console)
    return console.file.getvalue()


@pytest.mark.real
def test_no_planted_secret_is_in_anything_that_a_run_leaves(tmp_path, monkeypatch, started, matrix):
    kinds = {item.kind: item for item in planted(23) if item.path.endswith(".py")}
    secrets = [item for kind, item in sorted(kinds.items()) if kind != "private-key"]
    password = kinds["github-token"].value[::-1].replace("_", "")
    address, login = "forge.example/team/code.git", f"me:{password}"
    home = home_with(address, login, repository_with(secrets, tmp_path / "origin"), monkeypatch)
    for item in secrets:
        monkeypatch.setenv(f"SERVICE_{item.kind.upper().replace('-', '_')}", item.value)
    monkeypatch.setenv("HF_TOKEN", kinds["hugging-face-token"].value)
    url, run = f"https://{login}@{address}", tmp_path / "run"
    started.clear()
    facts = DatasetGenerator.survey(url)
    DatasetGenerator.survey(url)        # fetched anew, with the same login
    windows = {"dataset.context_tokens": 512, "dataset.target_tokens": 512}
    small_dataset(facts.path, run, **windows)
    manifest = json.loads((run / "dataset" / "manifest.json").read_text())
    assert manifest["secrets_replaced"] >= len(secrets)
    assert manifest["commits"]["used"] > 0, manifest["commits"]
    configure(run, dataset__repo=facts.path, training__max_steps=2, **windows)
    write_record(RunDirectory(run).hardware, HardwareProfiler(run).profile(quick=True))
    assert forked.trainer(run, run / "train.log", dict(os.environ)).communicate()
    assert json.loads((run / "result.json").read_text())["state"] == "done"
    typed = run / "command.txt"
    typed.write_text(f"python3 elite_train.py --auto --repo {url}\n")
    report.write_report(run)
    typed.unlink()                      # what this test itself put there
    told = [shown(lambda console: stages.result(console, summary(run)))]
    told += [str(problem_of(lambda name=name: DatasetGenerator.survey(name)))
             for name in (f"https://{login}@gone.example/a.git", f"http://{login}@a/b", f"https://{login}@/a")]
    samples = DatasetGenerator(Config(SMALL), run).samples(10_000)
    said = "".join([decoded(run / "dataset"), *told, *started, *map(repr, samples)])
    text = everything(run) + said.encode()
    found = [item.kind for item in secrets if item.value.rstrip("=")[-20:].encode() in text]
    text += b"".join(path.read_bytes() for path in (home / "cache").rglob("*")
                     if path.is_file() and ".git" in path.parts and "objects" not in path.parts)
    found += ["a URL's password"] * (password.encode() in text)
    matrix.record(74, len(secrets) + 1 - len(found), len(secrets) + 1, f"kinds found: {found or 'none'}")


def problem_of(act):
    """The error that an attempt ends with."""
    with pytest.raises(EliteError) as caught:
        act()
    return caught.value


def test_a_login_is_told_to_its_own_host_alone():
    url, login = checkout.split_login("https://me:to%40ken@forge.example:8443/team/code.git")
    assert url == "https://forge.example:8443/team/code.git"
    for host, told in (("forge.example:8443", "username=me\npassword=to@ken\n"), ("forge.example", ""),
                       ("evil.example", "")):
        line, environment = checkout.command(["credential", "fill"], checkout.SCHEMES, login)
        assert "to@ken" not in " ".join(line)
        done = subprocess.run(line, env=environment, input=f"protocol=https\nhost={host}\n\n", text=True,
                              capture_output=True, check=False)
        assert done.stdout.removeprefix(f"protocol=https\nhost={host}\n") == told


ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class Page(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.names, self.values = [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.values += [str(value) for _, value in attrs]


def test_a_report_and_the_console_make_nothing_of_what_texts_hold(tmp_path, matrix):
    style = report.STYLE.read_text(encoding="utf-8")
    calm = Page(report.page(gather(finished(tmp_path / "calm", steps=3).path), style))
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(calm.tags)
    policy, bad = "default-src 'none'; style-src 'sha256-", []
    for index, payload in enumerate(SCRIPTS):
        run = finished(tmp_path / str(index), hostile=payload, steps=3).path
        html = report.page(gather(run), style)
        page, log = Page(html), run / "train.log"
        log.write_text(f"Step 1 {payload}\nstep 2\n", encoding="utf-8")
        console = shown(lambda screen, run=run: stages.result(screen, summary(run)))
        console += shown(lambda screen, payload=payload: screen.print(plain(payload)))
        inert = {"elements": page.tags == calm.tags, "attributes": page.names == calm.names,
                 "links": not any("javascript:" in value for value in page.values), "policy": policy in html,
                 "marks": not ACTING.search(html), "console": not ACTING.search(console)}
        bad += [(payload[:40], name) for name, holds in inert.items() if not holds]
    matrix.record(75, len(SCRIPTS) - len({payload for payload, _ in bad}), len(SCRIPTS),
                  f"not inert: {bad or 'none'}")


def test_files_that_a_run_writes_whole_are_their_owners_alone_whatever_the_umask(tmp_path, monkeypatch,
                                                                                matrix):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    origin = write_tree(tmp_path / "origin", {"a.py": FUNCTION.format(name="a")})
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(origin, *line)
    open_to_others, tried = [], 0
    for umask in (0o000, 0o022, 0o002):
        before = os.umask(umask)
        try:
            run = tmp_path / f"run{umask}"
            training_of(run).train()
            write_text(run / "config.yaml", "a: 1\n")
            made = tmp_path / f"made{umask}"
            write_text(made / "plan.json", "{}\n")
            lock = RunLock(run)
            lock.take()
            lock.release()
            locate(origin.as_uri())
            os.close(launcher.start([sys.executable, "-c", ""], dict(os.environ), run / "train.log", 0)[1])
            fault = Path(_save_traceback(ValueError("x"), run))
        finally:
            os.umask(before)
        closed = [made, run / "config.yaml", run / ".command.lock", run / "train.log", fault,
                  checkout.cache_folder(), *checkout.cache_folder().iterdir(), *run.glob("checkpoint-*")]
        tried += len(closed)
        open_to_others += [(path.name, oct(umask)) for path in closed if path.stat().st_mode & 0o077]
        shutil.rmtree(tmp_path / "cache")
    matrix.record(77, tried - len(open_to_others), tried, f"open to others: {open_to_others or 'none'}")
