"""Metrics: what each computes on cases that can be counted by hand, and a sentence for whatever does not fit."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import BackendMissing, ModelError, UsageError
from edgedeploy.judge.metrics import BUILT_IN, evaluate, is_larger_better, metric_from_text, outputs_of


def scored(name, output, labels, function=None):
    return evaluate(metric_from_text(name), {"output": np.asarray(output)}, {"": np.asarray(labels)}, function)


def detection(found, truth, name="map"):
    """Score one image's (x1, y1, x2, y2, score, class) rows against its (x1, y1, x2, y2, class) rows."""
    found, truth = np.asarray([found], np.float32), np.asarray([truth], np.float32)
    outputs = {"boxes": found[..., :4], "scores": found[..., 4], "labels": found[..., 5].astype(np.int64)}
    labels = {"boxes": truth[..., :4], "classes": truth[..., 4].astype(np.int64)}
    return evaluate(metric_from_text(name), outputs, labels).value


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'edgedeploy[metrics]'")


@pytest.fixture
def pycocotools():
    return pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'edgedeploy[metrics]'")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("top-1", 'did you mean "top1"'),
        ("f1", 'did you mean "f1_macro"'),
        ("accuracy", "known: top1"),
        ("", "there is no metric ''"),
        ("top1@", "names no output"),
        ("top1@a,b", "reads one output"),
        ("map@boxes", "map@BOXES,SCORES,LABELS"),
        ("pkg.mod:", "package.module:function"),
        ("pkg-mod:f", "package.module:function"),
    ],
)
def test_unknown_or_misspelt_metric_is_a_sentence(text, told):
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        metric_from_text(text)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_metric_is_parsed_with_and_without_outputs(name):
    outputs = ("b", "s", "l") if name.startswith("map") else ("logits",)
    assert metric_from_text(name).outputs == ()
    assert metric_from_text(f"{name}@{','.join(outputs)}").outputs == outputs


def test_only_errors_are_better_when_smaller():
    assert [name for name in BUILT_IN if not is_larger_better(metric_from_text(name))] == ["mae", "mse", "eer"]


def test_a_function_says_itself_which_way_it_points():
    def error_rate(outputs, labels):
        return 0.0

    metric = metric_from_text("m:error_rate")
    assert is_larger_better(metric, error_rate)
    error_rate.larger_is_better = False
    assert not is_larger_better(metric, error_rate)


def test_outputs_are_the_named_one_the_default_or_the_only_one():
    top1 = metric_from_text("top1")
    assert outputs_of(top1, ["only"]) == ("only",)
    assert outputs_of(top1, ["a", "b"], "b") == ("b",)
    assert outputs_of(metric_from_text("top1@a"), ["a", "b"], "b") == ("a",)
    assert outputs_of(metric_from_text("map"), ["labels", "scores", "boxes"]) == ("boxes", "scores", "labels")
    with pytest.raises(UsageError, match="say which one top1 judges: --metric top1@a"):
        outputs_of(top1, ["a", "b"])
    with pytest.raises(UsageError, match='did you mean "logits"'):
        outputs_of(metric_from_text("top1@logit"), ["logits", "stem"])
    with pytest.raises(UsageError, match="reads the output 'scores'"):
        outputs_of(metric_from_text("map"), ["boxes", "labels"])


def test_existing_scores_keep_their_meaning():
    result = scored("top1", [[0.1, 0.9], [0.8, 0.2]], [1, 1])
    assert (result.value, result.scores) == (0.5, (1.0, 0.0))


def test_mse_and_cosine_are_per_sample():
    assert scored("mse", [[1.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]).scores == (5.0, 2.0)
    output, labels = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    assert scored("cosine", output, labels).scores == pytest.approx((1.0, 0.0, 1.0, 0.0))


def test_f1_counts_the_arg_max(sklearn):
    output = np.eye(3)[[0, 0, 1, 2]]  # answers 0, 0, 1, 2
    labels = [0, 1, 1, 2]
    # Class 0: 1 hit, 1 false, 0 missed: 2/3. Class 1: 1 hit, 0 false, 1 missed: 2/3. Class 2: 1.
    assert scored("f1_macro", output, labels).value == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scored("f1_micro", output, labels).value == pytest.approx(3 / 4)
    assert scored("f1_binary", np.array([1, 1, 0, 0]), [1, 0, 1, 0]).value == pytest.approx(0.5)
    assert scored("f1_macro", output, labels).scores is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_that_are_ranked_rightly(rows):
    pytest.importorskip("sklearn")
    labels, scores = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        with pytest.raises(UsageError, match="samples of both"):
            scored("auc", scores, labels)
        return
    difference = positive[:, None] - negative[None]
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert scored("auc", scores, labels).value == pytest.approx(expected)
    two_classes = np.stack([-scores, np.zeros_like(scores)], axis=1)
    assert scored("auc", two_classes, labels).value == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=30))
def test_equal_error_rate_lies_between_thresholds_and_does_not_depend_on_the_direction(rows):
    pytest.importorskip("sklearn")
    labels, scores = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    if labels.all() or not labels.any():
        return
    rate = scored("eer", scores, labels).value
    assert scored("eer", -scores, ~labels).value == pytest.approx(rate)
    # At any threshold one of the two error rates is at least the equal error rate, the other at most.
    for threshold in [-5.0, *np.unique(scores)]:
        false_match, false_non_match = (scores[~labels] > threshold).mean(), (scores[labels] <= threshold).mean()
        assert max(false_match, false_non_match) >= rate - 1e-12
        assert min(false_match, false_non_match) <= rate + 1e-12


def test_equal_error_rate_is_interpolated(sklearn):
    assert scored("eer", [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]).value == 0.0
    assert scored("eer", [0.1, 0.7, 0.3, 0.9], [0, 0, 1, 1]).value == pytest.approx(0.5)
    # Thresholds give (false matches, false non-matches) = (0, 1/2) and then, two ties at once, (1/3, 0): equal at 1/5.
    assert scored("eer", [0.1, 0.2, 0.5, 0.5, 0.9], [0, 0, 0, 1, 1]).value == pytest.approx(1 / 5)


def test_average_precision_of_exact_and_of_missed_boxes(pycocotools):
    first, second = (10, 10, 50, 50), (60, 60, 90, 90)
    exact = [(*first, 0.9, 3), (*second, 0.8, 3)]
    assert detection(exact, [(*first, 3), (*second, 3)]) == pytest.approx(1.0)
    # One of two objects found: precision 1 up to recall 0.5, that is at 51 of COCO's 101 levels of recall.
    assert detection(exact[:1], [(*first, 3), (*second, 3)]) == pytest.approx(51 / 101)
    assert detection([(*first, 0.9, 2)], [(*first, 3)]) == pytest.approx(0.0)
    assert detection([(0, 0, 0, 0, 0.0, -1)], [(*first, 3)]) == 0.0


def test_average_precision_counts_a_box_only_up_to_its_overlap(pycocotools):
    # Intersection over union 62/100: right at 0.50, 0.55 and 0.60, wrong at the seven higher thresholds.
    found, truth = [(0, 0, 62, 100, 0.9, 1)], [(0, 0, 100, 100, 1)]
    assert detection(found, truth) == pytest.approx(3 / 10)
    assert detection(found, truth, "map50") == pytest.approx(1.0)


def test_padding_of_boxes_changes_nothing(pycocotools):
    first = (10, 10, 50, 50)
    padded = [(*first, 0.9, 3), (0, 0, 9, 9, 0.0, 3), (0, 0, 9, 9, 0.95, -1)]
    assert detection(padded, [(*first, 3), (0, 0, 0, 0, -1)]) == pytest.approx(1.0)


def test_average_precision_prints_nothing(pycocotools, capsys):
    detection([(0, 0, 9, 9, 0.9, 1)], [(0, 0, 9, 9, 1)])
    assert capsys.readouterr().out == ""


def test_own_function_gives_one_number_or_one_a_sample():
    output, labels = np.array([[1.0], [2.0]]), np.array([1.0, 4.0])
    whole = scored("m:f", output, labels, lambda outputs, labels: np.float32(0.25))
    assert (whole.value, whole.scores) == (0.25, None)
    each = scored("m:f", output, labels, lambda outputs, labels: outputs[:, 0] == labels)
    assert (each.value, each.scores) == (0.5, (1.0, 0.0))


def test_own_function_gets_dictionaries_where_there_are_several():
    seen = {}

    def function(outputs, labels):
        seen.update(outputs=sorted(outputs), labels=sorted(labels))
        return 1.0

    outputs = {"a": np.zeros(2), "b": np.zeros(2)}
    evaluate(metric_from_text("m:f@a,b"), outputs, {"a": np.zeros(2), "c": np.ones(2)}, function)
    assert seen == {"outputs": ["a", "b"], "labels": ["a", "c"]}


def test_labels_of_an_output_come_before_those_of_the_set():
    outputs = {"age": np.array([[2.0]])}
    assert evaluate(metric_from_text("mae"), outputs, {"": np.array([5.0]), "age": np.array([3.0])}).value == 1.0
    assert evaluate(metric_from_text("mae"), outputs, {"": np.array([5.0])}).value == 3.0
    with pytest.raises(UsageError, match=r"no labels for output 'age' \(it has: labels.sex\)"):
        evaluate(metric_from_text("mae"), outputs, {"sex": np.array([1.0])})


def _raises(outputs, labels):
    raise KeyError("the function's own words")


@pytest.mark.parametrize(
    ("metric", "output", "labels", "function", "error", "told"),
    [
        ("mse", np.zeros((3, 2)), np.zeros((3, 5)), None, UsageError, "labels of 5 numbers a sample do not fit"),
        ("mse", np.zeros((3, 2)), np.zeros((2, 2)), None, UsageError, "3 outputs 'output' cannot be scored"),
        ("mse", np.array([[0.0], [np.inf]]), np.zeros((2, 1)), None, ModelError, "NaN or infinite for sample 1"),
        ("f1_macro", np.zeros((2, 1)), [0, 1], None, UsageError, "no threshold of its own"),
        ("f1_macro", np.zeros((2, 3)), [0, 3], None, UsageError, "the output has 3 classes"),
        ("f1_macro", np.zeros((2, 3)), [0.5, 1.0], None, UsageError, "one class number a sample"),
        ("f1_binary", np.eye(3), [0, 1, 2], None, UsageError, "use f1_macro or f1_micro"),
        ("auc", np.zeros((2, 3)), [0, 1], None, UsageError, "the output has 3"),
        ("eer", np.zeros(2), [1, 1], None, UsageError, r"samples of both; found \[1\]"),
        ("m:f", np.zeros((2, 3)), [0, 1], _raises, UsageError, "the function's own words"),
        ("m:f", np.zeros((2, 3)), [0, 1], lambda o, t: [1.0, 2.0, 3.0], UsageError, r"shape \(3,\)"),
        ("m:f", np.zeros((2, 3)), [0, 1], lambda o, t: float("nan"), UsageError, "NaN or infinity"),
        ("m:f", np.zeros((2, 3)), [0, 1], lambda o, t: "good", UsageError, "could not convert"),
    ],
)
def test_what_does_not_fit_is_a_sentence(metric, output, labels, function, error, told):
    if metric.startswith(("f1", "auc", "eer")):
        pytest.importorskip("sklearn")
    with pytest.raises(error, match=told):
        scored(metric, output, labels, function)


def test_boxes_that_do_not_fit_are_a_sentence():
    outputs = {"boxes": np.zeros((1, 2, 4)), "scores": np.ones((1, 2)), "labels": np.ones((1, 2), int)}
    truth = {"boxes": np.zeros((1, 3, 4)), "classes": np.zeros((1, 3), int)}
    metric = metric_from_text("map")
    with pytest.raises(UsageError, match=r"needs the arrays labels\.boxes"):
        evaluate(metric, outputs, {"": np.zeros(1)})
    with pytest.raises(UsageError, match=r"boxes are \(samples, most, 4\)"):
        evaluate(metric, {**outputs, "scores": np.ones((1, 3))}, truth)
    with pytest.raises(UsageError, match="holds no object"):
        evaluate(metric, outputs, {**truth, "classes": np.full((1, 3), -1)})
    with pytest.raises(UsageError, match="second corner lies before"):
        evaluate(metric, outputs, {**truth, "boxes": np.tile([5, 5, 1, 1], (1, 3, 1))})


@pytest.mark.parametrize("package", ["sklearn", "pycocotools"])
def test_missing_library_says_what_to_install(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendMissing, match=r"edgedeploy\[metrics\]"):
        if package == "sklearn":
            scored("auc", np.array([0.1, 0.9]), [0, 1])
        else:
            detection([(0, 0, 9, 9, 0.9, 1)], [(0, 0, 9, 9, 1)])
