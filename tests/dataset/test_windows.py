import random
from collections import Counter

import numpy as np
import pytest
from arrays import EOS, Array, library
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dataset import infill, windows
from training.dataset.building import Builder, Sides, packing_waste
from training.dataset.composer import Composer, Coverage, Library
from training.dataset.documents import (
    FIRST_MOVES,
    INFILL_ALWAYS,
    INFILL_DRAWN,
    LAST_MOVES,
    TRAINED,
    Document,
    Part,
    Segment,
    cut,
    merged,
)
from training.dataset.infill import Varying, varied
from training.dataset.packing import best_fit_decreasing, pack_related
from training.dataset.windows import Layout

FIM = {"prefix": 1, "suffix": 2, "middle": 3}


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
@given(st.lists(st.booleans(), max_size=200), st.integers(1, 40), st.integers(0, 5))
def test_cuts_cover_the_body_in_order(ends, limit, start):
    array = np.array([False] * start + ends, dtype=bool)
    spans = cut(start, len(ends), limit, lambda place, length: array[place:place + length])
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])][:len(spans)]
    assert (spans[-1][1] if spans else 0) == len(ends)
    assert all(0 < last - first <= limit for first, last in spans)


layouts = st.builds(
    lambda context, target, fim, whole, rate, sentinels: Layout(
        context_tokens=context, target_tokens=min(target, context), seed=1, sentinels=sentinels,
        fim_share=fim, whole_share=whole, fim_rate=rate),
    st.integers(16, 400), st.integers(1, 400), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.5, 1.0]), st.booleans())


def written(folder, known, documents, layout):
    """(kind, segments) of each train window, through the real builder and index."""
    builder = Builder(folder, Sides(train=documents, held_out=documents[:2]), known, layout)
    return list(builder._train_windows()), builder


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 600), layouts)
def test_in_every_epoch_each_body_token_is_a_target_once_and_windows_fit(tmp_path_factory, seed, count,
                                                                         longest, layout):
    known, documents, array = library(seed, count, longest)
    found, _ = written(tmp_path_factory.getbasetemp(), known, documents, layout)
    how = Varying(eos_id=EOS, fim=FIM if layout.infills else {}, fim_rate=layout.fim_rate,
                  move_tokens=layout.move_tokens, order="psm+spm")
    bodies = Counter(place for document in documents
                     for place in range(document.body_start, document.body_start + document.body))
    seen = set()
    for epoch in range(3):
        trained: Counter[int] = Counter()
        for kind, window in found:
            segments = varied(window.segments, how, array, f"7\0{epoch}")
            length = sum(segment.length for segment in segments)
            assert 0 < length <= layout.context_tokens
            assert not segments[0].trained, "the first token of a window has no loss"
            targets = sum(segment.length for segment in segments if segment.trained)
            assert 0 < targets <= (layout.target_tokens if kind == "cross-file" else layout.context_tokens)
            for segment in segments:
                if segment.trained and segment.start >= 0:
                    trained.update(range(segment.start, segment.start + segment.length))
            seen.add(tuple(segments))
        assert trained == bodies
    assert layout.infills or layout.move_tokens or len(seen) == len(found), "nothing varies"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(40, 600))
def test_held_out_windows_are_the_same_in_every_epoch(seed, count, longest):
    known, documents, array = library(seed, count, longest)
    layout = Layout(context_tokens=256, target_tokens=64, seed=1, sentinels=True, fim_share=0.5, fim_rate=1.0,
                    varied=False)
    parts = windows.composed_parts(documents, range(count), layout, known.line_ends)
    how = Varying(eos_id=EOS, fim=FIM, fim_rate=1.0, move_tokens=8)
    for window in windows.composed_windows(documents, parts, Composer(known, 256), layout):
        first, second = (varied(window.segments, how, array, f"1\0{epoch}") for epoch in (0, 1))
        assert first == second
        assert all(segment.start >= 0 for segment in first)


def test_the_shares_of_the_mix_come_out_and_files_without_relations_go_first():
    known, documents, _ = library(3, 400, 200)
    related = {path: targets for path, targets in known.edges.items() if int(path[3:-4]) % 2}
    layout = Layout(context_tokens=512, target_tokens=64, seed=5, sentinels=True, fim_share=0.2,
                    whole_share=0.3)
    found = windows.kinds(documents, related, layout)
    total = sum(document.body for document in documents)
    sizes = Counter()
    for document, kind in zip(documents, found, strict=True):
        sizes[kind] += document.body
    assert abs(sizes["fim"] / total - 0.2) < 0.01
    assert abs(sizes["whole"] / total - 0.3) < 0.01
    fim = {document.kind for document, kind in zip(documents, found, strict=True) if kind == "fim"}
    assert fim == {"code"}
    alone = [kind for document, kind in zip(documents, found, strict=True)
             if not related.get(document.path) and document.kind == "code"]
    tied = [kind for document, kind in zip(documents, found, strict=True) if related.get(document.path)]
    assert alone.count("cross-file") / len(alone) < tied.count("cross-file") / len(tied)
    assert found == windows.kinds(documents, related, layout)


def test_without_sentinels_or_in_packed_windows_the_shares_go_to_other_kinds():
    known, documents, _ = library(3, 40, 200)
    plain = Layout(context_tokens=512, target_tokens=64, seed=5, fim_share=0.5, whole_share=0.0)
    assert set(windows.kinds(documents, {}, plain)) == {"cross-file"}
    packed = Layout(context_tokens=512, target_tokens=512, seed=5)
    assert set(windows.kinds(documents, known.edges, packed)) == {"whole"}


def document(path, start, header, body, **more):
    return Document(path=path, language="python", kind="code", start=start, header=header, body=body, **more)


def flat(documents, edges, pairs=None, ends=(), words=None):
    """A library over an array whose line ends are at `ends`."""
    marks = np.zeros(20_000, dtype=bool)
    marks[list(ends)] = True
    return Library(documents=documents, edges=edges, pairs=pairs or {},
                   words=np.zeros((len(documents), 32), np.uint32) if words is None else words,
                   line_ends=lambda start, length: marks[start:start + length])


def test_dependencies_stand_before_the_target_nearest_last_and_own_text_right_before_it():
    documents = [document("far/x.py", 100, 1, 59), document("app/dep.py", 200, 1, 59),
                 document("app/a.py", 300, 1, 100), document("app/sibling.py", 500, 1, 59)]
    composer = Composer(flat(documents, {"app/a.py": ("app/dep.py",)}), 400)
    window = composer.compose(documents, [Part(2, 40, 60)])
    assert window.segments == (Segment(500, 60), Segment(200, 60), Segment(300, 1), Segment(301, 40),
                               Segment(341, 20, TRAINED, 2))
    assert window.dependencies == (), "each file's dependencies are counted once, where it begins"
    beginning = composer.compose(documents, [Part(2, 0, 60)])
    assert beginning.dependencies == (61,)
    for length, share in ((61, 1.0), (60, 0.0)):
        counted = Coverage(length)
        counted.add(beginning)
        assert counted.shares() == {str(length): share}


def test_the_sibling_test_stands_nearer_than_a_file_of_the_folder_and_shared_words_break_ties():
    documents = [document("app/a.py", 0, 1, 39), document("app/like.py", 100, 1, 39),
                 document("app/other.py", 200, 1, 39), document("tests/test_a.py", 300, 1, 39)]
    words = np.zeros((4, 32), np.uint32)
    words[[0, 1], :3] = [7, 8, 9]
    composer = Composer(flat(documents, {}, {"app/a.py": ("tests/test_a.py",)}, words=words), 300)
    assert [document.path for document, _ in composer.ranking("app/a.py")] == [
        "tests/test_a.py", "app/like.py", "app/other.py"]


def test_a_dependency_too_long_for_the_window_comes_as_its_skeleton_or_its_beginning():
    dep = document("dep.py", 1_000, 1, 5_000, skeleton=(9_000, 40))
    target, edges = document("a.py", 100, 1, 50), {"a.py": ("dep.py",)}
    ends = (1_020, 1_060, 1_900)
    skeleton = Composer(flat([dep, target], edges, ends=ends), 300).compose([target], [Part(0, 0, 50)])
    assert skeleton.segments[:2] == (Segment(1_000, 1), Segment(9_000, 40))
    assert skeleton.dependencies == (42,)
    plain = document("dep.py", 1_000, 1, 5_000)
    without = Composer(flat([plain, target], edges, ends=ends), 300).compose([target], [Part(0, 0, 50)])
    assert without.segments[0] == Segment(1_000, 61), "cut after the line that ends at 1,060"
    assert without.dependencies == (None,)


def test_far_files_come_whole_where_there_is_ample_room_and_as_skeletons_elsewhere():
    far = document("far/x.py", 1_000, 1, 99, skeleton=(9_000, 10))
    target = document("app/a.py", 100, 1, 50)
    for context, expected in ((4_000, Segment(1_000, 100)), (1_000, Segment(1_000, 1))):
        window = Composer(flat([far, target], {}), context).compose([target], [Part(0, 0, 50)])
        assert window.segments[0] == expected


def test_a_file_cut_in_two_gives_the_end_of_its_first_part_as_context():
    first, second = document("a.py", 10, 1, 300, ended=False), document("a.py", 400, 1, 50)
    composer = Composer(flat([first], {"a.py": ()}), 151)
    assert composer.compose([second], [Part(0, 0, 50)]).segments == (
        Segment(211, 100), Segment(400, 1), Segment(401, 50, TRAINED, 1))


def everything(length, nodes=(), ends=()):
    marks = np.zeros(length, dtype=bool)
    marks[list(ends)] = True
    ids = np.full(length, 9)
    ids[-1] = EOS
    return Array(ids, marks, np.array(nodes, dtype=np.int64).reshape(-1, 2))


@pytest.mark.parametrize(("order", "shape"), [
    ("psm", "P lead before S after M middle end"), ("suffix-first", "S after P lead before M middle end")])
def test_the_middle_moves_behind_prefix_and_suffix_in_the_bases_own_order(order, shape):
    array = everything(40, nodes=[(20, 24)])
    row = Segment(10, 30, TRAINED | INFILL_ALWAYS, 1)
    how = Varying(eos_id=EOS, fim=FIM, order=order)
    keys = (f"{n}" for n in range(50))
    made = next(found for key in keys if Segment(20, 4, TRAINED) in
                (found := varied([Segment(2, 3), row], how, array, key)))
    parts = {"P": Segment(-2, 1), "S": Segment(-3, 1), "M": Segment(-4, 1), "lead": Segment(2, 3),
             "before": Segment(10, 10, TRAINED), "middle": Segment(20, 4, TRAINED),
             "after": Segment(24, 15, TRAINED), "end": Segment(39, 1, TRAINED)}
    assert made == [parts[name] for name in shape.split()]


def test_half_of_the_middles_stand_in_spm_where_the_base_knows_it_and_a_piece_gets_the_stored_end_mark():
    array = everything(60, nodes=[(20, 24)])
    row = Segment(10, 30, TRAINED | INFILL_ALWAYS, 1)
    how = Varying(eos_id=EOS, fim=FIM, order="psm+spm")
    made = [varied([Segment(2, 3), row], how, array, str(key)) for key in range(400)]
    spm = [found for found in made if found[1].start == -3]
    assert 0.4 < len(spm) / len(made) < 0.6
    assert all(found[-1] == Segment(-1 - EOS, 1, TRAINED) for found in made)
    assert all(found[0].start == -2 for found in made)
    found = next(found for found in spm if Segment(20, 4, TRAINED) in found)
    assert found == [Segment(-2, 1), Segment(-3, 1), Segment(24, 16, TRAINED), Segment(-4, 1), Segment(2, 3),
                     Segment(10, 10, TRAINED), Segment(20, 4, TRAINED), Segment(-1, 1, TRAINED)]


def test_the_rate_of_middles_is_the_configured_one_and_each_epoch_draws_anew():
    array = everything(60, nodes=[(20, 24), (30, 35), (12, 18)])
    row = Segment(10, 30, TRAINED | INFILL_DRAWN, 1)
    how = Varying(eos_id=EOS, fim=FIM, fim_rate=0.3)
    made = [tuple(varied([Segment(2, 3), row], how, array, f"1\0{epoch}")) for epoch in range(1_000)]
    assert 0.26 < sum(len(found) > 2 for found in made) / len(made) < 0.34
    assert len(set(made)) > 3
    assert varied([Segment(2, 3), row], how, array, "k") == varied([Segment(2, 3), row], how, array, "k")


def test_middles_are_mostly_whole_nodes_and_never_empty():
    nodes = [(20, 30), (40, 70)]
    array = everything(101, nodes=nodes, ends=range(9, 100, 10))
    drawn = [infill.choose_middle(0, 100, array, infill.draws(str(key))[1:]) for key in range(600)]
    share = sum(span in nodes for span in drawn) / len(drawn)
    assert 0.75 < share < 0.87
    lines = [span for span in drawn if span not in nodes and span[0] % 10 == 0 and span[1] % 10 == 0]
    assert 0.05 < len(lines) / len(drawn) < 0.16
    assert all(0 <= first < last <= 100 and last - first < 100 for first, last in drawn)


def test_a_cut_moves_to_a_line_end_and_both_windows_at_it_agree():
    array = everything(200, ends=range(4, 200, 5))
    how = Varying(eos_id=EOS, move_tokens=16)
    places = set()
    for epoch in range(60):
        left = varied([Segment(0, 1), Segment(10, 40, TRAINED | LAST_MOVES, 1)], how, array, str(epoch))
        row = Segment(50, 40, TRAINED | FIRST_MOVES, 2)
        right = varied([Segment(0, 1), Segment(20, 30), row], how, array, str(epoch))
        at = right[-1].start
        assert left[-1].start + left[-1].length == at
        assert right[-1].start + right[-1].length == 90
        assert right[1] == Segment(20, at - 20), "the preceding text ends where the target begins"
        assert at == 50 or array.ends[at - 1]
        places.add(at)
    assert places == {35, 40, 45, 50}


def test_only_the_nearest_context_stays_under_a_limit():
    rows = [Segment(0, 50), Segment(100, 30), Segment(200, 2), Segment(210, 5), Segment(215, 20, TRAINED, 2)]
    assert infill.nearest(rows, 40) == [Segment(40, 10), *rows[1:]]
    assert infill.nearest(rows, 0) == rows[2:]
    assert infill.nearest(rows, 1_000) == rows


def test_neighbouring_context_is_joined_and_a_targets_lead_stays_apart():
    rows = [Segment(0, 2), Segment(2, 3), Segment(5, 0), Segment(5, 1), Segment(6, 4),
            Segment(10, 9, TRAINED, 2)]
    assert merged(rows) == [Segment(0, 5), *rows[3:]]


def test_waste_counts_packed_windows_only():
    known, documents, _ = library(4, 60, 300)
    layout = Layout(context_tokens=256, target_tokens=256, seed=1)
    found = list(windows.packed_windows(documents, windows.dense_parts(documents, range(60), layout,
                                                                       known.line_ends), known.edges, layout))
    from training.dataset.building import Kind
    kinds = {"whole": Kind(windows=len(found), tokens=sum(window.length for window in found)),
             "cross-file": Kind(windows=9, tokens=9)}
    assert packing_waste(kinds, 256) == round(1 - kinds["whole"].tokens / (len(found) * 256), 6)
