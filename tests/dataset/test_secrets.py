import ast
import dataclasses
import json
import random
import time
from pathlib import Path

import pytest
import rich
import yaml
from repositories import EMAIL_PACKAGE, JSON_PACKAGE, make, settings, write_tree

from benchmarks.secrets_recall import ALNUM, FORMATS, false_alarms, missed, planted, recall
from training.dataset import DatasetGenerator
from training.dataset.sources import personal, scan
from training.dataset.sources.secrets import KINDS, entropy, is_mixed, looks_random, placeholder, redact

PLANTED = planted(11)


def of_kind(kind: str) -> list:
    return [item for item in PLANTED if item.kind == kind]


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_is_found_wherever_it_stands(seed):
    kinds = recall(seed)
    assert len(kinds) >= 50
    assert {kind: counts for kind, counts in kinds.items() if 2 * counts[0] < counts[1]} == {}
    assert sum(found == count for found, count in kinds.values()) >= 28 / 30 * len(kinds)
    assert len(missed(seed)) <= 0.01 * sum(count for _, count in kinds.values())


@pytest.mark.parametrize("kind", sorted(set(FORMATS) | {"private-key"}))
def test_a_published_format_is_named_by_its_rule(kind):
    named = 0
    for item in of_kind(kind):
        clean, found = redact(item.text, item.path)
        named += [finding.rule for finding in found] == [kind] and placeholder(kind) in clean
    assert named >= 0.75 * len(of_kind(kind))


def test_the_same_text_without_its_value_is_left_as_it_is():
    """What stands around a credential is no reason to replace anything: the value is."""
    for item in PLANTED:
        if item.kind not in ("private-key", "docker-login"):
            plain = item.text.replace(item.value, "value")
            assert redact(plain, item.path) == (plain, ()), plain


def test_only_the_value_is_replaced_and_text_in_quotes_still_parses():
    parsers = {".py": ast.parse, ".json": json.loads, ".yaml": yaml.safe_load}
    parsed = 0
    for item in PLANTED:
        clean, found = redact(item.text, item.path)
        assert redact(clean, item.path) == (clean, ()), "a placeholder is no secret"
        if item.kind != "private-key" and item.value not in clean and len(found) == 1:
            before, _, after = clean.partition(placeholder(found[0].rule))
            assert item.text.startswith(before)
            assert item.text.endswith(after)
        if parser := parsers.get(Path(item.path).suffix):
            parser(clean)
            parsed += 1
    assert parsed > 150


def test_a_finding_says_path_line_and_rule_and_no_byte_of_the_value():
    for item in PLANTED:
        _, found = redact("first = 1\n" + item.text, item.path)
        for finding in found:
            fields = dataclasses.asdict(finding)
            assert set(fields) == {"path", "line", "rule"}
            assert finding.path == item.path
            assert 2 <= finding.line <= 2 + item.text.count("\n")
            assert finding.rule in KINDS or finding.rule in personal.KINDS
            written = json.dumps(fields)
            drawn = item.value[-16:]
            assert not any(drawn[start:start + 6] in written for start in range(len(drawn) - 5))


def test_lines_are_counted_over_earlier_findings():
    key = of_kind("private-key")[0].text
    token = of_kind("npm-token")[0].value
    _, found = redact(f"a\n{key}b\nx = '{token}'; y = '{token}'\n'{token}'\n", "a.txt")
    assert [(finding.line, finding.rule) for finding in found] == [
        (2, "private-key"), (17, "npm-token"), (17, "npm-token"), (18, "npm-token")]


@pytest.mark.parametrize("line", [
    'password = "password"', 'token = "your_token_here"', 'API_KEY = os.environ["SERVICE_API_KEY"]',
    'key = "user.profile.settings.name"', "url = 'https://user:password@example.org'",
    'if "-----BEGIN PRIVATE KEY-----" in x:', 'KEY = "-----BEGIN PRIVATE KEY-----" + body()',
    'SECRET_KEY_PATH = "/etc/service/keys/main2.pem"', 'sha = "da39a3ee5e6b4b0d3255bfef95601890afd80709"',
    'token_type = "HiggsAudioV2TokenizerModel"', "ftp://{user}:{password}@{host}/", "TOKEN_LIMIT=4096",
    "def sk_learn_model_selection_is_a_long_function_name(): pass", "key='param:secp384r1.pem'",
    'secret = "${{ secrets.DEPLOY_TOKEN_2024 }}"', 'toolskey = "VS%0.f0COMNTOOLS" % version',
    'data = "key2=value2x&key3=value3&key4=value4"', "https://site.io/get?key2=value2&key1=value1",
    "git clone git@host.io:a/b1.git", "pattern = 'pattern1234567.abcdef'",
    'public_key = "MIIBIjANBgkqhkiG9w0BAQ"',
    'cache_key = "3f7a9c0d2e5b8f1a4c6d"', "import sklearn  # sk-learn-2024-release-notes-and-more"])
def test_ordinary_code_is_left_as_it_is(line):
    assert redact(line + "\n", "a.py") == (line + "\n", ())


def test_real_packages_hold_no_false_alarm():
    files = 0
    for package in (JSON_PACKAGE, EMAIL_PACKAGE, Path(rich.__file__).parent, Path(pytest.__file__).parent):
        found, counts = false_alarms(Path(package))
        files += counts["files"]
        assert found == [], package
    assert files > 100


def test_two_secrets_on_a_line_are_both_replaced_and_text_between_stays():
    first, second = of_kind("github-token")[0].value, of_kind("npm-token")[0].value
    clean, found = redact(f"a('{first}', 'mid', '{second}')", "a.py")
    assert clean == "a('<secret:github-token>', 'mid', '<secret:npm-token>')"
    assert len(found) == 2


def test_a_secret_behind_other_scripts_and_at_the_edge_of_a_block_is_found(monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 64)
    token = of_kind("github-token")[0].value
    password = "".join(random.Random(4).choices(ALNUM, k=24))
    for shift in range(70):
        text = "ключ \U0001f511 " + "x " * shift + f"'{token}' joe@site-of-joe.io api_key = '{password}'\n"
        clean, found = redact(text, "a.py")
        assert [finding.rule for finding in found] == ["github-token", "email", "generic-secret"], shift
        assert clean == ("ключ \U0001f511 " + "x " * shift
                         + "'<secret:github-token>' <personal:email> api_key = '<secret:generic-secret>'\n")


def test_no_planted_secret_reaches_any_file_of_the_dataset(tmp_path):
    values = [item for item in {item.kind: item for item in PLANTED if item.path.endswith(".py")}.values()
              if item.kind != "private-key"]
    files = {f"part{index}.py": f"def use_{index}(client):\n    return client({index})\n\n\n{item.text}"
             for index, item in enumerate(values)}
    manifest, store = make(write_tree(tmp_path / "repo", files), tmp_path / "run", context_tokens=128,
                           target_tokens=128)
    samples = DatasetGenerator(settings(tmp_path / "repo"), tmp_path / "run").samples(10_000)
    text = "".join(sample["context"] + sample["target"] for sample in samples)
    written = text + "".join(path.read_text() for path in store.path.rglob("*.json"))
    assert len(values) > 40
    for item in values:
        assert item.value.rstrip("=")[-20:] not in written, item.kind
    assert manifest["secrets_replaced"] >= len(values)
    assert "<secret:github-token>" in text


BEGIN = "-----BEGIN " + "PRIVATE KEY-----"


@pytest.mark.parametrize("piece", [
    "a", "1", "a1 ", "-----BEGIN", BEGIN, BEGIN + "A" * 15_000 + "!", "key=", "key='\"", "'\"`", '{"key": ',
    "://a:", "://a:b1@", "@", "a@b.", "+1 ", "+49 30 1234 ", "1.2.3.4 ", "1.1.", "2001:abcd:", ":2a00:",
    "DE89 ", "12345678 ", "4111 1111 1111 1111 ", "token_token_token_1 = ", "keykeykeykey1 ",
    'key="a1b2c3d4e5f6', "a;password=a1b2c3d4e5;",
    "joe@site.io ", "authorization: bearer a1b2c3d4e5f6 ",
    "aws key aB3/aB3/aB3/aB3/aB3/aB3/aB3/aB3/aB3/aB3/ "])
def test_hostile_text_takes_time_in_proportion_to_its_length(piece):
    def seconds(size: int) -> float:
        started = time.process_time()
        redact((piece * (size // len(piece) + 1))[:size], "a.py")
        return time.process_time() - started

    small, large = seconds(25_000), seconds(100_000)
    assert large < 4
    assert large < 12 * max(small, 0.02)


def test_entropy_and_mixture_tell_random_text_from_names():
    assert entropy("") == 0.0
    assert entropy("abcd" * 8) == 2.0
    rng = random.Random(5)
    drawn = ["".join(rng.choices(ALNUM, k=24)) for _ in range(300)]
    assert sum(map(is_mixed, drawn)) > 260
    assert sum(map(looks_random, drawn)) > 285
    assert not any(map(is_mixed, ["ApplicationConfigurationBuilder", "some_snake_case", "utf8_general_ci"]))
