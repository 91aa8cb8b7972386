"""Rows 67 to 70 and 78 to 80 of docs/reliability.md: files and networks made to hurt."""

import ast
import contextlib
import json
import pickle
import resource
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import forked
import huggingface_hub
import jinja2
import pytest
import torch
from run_maker import configure, dataset_at
from security_slots import (
    ASKED,
    BASE_FILES,
    CHECKPOINT_FILES,
    DATASET_FILES,
    FOREIGN_FILES,
    asking,
    copy,
    outcome,
    pickles,
    recount,
    reseal,
    without_fast_form,
)
from trainer_fakes import training_of

from tests.checkpoints import make_tiny_checkpoint
from tests.stores import make_store
from training import models, weights
from training.dataset import tokenizer as tokenizers_
from training.dataset.store import WindowStore
from training.errors import DataError, EliteError, UsageError
from training.settings import Config, parse_assignment, problems_in, read_yaml
from training.trainer import checkpoints
from training.trainer.loading import load

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")
ADAPTER = {"lora.enabled": True, "lora.targets": ["q_proj"], "model.quantization": "none",
           "dataset.context_tokens": 96, "dataset.target_tokens": 32}
WEIGHT_NAMES = ("pytorch_model.bin", "model.safetensors", "tokenizer.model", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model folder."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("bases") / "phi", "phi", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, base):
    """A dataset with that base's tokenizer."""
    return make_store(tmp_path_factory.mktemp("stores") / "phi", base)


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
