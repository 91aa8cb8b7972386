"""Files that run code when they are unpickled, and folders that ask a library to run theirs."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch

from training.trainer import checkpoints


class Armed:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        import os

        return os.mkdir, (self.marker,)


def pickles(marker):
    """The same in each form that a reader of weights or data may take for its own."""
    armed, packed, array = {"weight": Armed(marker)}, io.BytesIO(), io.BytesIO()
    torch.save(armed, packed)
    np.save(array, np.array([Armed(marker)], dtype=object), allow_pickle=True)
    return {"pickle": pickle.dumps(armed), "old pickle": pickle.dumps(armed, protocol=0),
            "torch": packed.getvalue(), "array": array.getvalue()}


def copy(folder: Path, name: str) -> Path:
    """A copy to spoil, beside the folder."""
    target = folder.with_name(f"{folder.name}-{name}")
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target))


def reseal(checkpoint: Path) -> None:
    """The manifest that this trainer would have written of the files as they are now."""
    path = checkpoint / checkpoints.MANIFEST
    facts = json.loads(path.read_text())
    facts.pop("sha256", None)
    facts["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": checkpoints.sha256(file)}
                      for file in sorted(checkpoint.iterdir()) if file.name != checkpoints.MANIFEST}
    path.write_text(checkpoints.sealed(facts))


def recount(dataset: Path) -> None:
    """The sizes of a dataset's files as they are now."""
    path = dataset / "manifest.json"
    facts = json.loads(path.read_text())
    facts["store"]["files"] = {name: (dataset / name).stat().st_size for name in facts["store"]["files"]}
    path.write_text(json.dumps(facts))


# Files of a base model folder that some library would unpickle.
BASE_FILES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
              "rng_state.pth", "scaler.pt", ".metadata", "__0_0.distcp", "model.pt", "consolidated.00.pth",
              "vocab.pkl", "tokenizer.pkl", "mp_rank_00_model_states.pt", "tf_model.h5", "flax_model.msgpack")
CHECKPOINT_FILES = (checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.MANIFEST)
FOREIGN_FILES = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", ".metadata",
                 "__0_0.distcp", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt",
                 "pytorch_model.bin", "scaler.pt")
DATASET_FILES = ("token_bytes.npy", "ends_line.npy", "tokens.bin", "train_windows.bin", "completions.json",
                 "manifest.json", "tokenizer/tokenizer.json")


def code(marker) -> str:
    """A module that leaves a mark when it is imported, whatever class is then asked of it."""
    return (f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
            "from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast\n"
            "class C(PhiConfig): pass\nclass M(PhiForCausalLM): pass\n"
            "class T(PreTrainedTokenizerFast): pass\n")


OWN = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M",
       "AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"]}
REMOTE = dict.fromkeys(OWN, "nobody/elsewhere--modeling_x.M")
# What a config.json can ask for: name -> its keys.
ASKED = {
    "its own classes": {"auto_map": OWN}, "classes of another place": {"auto_map": REMOTE},
    "an unknown type": {"auto_map": OWN, "model_type": "nobodys"},
    "an unknown type elsewhere": {"auto_map": REMOTE, "model_type": "nobodys"},
    "no type": {"auto_map": OWN, "model_type": None}, "a path as type": {"model_type": "../../modeling_x"},
    "trust": {"auto_map": OWN, "trust_remote_code": True, "model_type": "nobodys"},
    "trust within": {"text_config": {"trust_remote_code": True, "auto_map": OWN}},
    "a model file": {"model_file": "modeling_x.py"}, "architectures": {"architectures": ["os.system"]},
    "a kernel": {"_attn_implementation_internal": "nobody/kernel", "_attn_implementation": "nobody/kernel",
                 "_experts_implementation_internal": "nobody/kernel"},
    "kernels": {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": "nobody/kernel:X"}}},
    "a plan": {"base_model_tp_plan": {"x": "__import__('os')"}},
    "a path": {"_name_or_path": "nobody/elsewhere", "name_or_path": "nobody/elsewhere"},
    **{f"quantized by {name}": {"quantization_config": {"quant_method": name, "bits": 4, "trust_remote_code":
                                                        True, "tokenizer": "nobody/elsewhere"}}
       for name in ("gptq", "awq", "aqlm", "hqq", "torchao", "compressed-tensors", "nobodys")},
}


def asking(base: Path, name: str, keys, marker) -> Path:
    """A base model folder whose config.json asks for this, with modules that leave the mark."""
    folder = copy(base, name.replace(" ", "-"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | keys))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": OWN}))
    for module in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py",
                   "custom_generate/generate.py"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / module).write_text(code(marker))
    return folder


def without_fast_form(folder: Path) -> Path:
    """The tokenizer as the older files, which Transformers has to convert."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges))
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def outcome(act):
    """What an attempt to read something came to."""
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return "read"
