import pytest

from training.hardware import opstates, support
from training.hardware.support import Facts, evaluate
from training.records import Figure

EVERYTHING = dict.fromkeys(support.PACKAGES, "1.0")
TOOLS = {name: f"/usr/bin/{name}" for name in support.TOOLS}
NAMES = {"bf16", "flash_attention_2", "sdpa_flash", "deepspeed", "deepspeed_cpu_adam", "bitsandbytes_4bit",
         "bitsandbytes_8bit", "triton", "liger", "compile", "nvme", "compiler", "cuda", "cudnn", "fp16",
         "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "deepspeed_async_io", "deepspeed_shm_comm",
         "deepspeed_fused_adam"}


def facts(**changes) -> Facts:
    values = {"system": "Linux", "packages": EVERYTHING, "tools": TOOLS, "torch_cuda": "13.0",
              "libaio": True, "cudnn": "9.10.2"} | changes
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
    assert [name for name, answer in answers.items() if not answer.works] == ["deepspeed_shm_comm", "nvme"]
    assert answers["cudnn"].why == "cuDNN 9.10.2; not tried"


def test_every_answer_that_is_no_says_why_and_what_to_do():
    machines = [Facts(system="Linux"), facts(), facts(capability=(6, 1)), facts(capability=(7, 5)),
                facts(capability=(9, 0), cudnn="", packages={"torch": "1"}, tools={}),
                facts(system="Darwin"), facts(system="Windows", packages={})]
    for machine in machines:
        for name, answer in evaluate(machine).items():
            assert answer.why
            assert answer.works or answer.what_to_do or name == "cuda", name


def test_pascal_has_neither_16_bit_units_nor_flash_but_runs_attention():
    answers = evaluate(facts(capability=(6, 1)))
    assert answers["fp16"].why == "compute capability 6.1 has no fp16 tensor cores (7.0 and newer have)"
    assert (answers["sdpa_efficient"].works, answers["sdpa_math"].works) == (True, True)
    assert answers["sdpa_cudnn"].why == "cuDNN's attention needs compute capability 8.0; this GPU has 6.1"


def test_each_attention_kernel_is_answered_by_its_own_trial():
    trials = {"sdpa_flash": "", "sdpa_cudnn": "RuntimeError: No available kernel", "sdpa_efficient": ""}
    answers = evaluate(facts(capability=(8, 6), trials=trials))
    assert answers["sdpa_flash"].works
    assert not answers["sdpa_cudnn"].works
    assert answers["sdpa_cudnn"].what_to_do == "Nothing: SDPA takes another kernel."


def test_a_cpu_has_the_flash_and_the_plain_kernel_alone():
    answers = evaluate(facts())
    assert [name for name in answers if name.startswith("sdpa_") and answers[name].works] == [
        "sdpa_flash", "sdpa_math"]


def test_fp16_on_a_cpu_is_judged_by_its_measured_speed():
    answer = evaluate(facts(figures=flops(fp32=70e9, fp16=1.4e9)))["fp16"]
    assert (answer.works, answer.why) == (False, "works but 50 times slower than fp32 here")


def test_compile_was_tried_where_triton_was():
    assert evaluate(facts(capability=(8, 6), trials={"triton": ""}))["compile"].why == (
        "torch.compile compiled a kernel here")
    assert "was not tried" in evaluate(facts())["compile"].why


@pytest.mark.parametrize(("changes", "works", "words"), [
    ({"installed_ops": ("async_io",)}, True, "installed with deepspeed"),
    ({"built_ops": ("async_io",)}, True, "compiled and cached"),
    ({"libaio": False}, False, "libaio.h was not found"),
    ({"capability": (8, 6), "tools": {"deepspeed": "/d"}}, False, "nvcc was not found"),
    ({"system": "Darwin"}, False, "it is for Linux; this is Darwin"),
    ({"tools": {"deepspeed": "/d", "ninja": "/n"}}, False, "no C++ compiler was found"),
    ({}, True, "will be compiled on first use"),
    ({"packages": {}}, False, "deepspeed is not installed")])
def test_the_disk_op_is_installed_compiled_or_to_be_compiled(changes, works, words):
    answer = evaluate(facts(**changes))["deepspeed_async_io"]
    assert answer.works is works
    assert words in answer.why


def test_ops_that_serve_the_other_kind_of_device_say_so():
    assert "CPU Adam serves" in evaluate(facts())["deepspeed_fused_adam"].why
    assert "NCCL" in evaluate(facts(capability=(8, 6)))["deepspeed_shm_comm"].why


def test_libaio_is_found_where_the_compiler_is_told_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(opstates, "AIO_HEADERS", ())
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.setenv("CFLAGS", f"-O2 -I{tmp_path}")
    assert not opstates.libaio()
    (tmp_path / "libaio.h").touch()
    assert opstates.libaio()


def test_the_ops_in_deepspeeds_installation_are_read_as_deepspeed_reads_them():
    from deepspeed.git_version_info import installed_ops

    assert opstates.installed_ops() == tuple(sorted(name for name, built in installed_ops.items() if built))


def test_every_deepspeed_op_answered_for_is_one_that_deepspeed_knows():
    from deepspeed.git_version_info import installed_ops

    assert set(opstates.NAMES) <= set(installed_ops)


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
