"""Names, notebooks, command lines and configurations that somebody may give, drawn by a `random.Random`."""

import json

NAMES = ("a b", " first", "last ", "-leading", "--help", "-c", "$(touch canary)", "`touch canary`",
         "a;touch canary", "a && touch canary", "|touch canary", "a\nb", "a\tb", "\u00e9", "\u65e5\u672c",
         "\U0001f980", "a'b", 'a"b', "a\\b", "*", "?", "[x]", "{a,b}", "~", "~root", "#x", "%s", "%(x)s",
         "!x", "a=b", "a:b", "@x", "...", "..x", ".hidden", "con", "x" * 255, "\u00e9" * 127,
         "\u202ereversed",
         "\u200b", "a\x1b[31m", "$HOME", "${PATH}", "<b>x</b>", "a,b", "a%2fb", "e\u0301", "a\r",
         "null", "1e3")


WORDS = ("", "0", "-1", "1e999", "nan", "inf", "two", "99999999999999999999999", "0x10", "1_0", "true",
         "None", "[", "]", "{", "}", "a=b", "=", "==", ".", "..", "/", "//", "nowhere", "auto", "embedded",
         "phi-22", "\u00e9", "\U0001f980", "\udcff", "a\nb", "\t", "--", "-", "-h1", "$(x)", "`x`",
         "%s", "{}",
         "x" * 5_000,
         "training.epochs=x", "training.epoch=2", "lora.targets=[a, [b]]", "dataset.repo=1", "run.seed=-1",
         "http://", "ext::sh -c x", "git@", "file:///none", "ssh://-oProxyCommand=x/y")
FLAGS = ("--repo", "--model-name", "--epochs", "--base-model", "--tier", "--context", "--max-hours", "--seed",
         "--config", "--set", "--bogus", "--repo=", "--epochs=", "--set=", "--allow-change", "--resume",
         "--fresh", "--anyway", "--dry-run", "-x", "--no-such=1")
COMMANDS = tuple(map(str.split, (
    "--auto --repo nowhere", "--auto --repo nowhere", "dataset --repo nowhere", "plan --repo nowhere",
    "resume nowhere", "report nowhere", "profile --bogus", "runs --bogus", "doctor --bogus",
    "ledger --only nothing", "--set x runs")))


def any_arguments(draw):
    """A command line that cannot be honoured: at least its repository, run, flag or item does not exist."""
    more = [word for _ in range(draw.randrange(6))
            for word in ((draw.choice(FLAGS), draw.choice(WORDS)) if draw.random() < 0.8
                         else (draw.choice(WORDS),))]
    return [*draw.choice(COMMANDS), *more]


def any_yaml(draw, plain):
    """A configuration with some things changed, or no configuration at all."""
    lines = [line for line in plain if not line.lstrip().startswith("#")]
    odd = ("!!python/object/apply:os.system [x]", "&a [*a]", "*a", "<<: {a: 1}", "? [a]: b", "%YAML 9",
           "---", "\t- x", "training: {epochs: [", "training.epochs: 2000-01-01", "run: {seed: 0o77}",
           "\u2028",
           "\0",
           "run: " + "9" * 5_000, "a: " + "[" * 200, "x: !!binary abc", "run: {seed: .inf}", "1: 2", "~: x",
           "training: 7", "model: [a]", "lora: {targets: [1, 2]}", "key: |\n  text", "'", '"\\x', "]", "}")
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(lines))
        change = draw.randrange(4)
        if change == 0:
            lines.insert(at, draw.choice(odd))
        elif change == 1:
            key, _, _ = lines[at].partition(":")
            lines[at] = f"{key}: {draw.choice(WORDS)}"
        elif change == 2:
            lines[at] = lines[at][:draw.randrange(len(lines[at]) + 1)] + chr(draw.randrange(1, 0x2100))
        else:
            lines[at:at] = lines[draw.randrange(len(lines)):][:3]
    return "\n".join(lines)


def any_json(draw, depth=0):
    """Some JSON value, small and oddly shaped."""
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind >= 6:
        inner = [any_json(draw, depth + 1) for _ in range(draw.randrange(4))]
        if kind == 6:
            return inner
        names = ("cells", "cell_type", "source", "metadata", "outputs", "0", "")
        return {draw.choice(names): each for each in inner}
    text = draw.choice(("", "code", "\ud800", "x = 1\n", "é"))
    return (None, True, draw.randrange(-9, 1 << 70), 1e308, text, "raw")[kind]


def any_notebook(draw):
    """A notebook with nothing, one thing or everything wrong with it."""
    if draw.random() < 0.4:
        cell = {"cell_type": "code", "source": [f"value_{draw.randrange(9999)} = one\n", "x = two\n"]}
        return json.dumps({"cells": [cell] * draw.randrange(1, 4), "nbformat": any_json(draw)})
    kinds = ("code", "markdown", "raw", "Code", 3, None)
    sources = (["x = 1\n", "y = x + 2\n"], "def f(x):\n    return x\n", [], [1], None, {}, "7", ["a", ["b"]])
    cells = [{"cell_type": draw.choice(kinds), "source": draw.choice(sources)}
             for _ in range(draw.randrange(5))]
    for cell in cells:
        if draw.random() < 0.2:
            del cell[draw.choice(tuple(cell))]
    data = draw.choice(({"cells": cells}, {"cells": cells, "nbformat": "4"}, cells, any_json(draw),
                        {"cells": any_json(draw)}))
    text = json.dumps(data)
    cut = draw.random()
    return text[:draw.randrange(len(text) + 1)] if cut < 0.1 else "[" * 3_000 + text if cut < 0.13 else text
