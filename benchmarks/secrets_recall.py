"""Planted credentials that the redaction finds, and what it reports in real code.

    python benchmarks/secrets_recall.py [FOLDER ...]    recall by kind; alarms by path and rule in each folder

Values are drawn anew from a seed by the formats that their issuers publish, so that no file holds a whole
credential and no rule can be fitted to one.
"""

from __future__ import annotations

import base64
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.dataset.sources import personal  # noqa: E402
from training.dataset.sources.secrets import Finding, redact  # noqa: E402

MAX_BYTES = 1 << 20
LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
ALNUM, HEX, BASE32 = UPPER + LOWER + DIGITS, DIGITS + "abcdef", UPPER + "234567"
WORD, BASE64 = ALNUM + "_-", ALNUM + "+/"


class Planted(NamedTuple):
    """One credential in its surroundings; `value` must be gone from the text afterwards."""

    kind: str
    text: str
    value: str
    path: str


# Kind -> parts of the format: literals, or (alphabet, length).
FORMATS: dict[str, tuple[str | tuple[str, int], ...]] = {
    "aws-access-key": ("AK" + "IA", (BASE32, 16)),
    "github-token": ("gh" + "p_", (ALNUM, 36)),
    "github-fine-grained-token": ("github_" + "pat_", (ALNUM, 22), "_", (ALNUM, 59)),
    "gitlab-token": ("gl" + "pat-", (WORD, 19), (ALNUM, 1)),
    "slack-token": ("xo" + "xb-", (DIGITS, 12), "-", (DIGITS, 12), "-", (ALNUM, 24)),
    "slack-webhook": (
        "https://hooks.slack." + "com/services/T",
        (UPPER + DIGITS, 8),
        "/B",
        (UPPER + DIGITS, 8),
        "/",
        (ALNUM, 24),
    ),
    "stripe-key": ("sk_" + "live_", (ALNUM, 24)),
    "google-api-key": ("AI" + "za", (WORD, 34), (ALNUM, 1)),
    "google-oauth-secret": ("GOC" + "SPX-", (WORD, 27), (ALNUM, 1)),
    "google-oauth-token": ("ya" + "29.", (WORD, 120), (ALNUM, 1)),
    "openai-key": ("sk-" + "proj-", (ALNUM, 74), "T3Blbk" + "FJ", (ALNUM, 74)),
    "anthropic-key": ("sk-" + "ant-api03-", (WORD, 93), "AA"),
    "groq-key": ("gs" + "k_", (ALNUM, 52)),
    "replicate-token": ("r8" + "_", (ALNUM, 37)),
    "hugging-face-token": ("h" + "f_", (LOWER + UPPER, 34)),
    "npm-token": ("np" + "m_", (ALNUM, 36)),
    "pypi-token": ("py" + "pi-AgEIcHlwaS5vcmc", (WORD, 150), (ALNUM, 1)),
    "rubygems-token": ("ruby" + "gems_", (HEX, 48)),
    "docker-token": ("dckr_" + "pat_", (WORD, 26), (ALNUM, 1)),
    "sendgrid-key": ("S" + "G.", (WORD, 22), ".", (WORD, 42), (ALNUM, 1)),
    "mailgun-key": ("ke" + "y-", (HEX, 32)),
    "mailchimp-key": ((HEX, 32), "-us12"),
    "twilio-key": ("S" + "K", (HEX, 32)),
    "telegram-token": ((DIGITS[1:], 10), ":A" + "A", (WORD, 32), (ALNUM, 1)),
    "discord-token": ("M", (ALNUM, 25), ".", (ALNUM, 6), ".", (WORD, 37), (ALNUM, 1)),
    "discord-webhook": (
        "https://discord." + "com/api/webhooks/",
        (DIGITS[1:], 18),
        "/",
        (WORD, 67),
        (ALNUM, 1),
    ),
    "shopify-token": ("shp" + "at_", (HEX, 32)),
    "square-token": ("sq0" + "atp-", (ALNUM, 22)),
    "digitalocean-token": ("dop_" + "v1_", (HEX, 64)),
    "databricks-token": ("da" + "pi", (HEX, 32)),
    "vault-token": ("hv" + "s.", (WORD, 90), (ALNUM, 1)),
    "grafana-token": ("gl" + "sa_", (ALNUM, 32), "_", (HEX, 8)),
    "doppler-token": ("dp." + "pt.", (ALNUM, 43)),
    "linear-key": ("lin_" + "api_", (ALNUM, 40)),
    "notion-token": ("nt" + "n_", (ALNUM, 46)),
    "new-relic-key": ("NR" + "AK-", (UPPER + DIGITS, 27)),
    "postman-key": ("PM" + "AK-", (HEX, 24), "-", (HEX, 34)),
    "atlassian-token": ("ATA" + "TT3xFfGF0", (WORD, 180)),
    "airtable-token": ("pa" + "t", (ALNUM, 14), ".", (HEX, 64)),
    "figma-token": ("fi" + "gd_", (ALNUM, 40)),
    "azure-client-secret": ((ALNUM, 3), "8Q" + "~", (ALNUM, 34)),
    "age-secret-key": ("AGE-SECRET-" + "KEY-1", ("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58)),
    "json-web-token": (
        "ey" + "J",
        (ALNUM, 33),
        ".ey" + "J",
        (WORD, 120),
        (ALNUM, 1),
        ".",
        (WORD, 42),
        (ALNUM, 1),
    ),
}
# Where any credential stands: path, text around `{v}`.
SURROUNDINGS = (
    ("app/client.py", 'from service import Client\n\nclient = Client("{v}", retries=3)\n'),
    ("app/settings.py", "HOST = 'a'\nSERVICE = {{'endpoint': 'b', 'identity': '{v}'}}\n"),
    ("web/index.js", "const service = connect({{ region: 'eu', identity: '{v}' }});\n"),
    ("web/app.ts", "export const identity: string = `{v}`;\n"),
    ("deploy/values.yaml", "service:\n  region: eu\n  identity: {v}\n"),
    (".env", "REGION=eu\nIDENTITY={v}\nPORT=80\n"),
    ("main.go", 'func main() {{\n\tservice := New("{v}")\n\tservice.Run()\n}}\n'),
    ("src/Main.java", 'class Main {{\n  private static final String IDENTITY = "{v}";\n}}\n'),
    ("config.json", '{{\n  "region": "eu",\n  "identity": "{v}"\n}}\n'),
    ("main.tf", 'provider "service" {{\n  region   = "eu"\n  identity = "{v}"\n}}\n'),
    ("deploy.sh", "#!/bin/sh\nexport IDENTITY='{v}'\nservice --identity \"$IDENTITY\"\n"),
    ("README.md", "Run it with `{v}` as its first argument.\n"),
)
# Credentials that only their name tells: path, text.
NAMED = (
    ("app/settings.py", "DEBUG = False\nSECRET_KEY = '{v}'\n"),
    ("app/client.py", "def connect():\n    return Client(host='db', password=\"{v}\", timeout=3)\n"),
    ("app/config.py", "CONFIG = {{'user': 'app', 'api_key': '{v}'}}\nos.environ['SERVICE_TOKEN'] = '{v}'\n"),
    ("web/index.js", "const client = new Client({{ region: 'eu', apiKey: '{v}' }});\n"),
    ("web/app.ts", 'export const accessToken: string = "{v}";\n'),
    ("deploy/values.yaml", "database:\n  user: app\n  password: {v}\n"),
    ("deploy/pod.yaml", 'env:\n  - name: API_TOKEN\n    value: "{v}"\n'),
    (".env", "REGION=eu\nDB_PASSWORD={v}\nPORT=80\n"),
    (
        "main.go",
        'var apiKey string = "{v}"\nfunc main() {{\n\tclientSecret := "{v}"\n\tuse(clientSecret)\n}}\n',
    ),
    (
        "src/Main.java",
        'class Main {{\n  private static final String API_KEY = "{v}";\n'
        '  void f() {{ source.setPassword("{v}"); }}\n}}\n',
    ),
    ("src/main/resources/application.properties", "db.user=app\nspring.datasource.password={v}\n"),
    ("config.json", '{{\n  "user": "app",\n  "clientSecret": "{v}"\n}}\n'),
    ("main.tf", 'resource "db" "main" {{\n  username    = "app"\n  db_password = "{v}"\n}}\n'),
    ("deploy.sh", '#!/bin/sh\nexport API_TOKEN={v}\ncurl -H "X-Api-Key: {v}" https://api.service.io/\n'),
    ("settings.xml", "<server>\n  <username>app</username>\n  <password>{v}</password>\n</server>\n"),
    ("App.cs", 'var client = new Client {{ ApiKey = "{v}" }};\n'),
    ("lib.rs", 'const API_TOKEN: &str = "{v}";\n'),
)
# Kind -> (path, text, alphabet, length): what stands around is part of the format.
CONTEXTS: dict[str, tuple[tuple[str, str, str, int], ...]] = {
    "aws-secret-key": (
        ("app.py", 'session = Session(aws_secret_access_key="{v}")\n', BASE64, 40),
        ("credentials", "[default]\naws_secret_access_key = {v}\n", BASE64, 40),
        (".env", "AWS_SECRET_ACCESS_KEY={v}\n", BASE64, 40),
        ("aws.json", '{{"awsSecretAccessKey": "{v}"}}\n', BASE64, 40),
    ),
    "azure-storage-key": (
        (
            "app.py",
            "url = 'DefaultEndpointsProtocol=https;AccountName=a;AccountKey={v}==;EndpointSuffix=b'\n",
            BASE64,
            86,
        ),
        ("appsettings.json", '{{"Storage": "AccountName=a;AccountKey={v}=="}}\n', BASE64, 86),
    ),
    "azure-access-key": (
        ("app.cs", 'var bus = "Endpoint=sb://a/;SharedAccessKeyName=b;SharedAccessKey={v}=";\n', BASE64, 43),
    ),
    "authorization-header": (
        ("app.py", 'headers = {{"Authorization": "Bearer {v}"}}\n', ALNUM, 40),
        ("index.js", "fetch(url, {{ headers: {{ Authorization: `Bearer {v}` }} }});\n", ALNUM, 40),
        ("main.go", 'request.Header.Set("Authorization", "token {v}")\n', ALNUM, 40),
        ("call.sh", "curl -H 'Authorization: Basic {v}' https://api.service.io\n", ALNUM, 32),
    ),
    "url-password": (
        ("settings.py", "DATABASE_URL = 'postgres://app:{v}@db.internal:5432/main'\n", ALNUM, 16),
        (
            "docker-compose.yml",
            "services:\n  web:\n    environment:\n      - REDIS_URL=redis://:{v}@cache:6379/0\n",
            ALNUM,
            20,
        ),
        ("clone.sh", "git clone https://bot:{v}@git.service.io/a/b.git\n", ALNUM, 24),
        (
            "main.go",
            'db, err := sql.Open("postgres", "postgresql://app:{v}@db/main?sslmode=disable")\n',
            ALNUM,
            14,
        ),
    ),
    "connection-string-password": (
        (
            "appsettings.json",
            '{{"Main": "Server=db;Database=main;User Id=app;Password={v};"}}\n',
            ALNUM + "!#*",
            16,
        ),
        ("App.java", 'String url = "jdbc:sqlserver://db;user=app;password={v};encrypt=true";\n', ALNUM, 16),
        ("app.py", 'connect("host=db user=app password={v} dbname=main")\n', ALNUM, 16),
    ),
    "command-password": (
        ("call.sh", "curl -u admin:{v} https://api.service.io/\n", ALNUM, 16),
        (".netrc", "machine api.service.io login app password {v}\n", ALNUM, 20),
    ),
    "azure-signature": (
        (
            "app.py",
            "URL = 'https://a.blob.core.windows.net/c?sv=2024-08-04&se=2030-01-01&sp=r&sig={v}%3D'\n",
            ALNUM,
            43,
        ),
    ),
}


def _draw(rng: random.Random, parts: tuple[str | tuple[str, int], ...]) -> str:
    return "".join(
        part if isinstance(part, str) else "".join(rng.choices(part[0], k=part[1])) for part in parts
    )


def _password(rng: random.Random) -> str:
    return _draw(rng, ((ALNUM, 6), ("!#%*+-_", 1), (DIGITS, 2), (ALNUM, 9)))


def planted(seed: int = 0) -> list[Planted]:
    """Every kind in each of its surroundings."""
    rng = random.Random(seed)
    found = [
        Planted(kind, text.format(v=value), value, path)
        for kind, parts in FORMATS.items()
        for path, text in SURROUNDINGS
        for value in [_draw(rng, parts)]
    ]
    for kind, places in CONTEXTS.items():
        for path, text, alphabet, length in places:
            value = _draw(rng, ((alphabet, length),))
            found.append(Planted(kind, text.format(v=value), value, path))
    drawings: dict[str, Callable[[], str]] = {
        "generic-secret (letters and digits)": lambda: _draw(rng, ((ALNUM, 32),)),
        "generic-secret (hexadecimal)": lambda: _draw(rng, ((HEX, 40),)),
        "generic-secret (base64)": lambda: base64.b64encode(rng.randbytes(32)).decode(),
        "generic-secret (password)": lambda: _password(rng),
    }
    for kind, draw in drawings.items():
        for path, text in NAMED:
            value = draw()
            found.append(Planted(kind, text.format(v=value), value, path))
    return [*found, *_private_keys(rng), *_docker_logins(rng)]


def _private_keys(rng: random.Random) -> Iterator[Planted]:
    for name in ("RSA ", "EC ", "OPENSSH ", "", "ENCRYPTED "):
        lines = [_draw(rng, ((BASE64, 64),)) for _ in range(12)]
        begin, end = f"-----BEGIN {name}PRIVATE " + "KEY-----", f"-----END {name}PRIVATE " + "KEY-----"
        pem = "\n".join([begin, *lines, end])
        yield Planted("private-key", f"{pem}\n", lines[5], "deploy/server.txt")
        yield Planted("private-key", f'KEY = """{pem}"""\n', lines[5], "app/keys.py")
        yield Planted(
            "private-key", '{"private_key": "' + pem.replace("\n", "\\n") + '\\n"}\n', lines[5], "a.json"
        )
        yield Planted("private-key", "key: |\n  " + pem.replace("\n", "\n  ") + "\n", lines[5], "values.yaml")
        yield Planted(
            "private-key",
            'String key = "' + pem.replace("\n", '\\n" +\n    "') + '";\n',
            lines[5],
            "Key.java",
        )


def _docker_logins(rng: random.Random) -> Iterator[Planted]:
    login = base64.b64encode(f"app:{_draw(rng, ((ALNUM, 24),))}".encode()).decode()
    yield Planted(
        "docker-login", '{"auths": {"registry.io": {"auth": "' + login + '"}}}\n', login, "config.json"
    )


def missed(seed: int = 0) -> list[Planted]:
    """What `redact` leaves in the text (of a value with a known beginning, its last eight characters)."""
    return [item for item in planted(seed) if item.value.rstrip("=")[-8:] in redact(item.text, item.path)[0]]


def recall(seed: int = 0) -> dict[str, tuple[int, int]]:
    """Kind -> (found, planted)."""
    lost = Counter(item.kind for item in missed(seed))
    return {
        kind: (count - lost[kind], count)
        for kind, count in Counter(item.kind for item in planted(seed)).items()
    }


def read_texts(folder: Path, suffixes: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """UTF-8 files up to 1 MiB below the folder; packages installed beside are left out."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if (
            path.is_symlink()
            or not path.is_file()
            or "site-packages" in inside
            or path.stat().st_size > MAX_BYTES
        ):
            continue
        if suffixes and path.suffix not in suffixes:
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            yield path, data.decode("utf-8", "replace")


def false_alarms(
    folder: Path, suffixes: tuple[str, ...] = (".py",)
) -> tuple[list[Finding], dict[str, float]]:
    """Credentials reported in the folder's files (to be looked at: a real one is no false alarm), and counts:
    files, megabytes, CPU seconds, and personal data by kind."""
    found: list[Finding] = []
    counts: Counter[str] = Counter()
    seconds = 0.0
    for path, text in read_texts(folder, suffixes):
        started = time.process_time()
        findings = redact(text, path.relative_to(folder).as_posix())[1]
        seconds += time.process_time() - started
        counts.update(["files", *(item.rule for item in findings if item.rule in personal.KINDS)])
        counts["bytes"] += len(text.encode())
        found += [item for item in findings if item.rule not in personal.KINDS]
    return found, {**counts, "megabytes": round(counts["bytes"] / 1e6, 1), "cpu_seconds": round(seconds, 2)}


def main() -> None:
    """Print recall, then the alarms of each folder named (the standard library without one)."""
    kinds = recall()
    whole = sum(found == count for found, count in kinds.values())
    print(
        f"{whole} of {len(kinds)} kinds found in every surrounding; "
        f"{sum(found for found, _ in kinds.values()):,} of {len(planted()):,} values"
    )
    for kind, (found, count) in kinds.items():
        if found < count:
            print(f"  {kind}: {found} of {count}")
    for folder in sys.argv[1:] or [str(Path(random.__file__).parent)]:
        alarms, counts = false_alarms(Path(folder))
        print(folder, counts)
        for alarm in alarms:
            print(f"  {alarm.path}:{alarm.line} {alarm.rule}")


if __name__ == "__main__":
    main()
