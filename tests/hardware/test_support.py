import pytest

from training.hardware import support
from training.hardware.support import Facts, evaluate
from training.records import Figure

EVERYTHING = dict.fromkeys(support.PACKAGES, "1.0")
TOOLS = {name: f"/usr/bin/{name}" for name in support.TOOLS}
NAMES = {"bf16", "flash_attention_2", "sdpa_flash", "deepspeed", "deepspeed_cpu_adam", "bitsandbytes_4bit",
         "bitsandbytes_8bit", "triton", "liger", "compile", "nvme", "compiler", "cuda"}


def facts(**changes) -> Facts:
    values = {"system": "Linux", "packages": EVERYTHING, "tools": TOOLS, "torch_cuda": "13.0"} | changes
    return Facts(**values)


def flops(**rates) -> dict[str, Figure]:
    return {f"cpu.matmul_{name}": Figure(value=value, unit="FLOP/s", method="test")
            for name, value in rates.items()}


def test_every_optimization_has_an_answer_with_a_reason():
    answers = evaluate(facts())
    assert set(answers) == NAMES
    assert all(answer.why for answer in answers.values())


def test_what_does_not_work_says_what_to_do_on_a_bare_machine():
    bare = evaluate(Facts(system="Linux"))
    assert not any(answer.works for answer in bare.values())
    assert bare["deepspeed"].what_to_do.endswith("-m pip install -r requirements.txt")
    assert "build-essential" in bare["compiler"].what_to_do


def test_an_ampere_gpu_with_everything_installed_gets_everything():
    answers = evaluate(facts(capability=(8, 6)))
    assert [name for name, answer in answers.items() if not answer.works] == ["nvme"]


def test_turing_has_no_bf16_and_no_flash_kernels_but_the_rest():
    answers = evaluate(facts(capability=(7, 5)))
    assert [name for name in ("bf16", "flash_attention_2", "sdpa_flash") if answers[name].works] == []
    assert answers["bf16"].why == "compute capability 7.5 has no bf16 units (8.0 and newer have)"
    assert answers["triton"].works


def test_bf16_on_a_cpu_is_judged_by_its_measured_speed():
    slow = evaluate(facts(figures=flops(fp32=70e9, bf16=1.3e9)))["bf16"]
    assert (slow.works, slow.why) == (False, "works but 54 times slower than fp32 here")
    fast = evaluate(facts(figures=flops(fp32=70e9, bf16=140e9)))["bf16"]
    assert (fast.works, fast.why) == (True, "bf16 matmul is 2.0 times as fast as fp32 here")


def test_bf16_on_an_unmeasured_cpu_goes_by_its_instructions():
    assert evaluate(facts(cpu_flags=("avx2", "avx512_bf16")))["bf16"].works
    assert not evaluate(facts(cpu_flags=("avx2",)))["bf16"].works


def test_a_trial_that_failed_beats_an_installed_package():
    failed = {"bitsandbytes_4bit": "RuntimeError: no kernel image"}
    answer = evaluate(facts(trials=failed))["bitsandbytes_4bit"]
    assert not answer.works
    assert "no kernel image" in answer.why
    assert "--force-reinstall" in answer.what_to_do


def test_a_trial_that_worked_is_told_from_one_that_was_not_made():
    tried = evaluate(facts(trials={"bitsandbytes_8bit": ""}))
    assert tried["bitsandbytes_8bit"].why == "bitsandbytes 1.0, tried on tiny tensors"
    assert tried["bitsandbytes_4bit"].why == "bitsandbytes 1.0; not tried"


def test_a_gpu_that_torch_cannot_use_names_the_build_and_the_command():
    answer = evaluate(facts(torch_cuda="", idle_gpus=("NVIDIA GeForce RTX 2060 SUPER",),
                            gpu_advice="pip install X",
                            packages=EVERYTHING | {"torch": "2.13.0+cpu"}))["cuda"]
    assert answer.why == "there is NVIDIA GeForce RTX 2060 SUPER, but torch 2.13.0+cpu is a CPU build"
    assert answer.what_to_do == "pip install X"


@pytest.mark.parametrize(("gb_s", "works"), [(0.35, False), (2.4, True)])
def test_streaming_to_disk_needs_a_gigabyte_a_second(gb_s, works):
    figure = Figure(value=gb_s * 1e9, unit="bytes/s", method="test")
    answer = evaluate(facts(figures={"disk.write": figure}))["nvme"]
    assert answer.works is works
    assert f"{gb_s:.2f} GB/s" in answer.why


def test_cpu_adam_needs_a_compiler_unless_it_is_cached():
    no_compiler = {name: path for name, path in TOOLS.items() if name in ("ninja", "deepspeed")}
    assert "must be compiled" in evaluate(facts(tools=no_compiler))["deepspeed_cpu_adam"].why
    cached = evaluate(facts(tools=no_compiler, built_ops=("cpu_adam",)))["deepspeed_cpu_adam"]
    assert cached.works


def test_deepspeed_without_its_launcher_does_not_work():
    tools = {name: path for name, path in TOOLS.items() if name != "deepspeed"}
    assert "without its launcher" in evaluate(facts(tools=tools))["deepspeed"].why


def test_a_compiler_without_ninja_is_told_apart():
    answer = evaluate(facts(tools={"gcc": "/usr/bin/gcc", "g++": "/usr/bin/g++"}))["compiler"]
    assert answer.why == "/usr/bin/g++ is here but ninja is not"
    assert answer.what_to_do.endswith("--only ninja")


def test_the_op_cache_is_found_where_torch_keeps_it(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = support.op_cache("")
    assert cache.parent == tmp_path / "torch_extensions"
    assert cache.name.endswith("_cpu")
    assert support.op_cache("13.0").name.endswith("_cu130")
    (cache / "cpu_adam").mkdir(parents=True)
    (cache / "half_made").mkdir()
    (cache / "cpu_adam" / "cpu_adam.so").touch()
    assert support.built_ops(cache) == ("cpu_adam",)


def test_the_op_cache_agrees_with_torchs_own_answer(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    theirs = cpp_extension._get_build_directory("cpu_adam", verbose=False)
    assert theirs == str(support.op_cache(support.torch_cuda_version()) / "cpu_adam")


def test_the_installed_torch_is_told_by_its_files_as_by_itself():
    import torch

    assert support.torch_cuda_version() == (torch.version.cuda or "")
    assert support.installed_packages()["torch"] == torch.__version__
