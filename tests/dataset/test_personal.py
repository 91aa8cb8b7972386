import random
from pathlib import Path

import pytest
from repositories import EMAIL_PACKAGE

from training.dataset.sources.personal import KINDS, is_card, is_iban
from training.dataset.sources.secrets import placeholder, redact


def with_check_digit(digits: str) -> str:
    """Luhn's, written from its definition: doubled every second from the right."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


def iban_of(country: str, account: str) -> str:
    """ISO 13616: check digits 98 - (account, country, 00 as a number) mod 97."""
    number = "".join(str(ord(letter) - 55) if letter.isalpha() else letter
                     for letter in account + country + "00")
    return f"{country}{98 - int(number) % 97:02d}{account}"


def drawn(rng: random.Random, count: int, alphabet: str = "0123456789") -> str:
    return "".join(rng.choices(alphabet, k=count))


def planted(seed: int) -> list[tuple[str, str, str]]:
    """(kind, line, value), all drawn anew."""
    rng = random.Random(seed)
    name = drawn(rng, 7, "bcdfghjklmnpqrstvwz")
    card = with_check_digit("4539" + drawn(rng, 11))
    amex = with_check_digit("3787" + drawn(rng, 10))
    iban = iban_of("DE", drawn(rng, 18))
    british = iban_of("GB", drawn(rng, 4, "ABCDEFGHJKLM") + drawn(rng, 14))
    number = f"{rng.randrange(201, 899)}{rng.randrange(21, 89)}"
    ssn = f"{rng.randrange(100, 665)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}"
    address = ".".join(map(str, (rng.choice([52, 81, 93]), rng.randrange(64, 250), rng.randrange(10, 60), 7)))
    group = drawn(rng, 4, "123456789abcdef")
    global6 = f"2a01:4f8:{group}:{drawn(rng, 4, '123456789abcdef')}::{rng.randrange(2, 99)}"
    paper = " ".join(iban[start:start + 4] for start in range(0, 22, 4))
    return [
        ("email", f"# Author: Jo Doe <{name}.doe@{name}.org>", f"{name}.doe@{name}.org"),
        ("email", f"'author_email': '{name}+code@mail.{name}.co.uk',", f"{name}+code@mail.{name}.co.uk"),
        ("email", f"mailto:{name}@web.de", f"{name}@web.de"),
        ("email", f"{name}99@students.{name}.edu wrote:", f"{name}99@students.{name}.edu"),
        ("phone", f"Call +49 30 {number}77 for help", f"+49 30 {number}77"),
        ("phone", f'"phone": "+1 (415) 237-{rng.randrange(2000, 9999)}"', "+1 (415) 237"),
        ("phone", f"tel:+3314{number}82", f"+3314{number}82"),
        ("iban", f'iban = "{iban}"', iban), ("iban", f"IBAN: {paper}", paper),
        ("iban", f"pay to {british}.", british),
        ("card", f'card_number: "{card}"', card),
        ("card", f"// {card[:4]} {card[4:8]} {card[8:12]} {card[12:]}", card[12:]),
        ("card", f"amex = '{amex[:4]}-{amex[4:10]}-{amex[10:]}'", amex[4:10]),
        ("national-id", f"ssn = '{ssn}'", ssn), ("national-id", f"Social Security number: {ssn}", ssn),
        ("ip-address", f'HOST = "{address}"', address), ("ip-address", f"connect to {address}:8080", address),
        ("ip-address", f"server [{global6}]:443", global6)]


@pytest.mark.parametrize("seed", range(40))
def test_each_kind_is_replaced_by_its_typed_placeholder(seed):
    for kind, line, value in planted(seed):
        clean, found = redact(f"a = 1\n{line}\nb = 2\n", "a.py")
        assert [(finding.line, finding.rule) for finding in found] == [(2, kind)], line
        assert placeholder(kind) == f"<personal:{kind}>"
        assert clean.count(f"<personal:{kind}>") == 1
        assert value not in clean
        assert clean.startswith("a = 1\n")
        assert clean.endswith("\nb = 2\n")
        assert redact(clean, "a.py") == (clean, ())


def test_there_is_a_planted_example_of_every_kind():
    assert {kind for kind, _, _ in planted(0)} == set(KINDS)


def test_a_wrong_check_digit_is_no_account_and_no_card():
    rng = random.Random(2)
    for _ in range(50):
        card, iban = with_check_digit("4539" + drawn(rng, 11)), iban_of("NL", "INGB" + drawn(rng, 10))
        assert is_card(card)
        assert is_iban(iban)
        for step in range(1, 10):
            assert not is_card(card[:-1] + str((int(card[-1]) + step) % 10))
            assert not is_iban(iban[:-1] + str((int(iban[-1]) + step) % 10))
    assert not is_iban(iban_of("DE", drawn(rng, 17)))
    assert not is_card(with_check_digit("9539" + drawn(rng, 11)))


@pytest.mark.parametrize("line", [
    "user@example.com", "jo@mail.example.org", "root@localhost", "git@github.com:a/b.git", "git@host.org",
    "noreply@github.com", "12345+jo@users.noreply.github.com", "no-reply@site.io",
    "dependabot[bot]@users.noreply.x.io", "@app.route('/x')", "import x from '@scope/pkg'",
    "pkg@1.2.3.tgz", "icon@2x.png", "npm i @types/node@18.11.9", "y = A@self.weight + b@np.pi",
    "https://jo@host.org/a.git", "ssh://deploy@host.org/x", "deploy@host.org:/srv/www", "user@test",
    "a@b.invalid", "your.name@company.com", "x = +12345678901", "delta = +4294967296  # 1 << 32",
    "'+345678.5432'", "Decimal('+35236450.6')", "+1 555 010 1234", "2024-01-02T03:04:05+0100",
    "+1 (212) 555-0123", "y + 49 30 123456", "hash = '4539578763621486a'", "x = 4539578763621486",
    "0.4539578763621486", "4111 1111 1111 1111", "card = '4242424242424242'", "f4539578763621486d",
    "id = '45395787636214860000012345'", "DE00 0000 0000 0000 0000 00", "GB29 NWBK 6016 1331 9268 18",
    "123-45-6789", "ssn = '123-45-6789'", "ssn = '000-12-3456'", "part 536-90-4399", "session 536904399",
    "127.0.0.1", "10.20.30.40", "192.168.1.77", "172.16.99.3", "169.254.169.254", "192.0.2.77",
    "198.51.100.7", "203.0.113.9", "8.8.8.8", "1.1.1.1", "255.255.255.0", "0.0.0.0", "224.0.0.251",
    "version 4.128.33.7", "v1.2.3.99", "1.2.3.4", "Chrome/99.120.60.71", "93.184.216.0",
    "93.184.216.0/24", "1.3.6.1.4.1.311.99", "2001:db8::8a2e:370:7334", "::1", "fe80::1", "fd00:1:2:3::4",
    "2001:4860:4860::8888", "12:34:56", "std::vector<a>::b", "2024:01:02 03:04:05"])
def test_what_is_no_persons_is_left_as_it_is(line):
    assert redact(line + "\n", "a.py") == (line + "\n", ())


def test_the_mail_packages_authors_are_the_only_personal_data_there():
    found = [finding for path in sorted(Path(EMAIL_PACKAGE).rglob("*.py"))
             for finding in redact(path.read_text(encoding="utf-8"), path.name)[1]]
    assert {finding.rule for finding in found} == {"email"}
    assert 10 < len(found) < 60
