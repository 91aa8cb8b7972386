"""report.html and the rows of the last table: what they say, and that nothing in them acts."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from report_samples import curve, finished
from run_factory import make_run

from training.manager import charts, contexts, facts, report
from training.settings import KEYS

PAYLOADS = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'><svg onload=alert(1)>",
            "</style><b>", "</pre></section><iframe src=//x>", "javascript:alert(1)", "\x1b]8;;http://x\x07link\x1b]8;;\x07",
            "\u202egnp.exe", "\x00\x9b31m", "&lt;script&gt;", "{{7*7}}", "=cmd|' /C calc'!A0", "\ud800")


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def html_of(run):
    return report.write_report(run.path).read_text(encoding="utf-8")


def test_a_finished_run_is_told_whole(tmp_path):
    html = html_of(finished(tmp_path / "click"))
    page = Page(html)
    words = " ".join(" ".join(page.words).split())
    for said in ("The loss on held-out files fell from 8.320 to 2.410 (71.0 % less).", "bits per byte",
                 "1.16 GiB", "1.22 GiB", "+5 %", "optimizer state", "files seen", "too large",
                 "secrets replaced", "1.2 %", "click/termui.py", "echo(prompt, nl=False, err=err)",
                 f"{len(KEYS)} choices with their reasons", "why training.learning_rate", "8 h granted",
                 "Some CPU", "5f" * 32,
                 "AutoModelForCausalLM.from_pretrained", "python3 elite_train.py --auto --repo /src/click"):
        assert said in words, said
    assert page.tags.count("polyline") == 3
    assert page.tags.count("circle") == 4


def test_a_loss_that_did_not_fall_is_said(tmp_path):
    rose, same = finished(tmp_path / "rose", after=8.5), finished(tmp_path / "same", after=8.32)
    assert "rose from 8.320 to 8.500. Training did not help" in html_of(rose)
    assert 'class="worse">worse' in html_of(rose)
    assert "stayed at 8.320: training did not help" in facts.summary(same.path)["verdict"]


def test_the_page_loads_and_runs_nothing(tmp_path):
    html = html_of(finished(tmp_path / "run"))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]
    policy = re.search(r'Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy, "or the browser would refuse the page's own style"
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_from_a_run_stays_text(tmp_path, payload):
    html = html_of(finished(tmp_path / "run", hostile=payload.replace("\ud800", ""), steps=3))
    calm = html_of(finished(tmp_path / "calm", steps=3))
    page = Page(html)
    assert sorted(page.tags) == sorted(Page(calm).tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in Page(calm).attributes}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    rows = json.dumps(facts.summary(tmp_path / "run"), ensure_ascii=False)
    assert not re.search("[\x00-\x08\x1b\u202e]", rows)
    assert facts.visible("\ud800") == "<U+D800>"


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path, keep):
    run = make_run(tmp_path / "run")
    names = [run.plan, run.config, run.dataset / "manifest.json"]
    for path in names[keep:]:
        path.unlink()
    html = html_of(run)
    assert "The run has not ended." in html
    assert "unfinished" in html


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"',
                                  '{"quality": 3, "memory": [], "samples": [1], "time": null}',
                                  '{"quality": {"after": {"context_curve": {"rows": 5}}}}',
                                  '{"quality": {"after": {"context_curve": {"rows": [1, '
                                  '{"kind": "composed"}, {"kind": [], "loss": 1.0, "length": 0}, '
                                  '{"kind": "x", "loss": 1.0, "length": 9}]}}}}',
                                  '{"state": "done", "quality": {"before": {"loss": "x"}}}'])
def test_a_torn_result_does_not_break_the_page(tmp_path, text):
    run = make_run(tmp_path / "run")
    run.result.write_text(text)
    run.plan.write_text(text)
    run.metrics.write_text('{"step": 1, "loss": null}\n{"step": "x"}\n{"st')
    assert "<!doctype html>" in html_of(run)
    assert facts.summary(run.path)["load"] == []


def test_an_end_without_success_gives_its_reason(tmp_path):
    run = make_run(tmp_path / "run")
    run.result.write_text(json.dumps({"state": "failed", "error": "A step needs 9 GiB; 8 GiB is free."}))
    html = html_of(run)
    assert "The run failed." in html
    assert "A step needs 9 GiB; 8 GiB is free." in html


def test_losses_that_are_not_finite_are_counted(tmp_path):
    run = finished(tmp_path / "run", steps=10)
    with run.metrics.open("a") as file:
        file.write('{"step": 11, "loss": null}\n')
    assert "Steps with a loss that is not finite: 1." in html_of(run)


def test_the_last_tables_rows(tmp_path):
    run = finished(tmp_path / "run")
    rows = facts.summary(run.path)
    assert rows["compared"] == [
        {"name": "memory", "predicted": "1.16 GiB", "measured": "1.22 GiB", "off": "+5 %"},
        {"name": "time", "predicted": "3:20", "measured": "3:01", "off": "-9 %"}]
    assert rows["quality"][0] == {"name": "held-out loss, nats a token", "before": "8.320", "after": "2.410",
                                  "change": "-5.910", "verdict": "better"}
    assert rows["sample"]["path"] == "click/termui.py", "the first that was drawn, not the best"
    assert rows["load"] == ["from transformers import AutoModelForCausalLM",
                            f'model = AutoModelForCausalLM.from_pretrained("{run.path}/model")']
    (run.path / "model" / "adapter_config.json").write_text("{}")
    assert facts.summary(run.path)["load"][0] == "from peft import AutoPeftModelForCausalLM"


def test_a_long_run_is_drawn_with_a_bounded_number_of_points():
    points = [(step, 5.0) for step in range(100_000)]
    drawing = charts.loss_curve(points, [])
    assert len(drawing) < 40_000
    assert charts.loss_curve([(1, 2.0)], []) == ""
    assert "nan" not in charts.loss_curve([(1, 2.0), (1, 2.0)], [(1, 2.0)])


def test_what_context_is_worth_is_told(tmp_path):
    html = html_of(finished(tmp_path / "run"))
    words = " ".join(" ".join(Page(html).words).split())
    for said in ("Loss by context", "Loss on 8 targets of 5 held-out files after training",
                 "4,096 2.210 (-0.300) 2.430 (-0.080) 2.520 (+0.010)", "512 2.360 (-0.150)",
                 "Foreign context: a library", "untrained 8.400 8.390", "trained 2.510 2.210",
                 "5.890 by training alone, 0.010 by composed context alone, 6.190 by both.",
                 "Compressors on held-out text, bits per byte: xz 1.66, gzip 1.76.",
                 "composed 1.373 0.291 (0.201 to 0.400)", "none 1.664"):
        assert said in words, said
    assert "helps more than" not in words
    assert facts.summary(tmp_path / "run")["context"] == (
        "Composed context of 3,686 tokens lowers the loss by 0.300 (0.250 to 0.350); random context of 3,686 "
        "tokens lowers the loss by 0.080 (0.030 to 0.130); foreign context of 3,686 tokens did not help: the "
        "loss rises by 0.010 (-0.040 to 0.060, may be chance).")


@pytest.mark.parametrize(("base", "base_gain", "tuned", "tuned_gain", "said"), [
    (3.0, 0.1, 2.0, 0.2, "1.000 by training alone, 0.100 by composed context alone, 1.200 by both."),
    (3.0, 0.5, 2.8, 0.5, "0.700 by both. Context alone helps more than training alone."),
    (3.0, 0.5, 2.8, 0.2, "0.400 by both. With context given, training did not help. Context alone helps more "
                         "than training alone."),
    (3.0, 0.0, 3.1, 0.4, "0.300 by both. Training did not help without context. Context alone helps more "
                         "than training alone."),
    (3.0, -0.1, 2.8, 0.2, "0.200 by training alone, -0.100 by composed context alone, 0.400 by both.")])
def test_the_four_arms_say_what_training_and_context_did(base, base_gain, tuned, tuned_gain, said):
    result = {"quality": {"before": {"context_curve": curve(base, -base_gain, kinds=1)},
                          "after": {"context_curve": curve(tuned, -tuned_gain)}}}
    arms = contexts.arms(result)
    assert arms == pytest.approx({"base": base, "base_context": base - base_gain, "tuned": tuned,
                                  "tuned_context": tuned - tuned_gain})
    assert contexts.judgement(arms).endswith(said)


def test_nothing_is_said_of_context_that_was_not_measured():
    assert contexts.sentence({}) == contexts.judgement(contexts.arms({})) == contexts.compressors({}) == ""
    one = curve(2.0, -0.3, kinds=1)
    assert contexts.arms({"quality": {"before": None, "after": {"context_curve": one}}}) == {}
    one["rows"][-1] |= {"low": None, "high": None}
    assert contexts.sentence(one) == ("Composed context of 3,686 tokens lowers the loss by 0.300 (one file: "
                                      "no interval).")
    one["rows"] = one["rows"][:1]
    assert contexts.sentence(one) == ""
