"""Personal data in source text: mail addresses, phone numbers, bank accounts, payment cards, identity numbers
and public network addresses.

Each is checked by what its standard lets one check (mod 97, Luhn, calling codes, address blocks), and what
documentation reserves for examples is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address

from training.dataset.sources.scan import Places

KINDS = ("email", "phone", "iban", "card", "national-id", "ip-address")
Span = tuple[int, int, str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def find(text: str, found: Places) -> Iterator[Span]:
    """(start, end, kind) of each datum at the places found; may overlap."""
    yield from _emails(text, found.ats)
    yield from _phones(text, found.pluses)
    yield from _ibans(text, found.ibans)
    yield from _numbers(text, found.numbers)
    yield from _addresses(text, found)


# E-mail (RFC 5322 addr-spec without comments and quotes). Names reserved by RFC 2606 and 6761, file suffixes
# (`icon@2x.png`), and addresses of programs are no person's.
_LOCAL = re.compile(r"(?<![\w.%+/-])[A-Za-z0-9][\w.%+-]{0,63}$", re.ASCII)
_DOMAIN = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}([A-Za-z]{2,24}))"
                     r"(?![\w@(\[-])", re.ASCII)
_RESERVED_DOMAIN = re.compile(
    r"(?i)(?:^|\.)(?:example(?:\.\w+)*|test|invalid|localhost|local|localdomain|internal"
    r"|(?:users\.)?noreply\.[\w.]+|(?:(?:my|your|some)?(?:domain|company|site|host(?:name)?)"
    r"|foo|bar|baz|foobar|abc|xyz|[a-wyz])\.(?:com|org|net|tld))$")
_PROGRAMS = re.compile(
    r"(?i)(?:git|hg|svn|ssh|no-?reply|do-?not-?reply|mailer-daemon|.*\[bot\]|(?:your|my)[._-]?\w*"
    r"|user(?:name)?\d?|foo|bar|name|e?mail|someone|somebody|test(?:er|ing)?\d?|example)$")
_NO_TOP_LEVEL = _words(
    "png jpg jpeg gif svg webp ico js mjs cjs css json html htm xml yaml yml txt tgz gz zip tar jar exe "
    "dll lock toml cfg ini csv tpl tmpl so py pyc service timer socket")
_GENERIC_TOP_LEVEL = _words(
    "com org net edu gov mil int info biz name pro dev app online cloud tech xyz site email mobi aero coop "
    "museum jobs asia cat tel post blog shop store wiki systems solutions software engineering group world "
    "digital agency network team works studio design media news live life space website zone science "
    "university academy institute foundation social chat codes computer berlin london nyc paris tokyo "
    "amsterdam google microsoft amazon apple ibm bbc sap")
_COUNTRIES = _words(
    "ac ad ae af ag ai al am ao ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz "
    "ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj "
    "fk fm fo fr ga gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io "
    "iq ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me "
    "mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf "
    "pg ph pk pl pm pn pr ps pt pw qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv "
    "sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws "
    "ye yt za zm zw")


def _emails(text: str, ats: list[int]) -> Iterator[Span]:
    for at in ats:
        local = _LOCAL.search(text, max(at - 80, 0), at)
        domain = _DOMAIN.match(text, at)
        if local and domain and _is_mailbox(text, local, domain):
            yield local.start(), domain.end(), "email"


def _is_mailbox(text: str, local: re.Match[str], domain: re.Match[str]) -> bool:
    top = domain[2].lower()
    if top not in _COUNTRIES and top not in _GENERIC_TOP_LEVEL:
        return False
    if _RESERVED_DOMAIN.search(domain[1]) or _PROGRAMS.fullmatch(local[0]):
        return False
    before = text[max(local.start() - 80, 0):local.start()]
    is_login = before[-1:] == "/" or re.search(r"://[^\s/]{0,70}$", before) is not None
    is_remote = re.match(r":[\w~/.-]", text[domain.end():domain.end() + 2]) is not None
    return not (is_login or is_remote)


# International telephone numbers (ITU-T E.164: at most 15 digits behind `+`; calling codes as assigned).
_PHONE = re.compile(r"\+(?:1|7|2(?:0|7|[1-689]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2\d)|5(?:[1-8]|[09]\d)"
                    r"|6(?:[0-6]|[7-9]\d)|8(?:[1246]|[058]\d)|9(?:[0-58]|[679]\d))"
                    r"(?:[ .-]?\(?\d{1,4}\)?[ .-]?){1,6}\d(?!\d)", re.ASCII)
_NORTH_AMERICA = re.compile(r"1[2-9]\d\d[2-9]\d{6}")


def _phones(text: str, pluses: list[int]) -> Iterator[Span]:
    for plus in pluses:
        match = _PHONE.match(text, plus)
        if match and not _WORD_AFTER.match(text, match.end()) and (
                _is_phone(match[0], text[max(plus - 40, 0):plus])):
            yield match.start(), match.end(), "phone"


def _is_phone(number: str, before: str) -> bool:
    """Nine to fifteen digits, in groups or behind a word for telephones.

    North American ones as their plan has them, without the area and exchange 555 of fiction.
    """
    digits = re.sub(r"\D", "", number)
    grouped = len(re.findall(r"[ ()-]+", number)) + number.count(".") >= 2
    if not (grouped or _PHONE_NAMES.search(before)) or len(set(digits)) < 4 or "12345678" in digits:
        return False
    if digits[0] == "1":
        return bool(_NORTH_AMERICA.fullmatch(digits)) and "555" not in (digits[1:4], digits[4:7])
    return 9 <= len(digits) <= 15


_PHONE_NAMES = re.compile(r"(?i)tel|phone|mobil|cell|fax|call|sms|whatsapp|signal|contact|handy")
_WORD_AFTER = re.compile(r"[\w@]|[.:,-]\d", re.ASCII)

# ISO 13616: country, two check digits, account; groups of four on paper. Length by country from the registry.
_IBAN = re.compile(r"[A-Z]{2}\d\d(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)(?![A-Za-z0-9])")
_IBAN_LENGTH = {"AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
                "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
                "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
                "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
                "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
                "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
                "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24,
                "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22,
                "VG": 24, "XK": 20}


def is_iban(value: str) -> bool:
    """Whether the length fits the country and the check digits the rest (ISO 7064, mod 97-10).

    >>> is_iban("GB82 WEST 1234 5698 7654 32"), is_iban("GB83 WEST 1234 5698 7654 32")
    (True, False)
    """
    plain = value.replace(" ", "")
    if _IBAN_LENGTH.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _ibans(text: str, starts: list[int]) -> Iterator[Span]:
    for start in starts:
        match = _IBAN.match(text, start)
        if match and is_iban(match[0]):
            yield match.start(), match.end(), "iban"


# ISO/IEC 7812: 13 to 19 digits, issuer range, Luhn. Numbers that networks publish for tests are no one's.
_CARD = re.compile(r"(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})"
                   r"(?!\w|[.-]\d)", re.ASCII)
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|3[47]\d{13}"
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|(?:6011|64[4-9]\d|65\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}")
_TEST_CARDS = _words(
    "4242424242424242 4012888888881881 4000056655665556 5200828282828210 378282246310005 371449635398431 "
    "378734493671000 30569309025904 38520000023237 36227206271667 3566002020360505 3530111333300000 "
    "6011000990139424 6011111111111117 5555555555554444 5105105105105100 4111111111111111 "
    "6200000000000005 4222222222222")


_CARD_NAMES = re.compile(r"(?i)card|visa|amex|maestro|payment|credit|debit|(?<![a-z])(?:cc|pan)(?![a-z])")


def is_card(digits: str) -> bool:
    """Whether an issuer gives out such numbers and the last digit checks (Luhn).

    >>> is_card("4539578763621486"), is_card("4539578763621487")
    (True, False)
    """
    return len(set(digits)) > 4 and bool(_ISSUERS.fullmatch(digits)) and _luhn(digits) and (
        digits not in _TEST_CARDS)


def _luhn(digits: str) -> bool:
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


# National numbers: only behind a word that names them, and with their check digits where there are some.
_IDENTITY = re.compile(r"(?:\d{3}([ -]?)\d\d\1\d{4}|\d{3}\.\d{3}\.\d{3}-\d\d|\d{11}|\d{8}[A-Z]"
                       r"|\d{4}[ -]?\d{4}[ -]?\d{4})(?!\w|[.-]\d)", re.ASCII)
_IDENTITY_NAMES = re.compile(r"(?i)(?<![a-z])(?:(ssn|social[ _-]?security)|(cpf)|(dni|nif)|(pesel)"
                             r"|(aadhaar|aadhar))(?![a-z])")


def _numbers(text: str, starts: list[int]) -> Iterator[Span]:
    for start in starts:
        match = _CARD.match(text, start)
        if match and is_card(re.sub(r"\D", "", match[0])) and (
                not match[0].isdigit() or _CARD_NAMES.search(text, max(start - 60, 0), start)):
            yield match.start(), match.end(), "card"
            continue
        match = _IDENTITY.match(text, start)
        if match and _is_identity(re.sub(r"[ .-]", "", match[0]), text[max(start - 60, 0):start]):
            yield match.start(), match.end(), "national-id"


def _is_identity(value: str, before: str) -> bool:
    names = list(_IDENTITY_NAMES.finditer(before.rpartition("\n")[2]))
    checks = (_is_ssn, _is_cpf, _is_dni, _is_pesel, _is_aadhaar)
    return bool(names) and checks[(names[-1].lastindex or 1) - 1](value)


def _is_ssn(value: str) -> bool:
    """Nine digits, areas that exist, and none of the numbers known from advertisements."""
    return bool(re.fullmatch(r"(?!000|666|9)\d{3}(?!00)\d\d(?!0000)\d{4}", value)) and value not in (
        "078051120", "219099999", "123456789", "111111111", "123121234")


def _is_cpf(value: str) -> bool:
    """Brazil: eleven digits, the last two by weights 10..2 and 11..2 modulo 11."""
    if not re.fullmatch(r"\d{11}", value) or len(set(value)) < 3:
        return False
    digits = [int(digit) for digit in value]
    return all(sum(digit * weight for digit, weight in zip(digits, range(size + 1, 1, -1), strict=False)) * 10
               % 11 % 10 == digits[size] for size in (9, 10))


def _is_dni(value: str) -> bool:
    """Spain: eight digits and the letter of their remainder modulo 23."""
    return bool(re.fullmatch(r"\d{8}[A-Z]", value)) and value[:8] not in ("00000000", "12345678") and (
        "TRWAGMYFPDXBNJZSQVHLCKE"[int(value[:8]) % 23] == value[8])


def _is_pesel(value: str) -> bool:
    """Poland: eleven digits, the last by weights 1, 3, 7, 9 modulo 10."""
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)
    return bool(re.fullmatch(r"\d{11}", value)) and len(set(value)) > 2 and sum(
        int(digit) * weight for digit, weight in zip(value, weights, strict=True)) % 10 == 0


def _is_aadhaar(value: str) -> bool:
    """India: twelve digits from 2 up."""
    return bool(re.fullmatch(r"[2-9]\d{11}", value)) and len(set(value)) > 3


# Public addresses: what IANA's registries call global, without the resolvers everyone writes down.
_IPV4 = re.compile(r"(?:\d{1,3}\.){3}\d{1,3}(?![\w+-]|\.\w|/\d|[ ,]-?\d*\.\d*[ ,-])", re.ASCII)
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:.%]|/)", re.ASCII)
_RESOLVERS = _words(      # and what documentation writes down as any address
    "8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 1.1.1.2 1.1.1.3 9.9.9.9 149.112.112.112 208.67.222.222 "
    "208.67.220.220 4.2.2.1 4.2.2.2 114.114.114.114 223.5.5.5 223.6.6.6 1.2.3.4 5.6.7.8 12.34.56.78 "
    "123.45.67.89 2001:4860:4860::8888 2001:4860:4860::8844 2606:4700:4700::1111 2606:4700:4700::1001 "
    "2620:fe::fe 2620:fe::9")
_VERSION_BEFORE = re.compile(r"(?i)(?:version|release|\bver|\bv|chrome|firefox|safari|build|oid|==|>=|<=|~=)"
                             r"[\w\s\"':=.(/-]{0,12}$")


def _addresses(text: str, found: Places) -> Iterator[Span]:
    for dot in found.quads:
        start = dot - len(re.search(r"\d{1,3}$", text[max(dot - 3, 0):dot])[0])  # type: ignore[index]
        match = _IPV4.match(text, start)
        if match and not re.search(r"[\w.+-]$", text[max(start - 1, 0):start]) and _is_public(match[0]) and (
                not _VERSION_BEFORE.search(text[max(start - 30, 0):start])):
            yield match.start(), match.end(), "ip-address"
    for colon in found.groups:
        match = _IPV6.match(text, colon - 4)
        if match and text[max(colon - 5, 0):colon - 4] != ":" and _is_public(match[0]):
            yield match.start(), match.end(), "ip-address"


def _is_public(value: str) -> bool:
    """A global unicast address of one machine; four small numbers are rather a version."""
    if ":" not in value:
        octets = [int(part) for part in value.split(".")]
        if max(octets) < 64 or octets[3] in (0, 255) or len(set(octets)) < 3:
            return False
    elif value.endswith("::") or value.count(":") < 3:
        return False
    try:
        address = ip_address(value)
    except ValueError:
        return False
    reserved = value.lower().startswith(("2001:db8", "3fff:"))      # documentation: RFC 3849, RFC 9637
    return address.is_global and not (address.is_multicast or address.is_reserved or reserved) and (
        value.lower() not in _RESOLVERS)
