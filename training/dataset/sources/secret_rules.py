"""Formats of credentials as their issuers publish them; many of them
are also in the list of gitleaks (MIT).

A token opens with a literal of three characters or more; a shape is recognised whole, without one; a context
is a name or a header before the value. `secrets` says where each is tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from re import Pattern


@dataclass(frozen=True, kw_only=True)
class Token:
    """A credential that begins with one of `openings`; group `secret`, or the whole match, is its value.

    `min_entropy` in bits a character: below it the value is an example such as `ghp_xxxxxxxx`.
    """

    name: str
    openings: tuple[str, ...]
    pattern: Pattern[str]
    min_entropy: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Context:
    """A value announced by what stands before it (`before`, matched up to the value).

    `keywords` are lower case; one of them is in the text before. `value` is the whole value's form.
    """

    name: str
    keywords: tuple[str, ...]
    before: Pattern[str]
    value: Pattern[str]
    min_entropy: float = 3.0
    guess: bool = False


def _token(name: str, openings: str, tail: str, min_entropy: float = 3.0) -> Token:
    prefixes = tuple(openings.split())
    opening = "|".join(re.escape(prefix) for prefix in prefixes)
    return Token(name=name, openings=prefixes, min_entropy=min_entropy,
                 pattern=re.compile(rf"(?:{opening}){tail}(?![\w-])"))


def _address(name: str, host: str, path: str) -> Token:
    """A webhook: the host and the path's beginning stay, what follows is the secret."""
    return Token(name=name, openings=(host[:4],), pattern=re.compile(re.escape(host) + path))


TOKENS: tuple[Token, ...] = (
    _token("aws-access-key", "AKIA ASIA ABIA ACCA", "[A-Z0-9]{16}"),
    _token("aws-bedrock-key", "ABSK", r"[A-Za-z0-9+/]{109,269}={0,2}"),
    _token("github-token", "ghp_ gho_ ghu_ ghr_", "[A-Za-z0-9]{36,255}"),
    _token("github-token", "ghs_", r"[\w.-]{35,700}\w"),
    _token("github-fine-grained-token", "github_pat_", r"\w{36,255}"),
    _token("gitlab-token", "glpat- gldt- glrt- glptt- glcbt- glsoat- glft- glimt- glagent- gloas-",
           r"[\w-]{20,}(?:\.[\w-]+){0,2}"),
    _token("slack-token", "xoxa- xoxb- xoxe- xoxe. xoxo- xoxp- xoxr- xoxs- xapp-", r"[\w.-]{10,250}", 2.8),
    _address("slack-webhook", "hooks.slack.com/",
             r"(?:services|workflows|triggers)/(?P<secret>[A-Za-z0-9+/]{40,90})"),
    _token("stripe-key", "sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_ whsec_",
           "[A-Za-z0-9]{16,247}"),
    _token("google-api-key", "AIza", r"[\w-]{35}"),
    _token("google-oauth-secret", "GOCSPX-", r"[\w-]{28}"),
    _token("google-oauth-token", "ya29.", r"[\w-]{40,}", 3.5),
    _token("openai-key", "sk-", r"(?:(?:proj|svcacct|admin|None)-)?[\w-]{20,90}T3BlbkFJ[\w-]{20,90}"),
    _token("openai-key", "sk-", r"(?:(?:proj|svcacct|admin|or-v1)-)?(?=[\w-]*\d)[A-Za-z0-9]{32,200}", 3.5),
    _token("anthropic-key", "sk-ant-", r"[\w-]{24,200}"),
    _token("groq-key", "gsk_", "[A-Za-z0-9]{48,56}", 3.5),
    _token("xai-key", "xai-", "[A-Za-z0-9]{70,90}", 3.5),
    _token("perplexity-key", "pplx-", "[A-Za-z0-9]{48}", 3.5),
    _token("replicate-token", "r8_", "[A-Za-z0-9]{37}", 3.5),
    _token("hugging-face-token", "hf_ api_org_", "[A-Za-z0-9]{34,40}", 3.5),
    _token("npm-token", "npm_", "[A-Za-z0-9]{36}"),
    _token("pypi-token", "pypi-AgEIcHlwaS5vcmc", r"[\w-]{40,}"),
    _token("rubygems-token", "rubygems_", "[a-f0-9]{48}"),
    _token("docker-token", "dckr_pat_ dckr_oat_", r"[\w-]{24,40}"),
    _token("sendgrid-key", "SG.", r"[\w-]{16,32}\.[\w-]{32,64}"),
    _token("shopify-token", "shpat_ shpca_ shppa_ shpss_", "[a-fA-F0-9]{32}"),
    _token("square-token", "sq0atp- sq0csp- sq0idp-", r"[\w-]{22,43}"),
    _token("digitalocean-token", "dop_v1_ doo_v1_ dor_v1_", "[a-f0-9]{64}"),
    _token("databricks-token", "dapi", r"[a-f0-9]{32}(?:-\d)?"),
    _token("vault-token", "hvs. hvb.", r"[\w-]{24,300}"),
    _token("grafana-token", "glsa_ glc_", r"[\w+/=-]{32,400}"),
    _token("doppler-token", "dp.pt. dp.st. dp.ct. dp.sa. dp.scim.", r"(?:[\w-]{1,40}\.)?[A-Za-z0-9]{40,44}"),
    _token("linear-key", "lin_api_ lin_oauth_", "[A-Za-z0-9]{40,64}"),
    _token("notion-token", "ntn_ secret_", r"(?=\w*\d)[A-Za-z0-9]{43,50}", 3.5),
    _token("new-relic-key", "NRAK- NRII- NRJS- NRIQ-", r"[\w-]{19,32}"),
    _token("postman-key", "PMAK-", "[a-f0-9]{24}-[a-f0-9]{34}"),
    _token("atlassian-token", "ATATT3", r"[\w=-]{50,300}", 3.5),
    _token("bitbucket-token", "ATCTT3 ATBB", r"[\w=-]{32,300}", 3.5),
    _token("airtable-token", "pat", r"[A-Za-z0-9]{14}\.[a-f0-9]{64}"),
    _token("dropbox-token", "sl.", r"(?:u\.)?(?=[\w-]*\d)[\w-]{130,1500}", 3.5),
    _token("figma-token", "figd_ figu_", r"[\w-]{38,60}"),
    _token("fly-token", "fo1_ fm1r_ fm1a_ fm2_", r"[\w+/-]{43,}={0,3}"),
    _token("supabase-key", "sbp_ sb_secret_", r"[\w-]{31,60}"),
    _token("planetscale-token", "pscale_tkn_ pscale_oauth_ pscale_pw_", r"[\w=.-]{32,64}"),
    _token("sentry-token", "sntrys_ sntryu_", r"[\w+/=]{60,}"),
    _token("pulumi-token", "pul-", "[a-f0-9]{40}"),
    _token("buildkite-token", "bkua_", "[a-f0-9]{40}"),
    _token("circleci-token", "CCIPAT_ CCIPRJ_", r"[A-Za-z0-9]{22}_[A-Fa-f0-9]{40}"),
    _token("dynatrace-token", "dt0c01. dt0s16.", r"[A-Za-z0-9]{24}\.[A-Za-z0-9]{64}"),
    _token("artifactory-key", "AKCp", "[A-Za-z0-9]{69}"),
    _token("alibaba-key", "LTAI", "[A-Za-z0-9]{20}"),
    _token("brevo-key", "xkeysib-", r"[a-f0-9]{64}-[A-Za-z0-9]{16}"),
    _token("easypost-key", "EZAK EZTK", "[A-Za-z0-9]{54}"),
    _token("1password-token", "ops_eyJ", r"[A-Za-z0-9+/]{250,}={0,3}"),
    _token("age-secret-key", "AGE-SECRET-KEY-1", "[0-9A-Z]{58}"),
    _token("facebook-token", "EAA", r"[A-Za-z0-9]{100,}", 3.5),
    _token("json-web-token", "eyJ", r"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}", 3.5),
    _address("discord-webhook", "discord",
             r"(?:app)?\.com/api/(?:v\d+/)?webhooks/(?P<secret>\d{16,20}/[\w-]{40,})"),
)

# Shapes without a literal at their beginning: group name -> form. `_` in a name stands for `-`.
SHAPES = re.compile(
    r"(?P<azure_client_secret>[\w~.]{3}\dQ~[\w~.-]{31,34})"
    r"|(?P<mailchimp_key>[a-f0-9]{32}-us\d{1,2})|(?P<mailgun_key>key-[a-f0-9]{32})"
    r"|(?P<twilio_key>SK[0-9a-f]{32})"
    r"|(?P<discord_token>[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40})"
    r"|(?P<terraform_token>[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,70})")

# Text before a value, lower case, up to the value (`$`): names that announce a credential.
_WORDS = r"(?:key|secret|token|passw(?:or)?d|passphrase|passwd|pwd|credential|creds|auth|salt)s?"
_NAME = _WORDS + r"(?:[_.-]?(?:base64|value|data|hex|string|v?\d|prod|live|dev|default))?"
_ASSIGN = r"(?:=>|:=|\?=|==|[:=,]|\|\|)\s{0,8}"
_TYPE = r"(?::[ \t]*[\w.&\[\]|'? ]{1,24}|[ \t]+[\w.*\[\]]{1,16})?"
_BASE64 = r"[A-Za-z0-9+/]"
GENERIC = re.compile(       # key = "..., set_key("..., name: KEY value: "...
    rf"{_NAME}(?:[\"'`]?\]?[ \t]{{0,8}}{_TYPE}[ \t]{{0,8}}{_ASSIGN}[bru@]{{0,2}}[\"'`]"
    r"|\([ \t]{0,4}[\"'`]|[\"']?,?\s{1,30}[\"']?value[\"']?\s{0,3}[:=]\s{0,3}[\"'])$")
INSIDE = re.compile(        # X-Api-Key: ..., <key>..., ?key=..., --key ...
                    rf"[\"'`][\w-]{{0,40}}{_NAME}:[ \t]?$|<[\w:.-]{{0,40}}{_NAME}>$"
                    rf"|[?&]\w{{0,40}}{_NAME}=$|(?:^|[\s\"'])--?[\w-]{{0,40}}{_NAME}[ =]$"
                    rf"|{_NAME}[\"']?,?\s{{1,30}}value:\s$")
BARE = re.compile(rf"(?:^|\n)[ \t]*(?:export[ \t]+|set[ \t]+|env[ \t]+|arg[ \t]+|-[ \t]+|[\w./:-]{{0,40}}:)?"
                  rf"[\w.-]{{0,60}}{_NAME}(?:=|[ \t]*:[ \t]+|[ \t]+=[ \t]+)$")
NOT_A_SECRET = re.compile(
    r"(?i)public|pub_?key|tokeni[sz]|keyboard|keyword|monkey|foreign|primary_key|partition|websocket"
    r"|(?:cache|sort|row|map|dict|object|query|state|group|index|page|next)_?-?(?:key|token)"
    r"|key_?(?:ring|code|point|frame)|fingerprint|thumbprint|checksum|integrity"
    r"|(?:pad|eos|bos|unk|sep|cls|mask|special)_?token")

CONTEXTS: tuple[Context, ...] = (
    Context(name="aws-secret-key", keywords=("secret", "key"), min_entropy=3.8,
            before=re.compile(r"(?i:aws|amazon|amz|s3)[^\n]{0,60}(?i:secret|key)[\w.-]{0,20}[\"'`]?\]?\s{0,8}"
                              r"(?:=>|:=|[:=,(]|)\s{0,8}[\"'`]?$"),
            value=re.compile(r"(?=.*[A-Z])(?=.*[a-z])" + _BASE64 + "{40}")),
    Context(name="telegram-token", keywords=(":",), before=re.compile(r"(?<![\w-])\d{8,10}:$"),
            value=re.compile(r"AA[\w-]{32,33}"), min_entropy=3.5),
    Context(name="azure-storage-key", keywords=("key",), min_entropy=3.8,
            before=re.compile(r"(?i:account_?key|storage_?key|access_?key)[\"'`]?\s{0,8}[:=,]\s{0,8}[\"'`]?$"),
            value=re.compile(_BASE64 + "{86}==")),
    Context(name="azure-access-key", keywords=("sharedaccesskey",), min_entropy=3.8,
            before=re.compile(r"(?i:SharedAccessKey)\s{0,3}=\s{0,3}$"), value=re.compile(_BASE64 + "{43}=")),
    Context(name="azure-signature", keywords=("sig=",), before=re.compile(r"[?&;]sig=$"),
            value=re.compile(r"[\w%+/-]{43,64}=?"), min_entropy=3.8),
    Context(name="authorization-header", keywords=("authorization",), min_entropy=3.5, guess=True,
            before=re.compile(r"(?i)authorization[\"'`]?\]?\s{0,4}[:=,]\s{0,4}[fbr]?[\"'`]?"
                              r"(?:basic|bearer|token)\s{1,4}$"), value=re.compile(r"[\w+/.~-]{20,}={0,2}")),
    Context(name="docker-login", keywords=("auth",), before=re.compile(r"\"auth\"\s{0,4}:\s{0,4}\"$"),
            value=re.compile(_BASE64 + "{16,200}={0,2}"), min_entropy=3.5),
    Context(name="connection-string-password", keywords=("password", "pwd"), min_entropy=2.8, guess=True,
            before=re.compile(r"[\w}\])][;\s]{1,2}(?i:password|pwd)\s?=\s?$"),
            value=re.compile(r"[^\s\"'`<>{}();$]{8,128}")),
    Context(name="command-password", keywords=("-u", "login", "password"), min_entropy=2.8, guess=True,
            before=re.compile(r"(?:\s(?:-u|--user)[ =]?[\"']?[\w.@+-]{1,64}:"
                              r"|\blogin\s+\S{1,64}\s+password\s+)$"),
            value=re.compile(r"[^\s\"'`<>{}$;|]{8,128}")),
)
URL_PASSWORD = re.compile(r"://[^\s:/@\"'<>{}$()]{0,64}:(?P<secret>[^\s/@\"'<>{}$()]{6,128})$")
