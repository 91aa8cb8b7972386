import random
import string
import time
from pathlib import Path

import pytest
import rich
from repositories import EMAIL_PACKAGE, JSON_PACKAGE, make, write_tree

from training.dataset.sources.secrets import KINDS, redact

ALNUM, HEX = string.ascii_letters + string.digits, "0123456789abcdef"


def draw(alphabet: str, length: int, seed: int = 7) -> str:
    """Characters that no scanner has seen, made here so that no file holds a whole token."""
    rng = random.Random(seed)
    return "".join(rng.choice(alphabet) for _ in range(length))


PLANTED = {
    "private-key": "-----BEGIN RSA " + "PRIVATE KEY-----\n" + draw(ALNUM + "+/", 64) + "\n" + draw(ALNUM, 64,
                                                                                                   8)
                   + "\n-----END RSA " + "PRIVATE KEY-----",
    "aws-access-key": "AKIA" + draw(string.ascii_uppercase + "234567", 16),
    "aws-secret-key": 'aws_secret_access_key = "' + draw(ALNUM + "/+", 40) + '"',
    "github-token": "ghp_" + draw(ALNUM, 36), "github-fine-grained-token": "github_pat_" + draw(ALNUM, 82),
    "gitlab-token": "glpat-" + draw(ALNUM, 20),
    "slack-token": "xoxb-" + draw(string.digits, 12) + "-" + draw(ALNUM, 24),
    "slack-webhook": "https://hooks.slack.com/services/" + "T" + draw(ALNUM, 8) + "/B" + draw(ALNUM, 8) + "/"
                     + draw(ALNUM, 24),
    "stripe-key": "sk_" + "live_" + draw(ALNUM, 24), "google-api-key": "AIza" + draw(ALNUM, 35),
    "google-oauth-secret": "GOCSPX-" + draw(ALNUM, 28), "google-oauth-token": "ya29." + draw(ALNUM, 60),
    "openai-key": "sk-" + draw(ALNUM, 20) + "T3Blbk" + "FJ" + draw(ALNUM, 20, 9),
    "anthropic-key": "sk-ant-" + "api03-" + draw(ALNUM, 90), "hugging-face-token": "hf_" + draw(ALNUM, 34),
    "npm-token": "npm_" + draw(ALNUM, 36), "pypi-token": "pypi-" + "AgEIcHlwaS5vcmc" + draw(ALNUM, 70),
    "rubygems-token": "rubygems_" + draw(HEX, 48),
    "sendgrid-key": "SG." + draw(ALNUM, 22) + "." + draw(ALNUM, 43),
    "mailgun-key": "mailgun: key-" + draw(HEX, 32), "mailchimp-key": "mailchimp " + draw(HEX, 32) + "-us12",
    "twilio-key": "twilio SK" + draw(HEX, 32),
    "telegram-token": draw("123456789", 9) + ":AA" + draw(ALNUM, 33),
    "discord-token": "discord: M" + draw(ALNUM, 23) + "." + draw(ALNUM, 6) + "." + draw(ALNUM, 30),
    "shopify-token": "shpat_" + draw(HEX, 32), "square-token": "sq0atp-" + draw(ALNUM, 22),
    "digitalocean-token": "dop_v1_" + draw(HEX, 64), "docker-token": "dckr_pat_" + draw(ALNUM, 27),
    "databricks-token": "dapi" + draw(HEX, 32), "vault-token": "hvs." + draw(ALNUM, 90),
    "grafana-token": "glsa_" + draw(ALNUM, 32) + "_" + draw(HEX, 8),
    "doppler-token": "dp.pt." + draw(ALNUM, 43),
    "linear-key": "lin_api_" + draw(ALNUM, 40), "notion-token": "ntn_" + draw(ALNUM, 46),
    "new-relic-key": "NRAK-" + draw(string.ascii_uppercase + string.digits, 27),
    "postman-key": "PMAK-" + draw(HEX, 24) + "-" + draw(HEX, 34),
    "atlassian-token": "ATATT3" + draw(ALNUM, 180),
    "azure-storage-key": "AccountName=a;AccountKey=" + draw(ALNUM + "+/", 86) + "==;",
    "age-secret-key": "AGE-SECRET-" + "KEY-1" + draw(string.ascii_uppercase + string.digits, 58),
    "json-web-token": "eyJ" + draw(ALNUM, 30) + ".eyJ" + draw(ALNUM, 60) + "." + draw(ALNUM, 43),
    "authorization-header": '"Authorization": "Bearer ' + draw(ALNUM, 40) + '"',
    "url-password": "postgres://app:" + draw(ALNUM, 16) + "@db.example.org/x",
    "generic-secret": 'api_key = "' + draw(ALNUM, 32) + '"',
    "environment-secret": "export SERVICE_TOKEN=" + draw(ALNUM, 32),
    "discord-webhook": "https://discord.com/api/webhooks/" + draw(string.digits, 18) + "/" + draw(ALNUM, 68),
}


def test_there_is_a_planted_example_of_every_kind():
    assert set(PLANTED) == set(KINDS)
    assert len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_replaced_by_its_placeholder_once(kind):
    text = f"before = 1\n{PLANTED[kind]}\nafter = 2\n"
    clean, found = redact(text, "a.py")
    assert [finding.rule for finding in found] == [kind]
    assert found[0].line >= 2
    assert clean.startswith("before = 1\n")
    assert clean.endswith("\nafter = 2\n")
    assert f"<secret:{kind}>" in clean
    assert redact(clean, "a.py") == (clean, ())


@pytest.mark.parametrize("line", [
    'password = "password"', 'token = "your_token_here"', 'API_KEY = os.environ["SERVICE_API_KEY"]',
    'key = "user.profile.settings.name"', "url = 'https://user:password@example.org'",
    'if "-----BEGIN PRIVATE KEY-----" in x:',
    'SECRET_KEY_PATH = "/etc/service/keys/main2.pem"', 'sha = "da39a3ee5e6b4b0d3255bfef95601890afd80709"',
    'token_type = "HiggsAudioV2TokenizerModel"', "ftp://{user}:{password}@{host}/", "TOKEN_LIMIT=4096",
    "def sk_learn_model_selection_is_a_long_function_name(): pass",
    'secret = "${{ secrets.DEPLOY_TOKEN_2024 }}"'])
def test_ordinary_code_is_left_as_it_is(line):
    assert redact(line + "\n", "a.py") == (line + "\n", ())


def test_real_packages_hold_no_false_alarm():
    for package in (JSON_PACKAGE, EMAIL_PACKAGE, Path(rich.__file__).parent):
        for path in Path(package).rglob("*.py"):
            assert redact(path.read_text(encoding="utf-8"), path.name)[1] == (), path


def test_two_secrets_on_a_line_are_both_replaced_and_text_between_stays():
    first, second = PLANTED["github-token"], PLANTED["npm-token"]
    clean, found = redact(f"a('{first}', 'mid', '{second}')", "a.py")
    assert clean == "a('<secret:github-token>', 'mid', '<secret:npm-token>')"
    assert len(found) == 2


def test_no_planted_secret_reaches_any_file_of_the_dataset(tmp_path):
    values = {kind: text for kind, text in PLANTED.items() if kind != "private-key"}
    files = {f"part{index}.py": f"def use_{index}(client):\n"
             f"    value = '''\n{text}\n'''\n    return client(value)\n"
             for index, text in enumerate(values.values())}
    manifest, store = make(write_tree(tmp_path / "repo", files), tmp_path / "run", context_tokens=128,
                           target_tokens=128)
    text = "".join(sample["context"] + sample["target"] for sample in _all_samples(tmp_path))
    written = text + "".join(path.read_text() for path in store.path.rglob("*.json"))
    for kind in values:
        core = max((part for part in PLANTED[kind].replace('"', " ").replace("/", " ").split()), key=len)
        assert core[-20:] not in written, kind
    assert manifest["secrets_replaced"] == len(values)
    assert {"path", "line", "rule"} == set(manifest["secrets"][0])
    assert "<secret:github-token>" in text


def _all_samples(tmp_path):
    from repositories import settings

    from training.dataset import DatasetGenerator

    return DatasetGenerator(settings(tmp_path), tmp_path / "run").samples(10_000)


def test_a_long_line_of_letters_takes_no_quadratic_time():
    started = time.monotonic()
    for filler in ("a" * 200_000, "key=" * 50_000, "-----BEGIN PRIVATE KEY-----" * 4_000, "://a:" * 40_000):
        redact(filler, "a.py")
    assert time.monotonic() - started < 15
