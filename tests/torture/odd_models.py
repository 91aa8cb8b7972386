"""What can be wrong with a model's folder: its tokenizer, its weights, its configuration.

Each is a change of a whole folder and the exit codes that a run on it may end with; 0: it trains as before.
"""

import json
import struct

from checkpoints import write_tokenizer

REFUSED, FINE = {65, 66}, {0}
CONFIG, TOKENIZER, ABOUT, ONE = "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
TEXTS = {"empty": b"", "half": b'{"model": {"vo', "nuls": bytes(99), "empty object": b"{}",
         "not UTF-8": b"\xff\xfe{"}
JSONS = {"list": b"[1, 2]", "null": b"null", "number": b"7", "deep": b"[" * 50_000}


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def removed(name):
    return lambda folder: (folder / name).unlink()


def folder_in_place_of(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return change


def edited(name, change):
    """A JSON file after `change` of its content."""
    def work(folder):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
    return work


def updated(name, **values):
    return edited(name, lambda data: data.update(values))


def without(name, key):
    return edited(name, lambda data: data.pop(key))


def cut(share):
    return lambda folder: (folder / ONE).write_bytes(
        (folder / ONE).read_bytes()[:int(share * (folder / ONE).stat().st_size)])


def header(change):
    """The weights' file with another header before the same data."""
    def work(folder):
        content = (folder / ONE).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        old = json.loads(content[8:8 + size])
        new = change(old)
        text = json.dumps(old if new is None else new).encode()
        (folder / ONE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:])
    return work


def tensors(data):
    return [name for name in data if name != "__metadata__"]


def of_first(key, value):
    return header(lambda data: data[tensors(data)[0]].update({key: value}))


def overlapping(data):
    first, second = (data[name] for name in tensors(data)[:2])
    start, (begin, end) = first["data_offsets"][0], second["data_offsets"]
    second["data_offsets"] = [start, start + end - begin]


def renamed(data):
    first = tensors(data)[0]
    return {("other" if name == first else name): value for name, value in data.items()}


def sharded(change=lambda index: None, lost=""):
    """Two shards and an index in place of one file."""
    def work(folder):
        from safetensors.torch import load_file, save_file

        whole = load_file(folder / ONE)
        names = sorted(whole)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, own in parts.items():
            save_file({name: whole[name] for name in own}, folder / file, metadata={"format": "pt"})
        (folder / ONE).unlink()
        index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
        index = change(index) or index
        (folder / f"{ONE}.index.json").write_text(json.dumps(index))
        if lost:
            (folder / lost).unlink()
    return work


def first_weight(index):
    return next(iter(index["weight_map"]))


def tokenizers():
    """Name -> (change, exit codes)."""
    torn = {f"{name}: {kind}": (written(name, content), REFUSED)
            for name in (TOKENIZER, ABOUT)
            for kind, content in (TEXTS | JSONS).items()}
    return torn | {
        "no tokenizer.json": (removed(TOKENIZER), REFUSED),
        "no tokenizer_config.json": (removed(ABOUT), REFUSED),
        "no end of text": (without(ABOUT, "eos_token"), REFUSED),
        "an unknown end of text": (updated(ABOUT, eos_token="<none>"), REFUSED),
        "an end of text that is a number": (updated(ABOUT, eos_token=7), REFUSED),
        "an end of text as an object": (edited(ABOUT, lambda data: data.update(
            eos_token={"content": data["eos_token"]})), FINE),
        "no padding": (without(ABOUT, "pad_token"), FINE),
        "unknown padding": (updated(ABOUT, pad_token="<none>"), FINE),
        "a broken chat template": (updated(ABOUT, chat_template="{% for x in %}{{"), FINE),
        "no model in it": (without(TOKENIZER, "model"), REFUSED),
        "merges of unknown tokens": (edited(TOKENIZER, lambda data: data["model"]["merges"].append(
            ["\u2603", "\u2604"])), REFUSED),
        "a larger vocabulary": (lambda folder: write_tokenizer(folder, (), 900, 256), REFUSED),
    }


def models():
    """Name -> (change, exit codes)."""
    headers = {
        "overlapping offsets": header(overlapping), "offsets below 0": of_first("data_offsets", [-8, 0]),
        "offsets beyond the end": of_first("data_offsets", [0, 1 << 50]),
        "offsets are text": of_first("data_offsets", "x"),
        "another type": of_first("dtype", "F64"), "an unknown type": of_first("dtype", "Q9"),
        "another shape": of_first("shape", [3, 3]), "a negative shape": of_first("shape", [-1]),
        "a tensor of another name": header(renamed), "an empty header": header(lambda data: {}),
        "a list as header": header(lambda data: [1])}
    torn = {
        "a header of 101 MB": written(ONE, struct.pack("<Q", 101 << 20) + b" " * 64),
        "a header of 2^63 bytes": written(ONE, struct.pack("<Q", 1 << 63)),
        "bytes behind the end": lambda folder: (folder / ONE).write_bytes(
            (folder / ONE).read_bytes() + bytes(64)),
        "no tensor": written(ONE, struct.pack("<Q", 2) + b"{}"),
        "no weights": removed(ONE), "a folder as weights": folder_in_place_of(ONE),
        "a missing shard": sharded(lost="model-2.safetensors"),
        "an index that is a list": sharded(lambda index: [1]),
        "an index to numbers": sharded(lambda index: {"weight_map": {"a": 7}}),
        "an index that leads outside": sharded(
            lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../x")}),
        "config.json is a list": written(CONFIG, b"[]"), "config.json is torn": written(CONFIG, b'{"mod'),
        "no config.json": removed(CONFIG), "more layers than weights": updated(CONFIG, num_hidden_layers=5),
        "another width": updated(CONFIG, hidden_size=128), "width is text": updated(CONFIG, hidden_size="x"),
        "no heads": updated(CONFIG, num_attention_heads=0)}
    cuts = {f"cut at {share:.1%}": cut(share) for share in (0, 0.001, 0.1, 0.5, 0.999)}
    # Which shard holds a tensor is read from the shards' own headers, so these two change nothing.
    harmless = {
        "shards": sharded(),
        "an index to the wrong shard": sharded(
            lambda index: index["weight_map"].update({first_weight(index): "model-2.safetensors"})),
        "an index that lacks a tensor": sharded(
            lambda index: index["weight_map"].pop(first_weight(index)) and None)}
    return ({name: (change, REFUSED) for name, change in (headers | torn | cuts).items()}
            | {name: (change, FINE) for name, change in harmless.items()}
            | {"a family that nobody knows": (updated(CONFIG, model_type="nobody"), {2})})
