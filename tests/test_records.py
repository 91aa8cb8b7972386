"""Records survive JSON, and a wrong file is named by its field."""

import pytest

from training.errors import DataError, EliteError, MissingInput, Problems, UsageError, raise_all
from training.records import Choice, Figure, Gpu, HardwareProfile, Quality, Result, from_data, to_data
from training.rundir import read_record, write_record

GPU = Gpu(index=0, name="X", architecture="Ada", capability="8.9", total_bytes=8, free_bytes=7)
PROFILE = HardwareProfile(
    name="box", source="measured", date="d", system="s", cpu_name="c", cpu_cores=2, cpu_flags=("avx2",),
    ram_total_bytes=1, ram_available_bytes=1, gpus=(GPU,), disk_path="/", disk_free_bytes=1,
    figures={"cpu.matmul_fp32": Figure(value=1e11, unit="FLOP/s", method="matmul", repeats=3, spread=0.1),
             "gpu0.h2d_pinned": Figure(value=None, unit="bytes/s", method="not measured: no torch")})


def result(**values):
    fields = {"state": "done", "steps": 1, "epochs": 0.5, "tokens_trained": 10, "seconds": 1.0, "tier": 0,
              "context_tokens": 512, "memory": {"predicted_bytes": 1, "measured_bytes": None},
              "time": {"predicted_s": 1.0, "measured_s": 2.0},
              "quality": {"before": Quality(loss=2.0, bits_per_byte=1.0), "after": None},
              "model_dir": "model", "digest": "ab"}
    return Result(**{**fields, **values})


def test_a_profile_survives_json(tmp_path):
    write_record(tmp_path / "p.json", PROFILE)
    assert read_record(HardwareProfile, tmp_path / "p.json") == PROFILE
    assert PROFILE.device == "cuda"
    assert PROFILE.rate("cpu.matmul_fp32") == 1e11
    assert PROFILE.rate("gpu0.h2d_pinned") is None
    assert PROFILE.rate("nothing") is None


def test_a_result_survives_json():
    assert from_data(Result, to_data(result())) == result()


def test_a_result_that_lost_a_field_or_has_the_wrong_type_is_named_by_field():
    data = to_data(result())
    with pytest.raises(ValueError, match=r"Result\.digest is missing"):
        from_data(Result, {name: value for name, value in data.items() if name != "digest"})
    with pytest.raises(ValueError, match=r"Result\.steps is str, expected int"):
        from_data(Result, {**data, "steps": "1"})
    with pytest.raises(ValueError, match=r"Result\.quality\.before\.loss is missing"):
        from_data(Result, {**data, "quality": {"before": {"bits_per_byte": 1.0}}})


def test_a_file_that_is_torn_or_absent_is_told_apart(tmp_path):
    with pytest.raises(MissingInput, match="No such file"):
        read_record(Choice, tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"value": 1, ')
    with pytest.raises(DataError, match="not valid JSON"):
        read_record(Choice, tmp_path / "torn.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "r.json"
    write_record(path, Choice(1, "user", ""))
    with pytest.raises(ValueError, match="Out of range float"):
        write_record(path, Choice(float("nan"), "user", ""))
    assert read_record(Choice, path) == Choice(1, "user", "")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_several_problems_keep_the_first_ones_exit_code():
    raise_all([])
    with pytest.raises(UsageError):
        raise_all([UsageError("a")])
    with pytest.raises(Problems) as caught:
        raise_all([MissingInput("a"), UsageError("b")])
    assert (caught.value.exit_code, str(caught.value)) == (66, "a\nb")
    assert {cls.exit_code for cls in EliteError.__subclasses__()} == {2, 65, 66, 70, 71, 73, 75, 130}
