"""The table of real networks: what a person reads of the figures."""

import pytest

from tests.benchmarks.real_models import Cell, is_right, latencies, markdown, summary


def answers(**changed):
    return {
        "max_relative_error": 1e-6, "sqnr_db": 40.0, "cosine_mean": 0.999, "cosine_min": 0.9, "argmax_agreement": 0.98,
    } | changed  # fmt: skip


def row(**changed):
    return {"outcome": "right", "size_bytes": 2_000_000, "answers": answers(), "accuracy": {}, "p50_s": 0.004} | changed


def report(**cells):
    model = {"has_meaning": True, "cells": {key.replace("_", " "): value for key, value in cells.items()}}
    return {"backends": ["onnxruntime", "tflite"], "models": {"net": model}}


def test_refusals_stand_below_the_table_once_each():
    refused = {"outcome": "refused", "why": "CompileError: no kernel"}
    text = markdown(report(onnxruntime_fp32=row(), tflite_fp32=refused, tflite_int8=refused))
    assert text.splitlines()[2] == "| net | fp32 | error 1e-06, 2 MB, 4 ms | refused (1) |"
    assert text.splitlines()[3] == "| net | int8 | — | refused (1) |"
    assert text.endswith("\n1. CompileError: no kernel\n")


def test_a_wrong_answer_cannot_be_overlooked():
    text = markdown(report(tflite_fp32=row(outcome="wrong", answers=answers(max_relative_error=0.5))))
    assert "**wrong**, error 5e-01" in text


def test_accuracy_is_told_with_what_was_lost_and_gained():
    scored = {"100 photographs": {"top1": 0.8, "lost": 3, "gained": 1, "samples": 100}}
    text = markdown(report(onnxruntime_int8=row(accuracy=scored, times_of_onnxruntime_fp32=0.5)))
    assert "80.0% (−3 +1), 2 MB, 4 ms (0.50×)" in text


@pytest.mark.parametrize(
    ("precision", "changed", "expected"),
    [
        ("fp32", {"answers": answers(max_relative_error=2e-4)}, False),
        ("fp32", {"answers": answers(max_relative_error=9e-5)}, True),
        ("fp16", {"form": answers(max_relative_error=6e-3)}, False),
        ("fp16", {"answers": answers(max_relative_error=1.0), "form": answers()}, True),
        (
            "int8",
            {"form": answers(cosine_mean=0.98), "form_on_integer_kernels": answers(cosine_mean=0.98)},
            False,
        ),
        (
            "int8",
            {"form": answers(cosine_mean=0.98), "form_on_integer_kernels": answers(cosine_mean=0.995)},
            True,
        ),
    ],
)
def test_a_cell_is_right_when_it_answers_what_its_form_answers(precision, changed, expected):
    assert is_right(Cell("tflite", precision, row(**changed))) is expected


def test_the_ratio_is_taken_round_by_round():
    found = latencies([[2.0, 2.0], [20.0, 20.0], [200.0, 200.0]], [[1.0, 1.0], [10.0, 10.0], [100.0, 100.0]])
    assert found["times_of_onnxruntime_fp32"] == 2.0
    assert found["p50_s"] == 20.0
    assert "times_of_onnxruntime_fp32" not in latencies([[2.0, 2.0]], None)


def test_the_summary_names_the_worst_float_cell():
    models = report(onnxruntime_fp32=row(), tflite_fp32=row(answers=answers(max_relative_error=3e-5)))["models"]
    found = summary(models)
    assert found["fp32_worst"] == "net, tflite fp32"
    assert found["outcomes"] == {"right": 2}
