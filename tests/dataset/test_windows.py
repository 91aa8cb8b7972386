import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dataset import infill
from training.dataset.composer import Composer, coverage
from training.dataset.documents import Document, Marks, Part, Segment, cut, merged
from training.dataset.packing import best_fit_decreasing, pack_related
from training.dataset.structure.syntax import skeleton, statements
from training.dataset.windows import Layout, Text, composed_windows, packed_windows, slices

MARKS = Marks(eos=0, prefix=1, suffix=2, middle=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abc")), max_size=60), st.integers(50, 120))
def test_packing_puts_every_item_in_one_bin_that_holds_it(items, capacity):
    sizes, groups = [size for size, _ in items], [group for _, group in items]
    for bins in (best_fit_decreasing(sizes, capacity), pack_related(sizes, groups, capacity)):
        assert sorted(item for chosen in bins for item in chosen) == list(range(len(sizes)))
        assert all(sum(sizes[item] for item in chosen) <= capacity for chosen in bins)


def test_packing_refuses_what_it_would_have_to_cut():
    with pytest.raises(ValueError, match="has size 9, a bin holds 8"):
        best_fit_decreasing([3, 9], 8)


def test_packing_wastes_little():
    rng = random.Random(1)
    sizes = [min(4_096, int(rng.lognormvariate(6, 1.2)) + 1) for _ in range(3_000)]
    bins = best_fit_decreasing(sizes, 4_096)
    assert sum(sizes) / (len(bins) * 4_096) > 0.995


def test_files_of_one_folder_share_bins():
    sizes, groups = [3, 3, 3, 3], ["a", "b", "a", "b"]
    assert sorted(map(sorted, pack_related(sizes, groups, 6))) == [[0, 2], [1, 3]]


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=200), st.integers(1, 40))
def test_cuts_cover_the_body_in_order(ends, limit):
    spans = cut(np.array(ends, dtype=bool), limit)
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])][:len(spans)]
    assert (spans[-1][1] if spans else 0) == len(ends)
    assert all(0 < last - first <= limit for first, last in spans)


def library(seed: int, count: int, longest: int) -> tuple[list[Document], list[Text], dict]:
    """Documents after four marks, with random sizes, line ends, ends and imports."""
    rng = random.Random(seed)
    documents, texts, place = [], [], 4
    for index in range(count):
        body, header = rng.randint(1, longest), rng.randint(1, 3)
        ended = rng.random() < 0.8
        documents.append(Document(path=f"{rng.choice('ab')}/f{index}.txt", language="text", kind="code",
                                  start=place,
                                  header=header, body=body, ended=ended))
        texts.append(Text(text="", ends_line=np.array([rng.random() < 0.1 for _ in range(body)]),
                          token_bytes=np.ones(body - ended, dtype=np.uint16)))
        place += header + body
    paths = [document.path for document in documents]
    return documents, texts, {path: tuple(set(rng.sample(paths, min(2, count))) - {path}) for path in paths}


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 300), st.integers(16, 200),
       st.integers(1, 200),
       st.sampled_from([0.0, 0.5, 1.0]))
def test_every_body_token_is_a_target_once_and_windows_fit(seed, count, longest, context, target,
                                                           fim_share):
    documents, texts, edges = library(seed, count, longest)
    layout = Layout(context_tokens=context, target_tokens=min(target, context), fim_share=fim_share,
                    seed=seed,
                    marks=MARKS)
    parts = slices(documents, texts, layout)
    composer = Composer(documents, edges, MARKS, context, np.array([], dtype=np.int64))
    windows = (packed_windows(documents, parts, edges, layout) if layout.packed
               else composed_windows(documents, parts, composer, layout))
    trained: dict[int, int] = {}
    for window in windows:
        assert 0 < window.length <= context
        assert not window.segments[0].trained, "the first token of a window has no loss"
        targets = sum(segment.length for segment in window.segments if segment.trained)
        assert 0 < targets <= layout.target_tokens
        for start, length, is_target in window.segments:
            for place in range(start, start + length) if is_target else ():
                trained[place] = trained.get(place, 0) + 1
    ends = trained.pop(MARKS.eos, 0)
    assert fim_share > 0 or ends == 0
    bodies = {place for document in documents
              for place in range(document.body_start, document.body_start + document.body)}
    assert trained == dict.fromkeys(bodies, 1)


def document(path: str, start: int, header: int, body: int, **more) -> Document:
    return Document(path=path, language="python", kind="code", start=start, header=header, body=body, **more)


def test_dependencies_stand_before_the_target_nearest_last_and_own_text_right_before_it():
    documents = [document("far/x.py", 100, 1, 59), document("app/dep.py", 200, 1, 59),
                 document("app/a.py", 300, 1, 100),
                 document("app/sibling.py", 500, 1, 59)]
    composer = Composer(documents, {"app/a.py": ("app/dep.py",)}, MARKS, 400, np.array([], dtype=np.int64))
    window = composer.compose(documents, [Part(2, 40, 60)])
    assert window.segments == (Segment(500, 60, False), Segment(200, 60, False), Segment(300, 41, False),
                               Segment(341, 20, True))
    assert window.dependencies == (101,)
    assert coverage([window], 400) == {"400": 1.0}
    assert coverage([window], 100) == {"100": 0.0}


def test_a_dependency_too_long_for_the_window_comes_as_its_skeleton_or_its_beginning():
    dep = document("dep.py", 1_000, 1, 5_000, skeleton=(9_000, 40))
    target = document("a.py", 100, 1, 50)
    ends = np.array([1_020, 1_060, 1_900])
    edges = {"a.py": ("dep.py",)}
    with_skeleton = Composer([dep, target], edges, MARKS, 300, ends).compose([target], [Part(0, 0, 50)])
    assert with_skeleton.segments[:2] == (Segment(1_000, 1, False), Segment(9_000, 40, False))
    assert with_skeleton.dependencies == (42,)
    plain = document("dep.py", 1_000, 1, 5_000)
    without = Composer([plain, target], edges, MARKS, 300, ends).compose([target], [Part(0, 0, 50)])
    assert without.segments[0] == Segment(1_000, 61, False), "cut after the line that ends at 1,060"
    assert without.dependencies == (None,)


def test_a_file_cut_in_two_gives_the_end_of_its_first_part_as_context():
    first, second = document("a.py", 10, 1, 300, ended=False), document("a.py", 400, 1, 50)
    composer = Composer([first], {"a.py": ()}, MARKS, 151, np.array([], dtype=np.int64))
    assert composer.compose([second], [Part(0, 0, 50)]).segments == (
        Segment(211, 100, False), Segment(400, 1, False), Segment(401, 50, True))


def test_infilled_targets_move_the_middle_behind_the_suffix_and_end_with_the_end_mark():
    file, lead = document("a.py", 10, 2, 20), [Segment(10, 2, False)]
    one = [Segment(place, 1, False) for place in (1, 2, 3)]
    psm = infill.segments(file, Part(0, 0, 20, (5, 9, False)), lead, MARKS)
    assert psm == [one[0], lead[0], Segment(12, 5, True), one[1], Segment(21, 10, True), one[2],
                   Segment(17, 4, True),
                   Segment(31, 1, True)]
    spm = infill.segments(file, Part(0, 0, 10, (5, 9, True)), lead, MARKS)
    assert spm == [one[0], one[1], Segment(21, 1, True), one[2], lead[0], Segment(12, 5, True),
                   Segment(17, 4, True),
                   Segment(0, 1, True)]


def test_middles_are_mostly_statements_and_never_empty():
    ends = np.arange(9, 100, 10)
    spans = [(20, 30), (40, 70)]
    drawn = [infill.choose_middle(random.Random(seed), 0, 100, spans, ends) for seed in range(400)]
    share = sum(span in spans for span in drawn) / len(drawn)
    assert 0.75 < share < 0.9
    assert all(0 <= first < last <= 100 and last - first < 100 for first, last in drawn)


def test_statement_spans_are_whole_statements_in_tokens():
    text = "x = 1\nif x:\n    y = 'é'\n"
    spans = infill.statement_spans(text, np.ones(len(text.encode()), dtype=np.uint16))
    raw = text.encode()
    assert [raw[first:last].decode() for first, last in spans] == ["x = 1", "if x:\n    y = 'é'", "y = 'é'"]
    assert infill.statement_spans(text, np.ones(3, dtype=np.uint16)) == []


def test_statements_carry_lines_with_decorators_and_depth():
    found = statements("@wrap\ndef f():\n    return 1\n")
    assert [(item.first_line, item.last_line, item.depth) for item in found] == [(0, 2, 0), (2, 2, 1)]
    assert statements("def broken(:") == []


def test_a_skeleton_keeps_signatures_and_first_doc_lines_and_drops_bodies():
    text = ('import os\n\n\nclass A(Base):\n    """What it is.\n\n    More."""\n\n'
            '    def run(self,\n            x: int):\n'
            '        """Runs."""\n' + "        print(x)\n" * 30 + "\n\nVALUE = 1\n")
    assert skeleton(text, "python") == ('class A(Base):\n    """What it is."""\n'
                                        '    def run(self,\n            x: int):\n'
                                        '        """Runs."""\n')
    go = "package x\n\nfunc Run(a int) error {\n" + "\treturn work(a)\n" * 20 + "}\n"
    assert skeleton(go, "go") == "package x\nfunc Run(a int) error {\n"
    assert skeleton("x = 1\n", "python") == ""


def test_neighbouring_segments_are_joined_and_empty_ones_left_out():
    assert merged([Segment(0, 2, False), Segment(2, 0, True), Segment(2, 3, False), Segment(5, 1, True)]) == [
        Segment(0, 5, False), Segment(5, 1, True)]


def test_skeletons_of_long_odd_files_take_no_quadratic_time():
    started = time.monotonic()
    for text in ("func (a b) c\n" * 40_000, "word " * 100_000, "int f(" * 60_000, "a b c d(x)\n" * 40_000):
        skeleton(text, "go")
    assert time.monotonic() - started < 10
