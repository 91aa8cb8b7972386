"""Credentials in source text, found by keyword, pattern and entropy, and replaced by typed placeholders.

The rules follow the published formats that gitleaks (MIT) also knows. A rule's pattern runs only on text that
holds one of its keywords, so clean text costs one substring search a keyword. The value of a finding is never
kept.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from re import Pattern


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of secret. Group `secret` (or the whole match) is replaced when its entropy suffices.

    `keywords` are lower case and searched in lowered text. `min_entropy` is in bits a character.
    """

    name: str
    keywords: tuple[str, ...]
    pattern: Pattern[str]
    min_entropy: float = 0.0
    guess: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where a secret stood: path, 1-based line and rule. Never its value."""

    path: str
    line: int
    rule: str


def _rule(name: str, keywords: str, pattern: str, min_entropy: float = 0.0, guess: bool = False) -> Rule:
    return Rule(name=name, keywords=tuple(keywords.split()), pattern=re.compile(pattern),
                min_entropy=min_entropy,
                guess=guess)


def _token(prefix: str, tail: str) -> str:
    return rf"(?<![\w-]){prefix}{tail}(?![\w-])"


# Words of an assignment's left side that announce a credential.
_NAMES = (r"(?:[kK]ey|KEY|[sS]ecret|SECRET|[tT]oken|TOKEN|[pP]assw|PASSW|[pP]wd|PWD|[cC]redential"
          r"|CREDENTIAL)")

RULES: tuple[Rule, ...] = (
    _rule("private-key", "private", r"-----BEGIN[ A-Z0-9]{0,40}PRIVATE KEY(?: BLOCK)?-----"
          r"(?P<secret>(?:[\sA-Za-z0-9+/=\\\"',.:#*]|-(?!-)){64,16000}?)"
          r"-----END[ A-Z0-9]{0,40}PRIVATE KEY(?: BLOCK)?-----", 3.0),
    _rule("aws-access-key", "akia asia abia acca a3t",
          r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}(?![A-Za-z0-9])", 3.0),
    _rule("aws-secret-key", "aws",
          r"(?i:aws)[\w\s.\"'-]{0,30}?(?i:secret|key)[\w\s.\"'-]{0,20}?[=:>\s\"']{1,6}"
          r"(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])", 3.8),
    _rule("github-token", "ghp_ gho_ ghu_ ghs_ ghr_", _token("gh[pousr]_", r"[A-Za-z0-9]{36,255}"), 3.0),
    _rule("github-fine-grained-token", "github_pat_", _token("github_pat_", r"\w{36,255}"), 3.0),
    _rule("gitlab-token", "glpat- gldt- glrt- glptt- glcbt-",
          _token("gl(?:pat|dt|rt|ptt|cbt)-", r"[\w-]{20,64}"), 3.0),
    _rule("slack-token", "xox xapp-", _token("(?:xox[abeoprs]|xapp)-", r"[A-Za-z0-9-]{10,250}"), 2.8),
    _rule("slack-webhook", "hooks.slack.com",
          r"https?://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{40,60}"),
    _rule("stripe-key", "sk_live sk_test rk_live rk_test sk_prod rk_prod whsec_",
          _token("(?:[sr]k_(?:live|test|prod)|whsec)_", r"[A-Za-z0-9]{16,247}"), 3.0),
    _rule("google-api-key", "aiza", _token("AIza", r"[\w-]{35}"), 3.0),
    _rule("google-oauth-secret", "gocspx-", _token("GOCSPX-", r"[\w-]{28}"), 3.0),
    _rule("google-oauth-token", "ya29.", _token(r"ya29\.", r"[\w-]{40,400}"), 3.5),
    _rule("openai-key", "sk-",
          _token("sk-(?:proj-|svcacct-|admin-|None-)?", r"[\w-]{20,90}T3BlbkFJ[\w-]{20,90}"), 3.0),
    _rule("openai-key", "sk-", _token("sk-(?:proj-|svcacct-|admin-)?", r"(?=[\w-]*\d)[A-Za-z0-9]{40,200}"),
          3.5),
    _rule("anthropic-key", "sk-ant-", _token("sk-ant-", r"[\w-]{24,200}"), 3.0),
    _rule("hugging-face-token", "hf_ api_org_", _token("(?:hf|api_org)_", r"[A-Za-z0-9]{34,40}"), 3.5),
    _rule("npm-token", "npm_", _token("npm_", r"[A-Za-z0-9]{36}"), 3.0),
    _rule("pypi-token", "pypi-ageichlwas5vcmc", _token("pypi-AgEIcHlwaS5vcmc", r"[\w-]{40,1000}"), 3.0),
    _rule("rubygems-token", "rubygems_", _token("rubygems_", r"[a-f0-9]{48}")),
    _rule("sendgrid-key", "sg.", _token(r"SG\.", r"[\w-]{16,32}\.[\w-]{32,64}"), 3.0),
    _rule("mailgun-key", "mailgun", _token("key-", r"[a-f0-9]{32}"), 3.0),
    _rule("mailchimp-key", "mailchimp", _token("", r"[a-f0-9]{32}-us\d{1,2}"), 3.0),
    _rule("twilio-key", "twilio", _token("SK", r"[0-9a-fA-F]{32}"), 3.0),
    _rule("telegram-token", ":aa", r"(?<![\w-])\d{8,10}:AA[\w-]{32,33}(?![\w-])", 3.5),
    _rule("discord-token", "discord bot_token",
          r"(?<![\w.-])[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w.-])", 3.5),
    _rule("discord-webhook", "api/webhooks",
          r"https?://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/\d{16,20}/[\w-]{40,}"),
    _rule("shopify-token", "shpat_ shpca_ shppa_ shpss_", _token("shp(?:at|ca|pa|ss)_", r"[a-fA-F0-9]{32}")),
    _rule("square-token", "sq0atp- sq0csp- sq0idp-", _token("sq0(?:atp|csp|idp)-", r"[\w-]{22,43}"), 3.0),
    _rule("digitalocean-token", "dop_v1_ doo_v1_ dor_v1_", _token("do[opr]_v1_", r"[a-f0-9]{64}")),
    _rule("docker-token", "dckr_pat_ dckr_oat_", _token("dckr_[po]at_", r"[\w-]{24,40}"), 3.0),
    _rule("databricks-token", "dapi", _token("dapi", r"[a-f0-9]{32}(?:-\d)?"), 3.0),
    _rule("vault-token", "hvs. hvb.", _token(r"hv[sb]\.", r"[\w-]{24,300}"), 3.0),
    _rule("grafana-token", "glsa_ glc_", _token("gl(?:sa|c)_", r"[\w+/=-]{32,400}"), 3.0),
    _rule("doppler-token", "dp.", _token(r"dp\.(?:pt|st|ct|sa)\.", r"[A-Za-z0-9]{40,44}"), 3.0),
    _rule("linear-key", "lin_api_", _token("lin_api_", r"[A-Za-z0-9]{40}"), 3.0),
    _rule("notion-token", "ntn_ secret_", _token("(?:ntn|secret)_", r"(?=\w*\d)[A-Za-z0-9]{43,50}"), 3.5),
    _rule("new-relic-key", "nrak-", _token("NRAK-", r"[A-Z0-9]{27}"), 3.0),
    _rule("postman-key", "pmak-", _token("PMAK-", r"[a-f0-9]{24}-[a-f0-9]{34}")),
    _rule("atlassian-token", "atatt3", _token("ATATT3", r"[\w=-]{50,300}"), 3.5),
    _rule("azure-storage-key", "accountkey", r"(?i:AccountKey)\s*=\s*(?P<secret>[A-Za-z0-9+/]{80,88}={0,2})",
          3.8),
    _rule("age-secret-key", "age-secret-key-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
    _rule("json-web-token", "eyj", r"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}", 3.5),
    _rule("authorization-header", "authorization",
          r"(?i:authorization)[\"']?\s*[:=,]\s*[fbr]?[\"']?(?i:basic|bearer|token)\s+"
          r"(?P<secret>[A-Za-z0-9+/_.~-]{20,}={0,2})", 3.5, guess=True),
    _rule("url-password", "://",
          r"(?<=://)[^\s:/@\"'<>{}$%\[\]()]{1,64}:(?P<secret>[^\s:/@\"'<>{}$%\[\]()*,]{6,128})@"
          r"[\w.-]+", 2.5, guess=True),
    _rule("generic-secret", "key secret token passw passwd pwd credential",
          _NAMES + r"[\w-]{0,20}[\"']?\]?[ \t]{0,3}(?:[:=]|:=|=>)\s{0,3}"
          r"[bru]?(?P<quote>[\"'])(?P<secret>[^\s\"'`\\<>{}()\[\]$,;]{10,200})(?P=quote)", 3.5, guess=True),
    _rule("environment-secret", "key secret token passw pwd credential",
          r"(?m:^)[ \t]*(?:export[ \t]+|-[ \t]+)?[A-Z0-9_]{0,40}(?:KEY|SECRET|TOKEN|PASSWORD|PASSWD"
          r"|CREDENTIALS?)"
          r"[A-Z0-9_]{0,40}"
          r"(?:=|:[ \t]+)(?P<secret>[A-Za-z0-9+/_-]{20,200}={0,2})[ \t]*(?m:$)", 3.8, guess=True),
)
KINDS = tuple(dict.fromkeys(rule.name for rule in RULES))
_MARKS_OF_EXAMPLES = re.compile(
    r"(?i)example|placeholder|changeme|change[_-]me|dummy|your[_-]|my[_-]|xxxx|test|sample|redacted|password"
    r"|passwd|secret|abcdef|qwerty|12345678|\*\*\*|\.\.\.")
_WORDS = re.compile(r"^[A-Za-z]+(?:[_./:-][A-Za-z]+)*[_.-]?\d{0,2}$")
_TWO_DIGITS, _LETTER = re.compile(r"\d.*\d"), re.compile(r"[A-Za-z]")


def entropy(text: str) -> float:
    """Shannon entropy of the characters, bits each.

    >>> entropy("aabb")
    1.0
    """
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts) if text else 0.0


def looks_random(value: str) -> bool:
    """Whether a guessed credential is more than a word, a path, an identifier or a documented example."""
    if _MARKS_OF_EXAMPLES.search(value) or _WORDS.match(value):
        return False
    if "/" in value and re.match(r"^[\w.~-]*(/[\w.~-]*)+$", value) and max(map(len, value.split("/"))) < 20:
        return False
    return bool(_TWO_DIGITS.search(value) and _LETTER.search(value))


def redact(text: str, path: str) -> tuple[str, tuple[Finding, ...]]:
    """The text with each secret replaced by `<secret:rule>`, and what was found.

    >>> redact("key = 'AKIA" "2E0A8F3B244C9986'", "a.py")[0]
    "key = '<secret:aws-access-key>'"
    """
    lowered = text.lower()
    spans: list[tuple[int, int, str]] = []
    for rule in RULES:
        if any(keyword in lowered for keyword in rule.keywords):
            for match in rule.pattern.finditer(text):
                start, end = match.span("secret" if "secret" in rule.pattern.groupindex else 0)
                if _is_secret(rule, text[start:end]) and not _overlaps(spans, start, end):
                    spans.append((start, end, rule.name))
    spans.sort()
    parts, findings, position = [], [], 0
    for start, end, name in spans:
        parts += [text[position:start], f"<secret:{name}>"]
        findings.append(Finding(path=path, line=text.count("\n", 0, start) + 1, rule=name))
        position = end
    return "".join([*parts, text[position:]]), tuple(findings)


def _is_secret(rule: Rule, value: str) -> bool:
    return entropy(value) >= rule.min_entropy and (not rule.guess or looks_random(value))


def _overlaps(spans: list[tuple[int, int, str]], start: int, end: int) -> bool:
    return any(start < other_end and other_start < end for other_start, other_end, _ in spans)
