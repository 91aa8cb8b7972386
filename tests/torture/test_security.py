"""Rows 67 to 80 of docs/reliability.md: files, repositories, texts and networks made to hurt."""

import ast
import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import forked
import huggingface_hub
import jinja2
import pytest
import torch
from report_samples import finished
from rich.console import Console
from run_maker import SMALL, configure, dataset_at
from security_repositories import CANARY, FLIP, SCRIPTS, arguments, bases, trapped
from security_slots import (
    ASKED,
    BASE_FILES,
    CHECKPOINT_FILES,
    DATASET_FILES,
    FOREIGN_FILES,
    asking,
    copy,
    pickles,
    recount,
    reseal,
    without_fast_form,
)
from trainer_fakes import training_of

from benchmarks.secrets_recall import planted
from tests.checkpoints import make_tiny_checkpoint
from tests.dataset.repositories import FUNCTION, git, write_tree
from tests.stores import make_store
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
from training.errors import DataError, EliteError, UsageError
from training.hardware.profiler import HardwareProfiler
from training.manager import launcher, report
from training.manager.facts import gather, summary
from training.manager.lock import RunLock
from training.records import HardwareProfile
from training.rundir import RunDirectory, write_record, write_text
from training.settings import Config, parse_assignment, problems_in, read_yaml
from training.trainer import checkpoints
from training.trainer.loading import load

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ADAPTER = {"lora.enabled": True, "lora.targets": ["q_proj"], "model.quantization": "none",
           "dataset.context_tokens": 96, "dataset.target_tokens": 32}
CPU_ONLY = HardwareProfile(name="here", source="measured", date="", system="", cpu_name="", cpu_cores=1,
                           cpu_flags=(), ram_total_bytes=8 << 30, ram_available_bytes=6 << 30, gpus=(),
                           disk_path="/", disk_free_bytes=1 << 30)
WEIGHT_NAMES = ("pytorch_model.bin", "model.safetensors", "tokenizer.model", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model folder."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("bases") / "phi", "phi", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, base):
    """A dataset with that base's tokenizer."""
    return make_store(tmp_path_factory.mktemp("stores") / "phi", base)


@pytest.fixture
def calls(monkeypatch):
    """Every attempt to reach a network, which fails."""
    made = []

    def refuse(*arguments, **_):
        made.append(arguments[1:])
        raise OSError("there is no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return made


@pytest.fixture
def started(monkeypatch):
    """The command line of every process that is started."""
    lines, popen = [], subprocess.Popen

    class Noted(popen):
        def __init__(self, line, *rest, **more):
            lines.append(" ".join(map(str, line)))
            super().__init__(line, *rest, **more)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return lines


def outcome(act):
    """What an attempt to read something came to."""
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return "read"


def loaded(folder, store):
    """Everything that is done with a base model folder: its sizes, its tokenizer, its weights."""
    for act in (lambda: models.resolve(str(folder)),
                lambda: tokenizers_.load_base(str(folder), "", {}, folder / "tokenizer"),
                lambda: load(Config(ADAPTER | {"model.base": str(folder)}), store, CPU)):
        yield outcome(act)


def in_the_place_of_weights(base, forms):
    """Base folders whose weights, shards or tokenizer are a pickle; the folder of each."""
    for form, data in forms.items():
        for name in WEIGHT_NAMES:
            folder = copy(base, "spoiled")
            if name in WEIGHT_NAMES[:2]:
                (folder / "model.safetensors").unlink()
            if name.startswith("tokenizer"):
                (folder / "tokenizer.json").unlink()
            if name.startswith("adapter"):
                (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
            (folder / name).write_bytes(data)
            yield f"{name}, {form}", folder
        folder = copy(base, "spoiled")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "one.bin"}}')
        (folder / "one.bin").write_bytes(data)
        yield f"shard, {form}", folder
    folder = copy(base, "spoiled")
    for name in BASE_FILES:
        (folder / name).write_bytes(forms["pickle"])
    yield "files beside the weights", folder


def spoiled_checkpoints(run, forms):
    """Checkpoints with a pickle in the place of a file or beside them, with manifests old and made anew."""
    original = next(run.glob("checkpoint-*"))
    for form, data in forms.items():
        for name in (*CHECKPOINT_FILES, *FOREIGN_FILES):
            for right in (False, True):
                folder = copy(run, "spoiled")
                checkpoint = folder / original.name
                (checkpoint / name).write_bytes(data)
                if right and name != checkpoints.MANIFEST:
                    reseal(checkpoint)
                yield f"{name}, {form}, manifest {'made anew' if right else 'as it was'}", folder


def resumed(run):
    """A checkpoint read as a session reads it."""
    found, _ = checkpoints.newest_valid(run)
    if found:
        checkpoints.read_identity(found)
        checkpoints.load(found)


def opened(dataset):
    """A dataset read as a session reads it."""
    found = WindowStore.open(dataset)
    found.window("train", 0)
    found.completions()
    tokenizers_.open_folder(dataset / "tokenizer", {})


@pytest.mark.real
def test_no_slot_unpickles_anything(tmp_path, base, store, matrix):
    marker = tmp_path / "marker"
    forms = pickles(marker)
    pickle.loads(forms["pickle"])
    marker.rmdir()          # or the payload would not be armed
    run, tried, ran = tmp_path / "run", 0, []
    training_of(run).train()

    def check(name, act):
        nonlocal tried
        tried += 1
        outcome(act)
        if marker.exists():
            ran.append(name)
            marker.rmdir()

    for name, folder in in_the_place_of_weights(base, forms):
        check(name, lambda folder=folder: list(loaded(folder, store)))
    for name, folder in spoiled_checkpoints(run, forms):
        check(name, lambda folder=folder: resumed(folder))
    for name in DATASET_FILES:
        for form, data in forms.items():
            dataset = copy(store.path, "spoiled")
            (dataset / name).write_bytes(data)
            with contextlib.suppress(ValueError):
                recount(dataset)
            check(f"{name}, {form}", lambda dataset=dataset: opened(dataset))
    dataset = copy(store.path, "spoiled")
    about = json.loads((dataset / "manifest.json").read_text())
    about["store"]["dtype"] = "O"  # numpy would take the file's bytes for addresses of objects
    (dataset / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="names a type of tokens that is none"):
        WindowStore.open(dataset)
    matrix.record(67, tried - len(ran), tried, f"pickles in {tried} slots; run: {ran or 'none'}")


def test_weights_that_are_a_pickle_are_refused_by_their_format(base, store):
    folder = copy(base, "pickled")
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EliteError, match="the weights are a pickle"):
        models.resolve(str(folder))
    assert list(loaded(folder, store)) == ["MissingInput", "read", "MissingInput"]


@pytest.mark.real
def test_a_base_folder_that_asks_for_its_own_code_gets_none_of_it_run(tmp_path, base, store, calls, matrix):
    marker, bad = tmp_path / "marker", []
    for name, keys in ASKED.items():
        for fast in (True, False):
            folder = asking(base, name, keys, marker)
            if not fast:
                without_fast_form(folder)
            told = list(loaded(folder, store))
            unknown = set(told) - {"read", "DataError", "MissingInput", "UsageError"}
            if marker.exists() or calls or unknown:
                bad.append((name, told, list(calls)))
                calls.clear()
                marker.exists() and marker.rmdir()
    matrix.record(68, 2 * len(ASKED) - len(bad), 2 * len(ASKED), f"code run, networks asked: {bad or 'none'}")


TEMPLATES = ("{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
             "{{ 'x' * 10**9 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
             "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{" * 100_000, "{% include '/etc/passwd' %}")


def test_no_chat_template_is_ever_rendered(tmp_path, base, store, monkeypatch, matrix):
    compiled, safe, compile_plain = [], 0, jinja2.Environment.compile

    def compiling(self, source, *arguments, **named):
        """Libraries have templates of their own."""
        if source in TEMPLATES:
            compiled.append(source)
        return compile_plain(self, "" if source in TEMPLATES else source, *arguments, **named)

    monkeypatch.setattr(jinja2.Environment, "compile", compiling)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for template in TEMPLATES:
        for fast in (True, False):
            folder = copy(base, "templated")
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
            (folder / "chat_template.jinja").write_text(template)
            if not fast:
                without_fast_form(folder)
            began_s = time.process_time()
            assert list(loaded(folder, store)) == ["read"] * 3
            safe += not compiled and time.process_time() - began_s < 5
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 512 << 10
    called = [path.name for path in (ROOT / "training").rglob("*.py")
              for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(node, ast.Attribute) and "chat_template" in node.attr]
    assert called == []
    matrix.record(69, safe, 2 * len(TEMPLATES), "hostile templates; none is compiled")


YAMLS = (
    "a: !!python/object/apply:os.mkdir [{marker}]", "!!python/name:os.system", "a: !!python/module:os",
    "a: !!python/object/new:os.mkdir [{marker}]", "a: !!python/object:os.stat_result {{}}",
    "a: !!python/tuple [1]", "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{marker}]",
    "%TAG ! tag:yaml.org,2002:python/object/\n---\na: !apply:os.mkdir [{marker}]", "a: !own x",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "a: &a [*a]", "a: &a {{x: 1}}\nb: {{<<: *a}}",
    "<<: {{a: 1}}",
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, "{{a: " * 60_000, "- " * 100_000, "? " * 100_000,
    "\n".join(" " * depth + "a:" for depth in range(600)), "a: " + "[" * 300 + "]" * 300,
    "a: 1\na: 2", "training: {{epochs: 1, 'epochs': 2}}", "training:\n  epochs: 1\ntraining:\n  epochs: 2",
    "training: {{epochs: 1}}\ntraining.epochs: 2", "a: " + "1" * 5_000, "a: 1" + ":1" * 100_000,
    "training.epochs: 1" + ":59" * 2_000, "a: 2001-13-01", "a: 0b_", "a: 0x_", "a: !!int x", "a: !!bool x",
    "a: !!float x", "a: !!timestamp x", "a: !!map x", "a: !!seq x", "a: !!str [1]", "a: \0",
    "a: 1\n---\nb: 2", "[1]: 2", "~: 1", "".join(f"a{index}: 1\n" for index in range(20_000)),
    "a: [" + "1," * 100_000 + "]", "a: '" + "x" * 200_000 + "'", "a: " + "x" * 2_000_000, "a: !!set {{x, x}}",
    "training: {{epochs: !!omap [a: 1]}}", "training: {{epochs: 1e999}}", "training: {{epochs: 2001-01-01}}")


def test_yaml_that_is_no_plain_configuration_is_refused_within_a_second(tmp_path, matrix):
    marker, bad = tmp_path / "marker", []
    for index, text in enumerate(YAMLS):
        text = text.format(marker=marker) if "{" in text else text
        path = tmp_path / f"{index}.yaml"
        path.write_text(text)
        began_s = time.process_time()
        told = refusal(path)
        seconds = time.process_time() - began_s
        assignment = outcome(lambda text=text: parse_assignment(f"training.epochs={text[:100_000]}"))
        if told != UsageError.exit_code or assignment != "read" or seconds > 1 or marker.exists():
            bad.append((text[:40], told, assignment, round(seconds, 2)))
    matrix.record(70, len(YAMLS) - len(bad), len(YAMLS), f"wrong: {bad or 'none'}")


def refusal(path):
    """The exit code that a configuration file ends with, 0 for one that is accepted."""
    try:
        values = read_yaml(path)
        return UsageError.exit_code if problems_in(values, str(path)) else 0
    except EliteError as error:
        return error.exit_code


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


class Hub(BaseHTTPRequestHandler):
    """A hub that answers as its class is told, and keeps what it was asked with."""

    def do_GET(self):
        self.asked.append(dict(self.headers))
        self.answer(self)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub(answer):
    """A hub on this machine; its address and what it was asked with."""
    kind = type("OneHub", (Hub,), {"answer": staticmethod(answer), "asked": []})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", kind.asked
        server.shutdown()
        thread.join()


def sent(handler, body, length=None, code=200, **headers):
    """Answer with this body, and a length that may be wrong."""
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body)
    handler.close_connection = True


ANSWERS = {"cut off": lambda handler: sent(handler, b'{"a": 1', length=9_000),
           "too large": lambda handler: sent(handler, b'{"a": "' + b"x" * (11 << 20) + b'"}'),
           "no JSON": lambda handler: sent(handler, b"\x80\x04pickle"),
           "nested": lambda handler: sent(handler, b"[" * 500_000),
           "no mapping": lambda handler: sent(handler, b"[1]"),
           "no HTTP": lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"),
           "to a file": lambda handler: sent(handler, b"", code=302, Location="file:///etc/passwd"),
           "to itself": lambda handler: sent(handler, b"", code=302, Location=handler.path),
           "429": lambda handler: sent(handler, b"{}", code=429),
           "500": lambda handler: sent(handler, b"", code=500)}


def test_a_hub_that_answers_wrongly_gives_nothing_and_another_host_no_token(monkeypatch, base, matrix):
    monkeypatch.setenv("HF_TOKEN", "a token")
    bad = []
    for name, answer in ANSWERS.items():
        with hub(answer) as (address, _):
            monkeypatch.setenv("HF_ENDPOINT", address)
            if weights.hub_config("org/name") is not None:
                bad.append(name)
            if outcome(lambda: weights.hub_problem("org/name")) != "read":
                bad.append(f"{name}, asked")
    with hub(lambda handler: sent(handler, b"{}")) as (other, asked_there):
        there = other.replace("127.0.0.1", "localhost")
        with hub(lambda handler: sent(handler, b"", code=302, Location=there)) as (address, asked):
            monkeypatch.setenv("HF_ENDPOINT", address)
            assert weights.hub_config("org/name") == {}
        assert asked[0]["Authorization"] == "Bearer a token"
        bad += ["the token"] * ("Authorization" in asked_there[0])
    for name in ("model.safetensors", "config.json"):
        folder = copy(base, "half-downloaded")
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, at=folder, **__: str(at))
        with pytest.raises(EliteError, match="not whole after the download"):
            models._download(models.registry()["phi-2"], lambda *_: None, "")
    matrix.record(78, len(ANSWERS) + 3 - len(bad), len(ANSWERS) + 3, f"taken: {bad or 'none'}")


@pytest.mark.real
def test_a_training_needs_no_network(tmp_path, matrix):
    source, tries, done, ways = dataset_at(tmp_path / "made"), matrix.count(2, 20), 0, Counter()
    for index in range(tries):
        run, attempts = tmp_path / str(index), tmp_path / f"attempts{index}"
        shutil.copytree(source, run)
        configure(run)
        forked.server().run(Path(__file__).with_name("security_offline.py"), run / "train.log",
                            {"run": str(run), "attempts": str(attempts)})
        ways[(run / "train.log").read_text().splitlines()[0]] += 1
        state = json.loads((run / "result.json").read_text())["state"]
        done += state == "done" and not attempts.exists()
    matrix.record(80, done, tries, f"trainings without a network, {dict(ways)}; attempts to connect: none")
