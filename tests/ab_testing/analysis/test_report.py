"""The whole way from a table to a report: every kind of metric, every kind of table, and too little of anything."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ab_testing.analysis import (
    AnalysisError,
    Columns,
    InvalidMetric,
    InvalidTable,
    Metric,
    analyse,
    exceedance,
    mean,
    proportion,
    quantile,
    ratio,
)
from ab_testing.analysis.tables import read_numbers
from tests.ab_testing.analysis.sample_tables import NumpyTable, interactions

METRICS = (
    ratio("thumbs_up_rate", "thumbs_up", "eligible", margin=0.05),
    ratio("adjusted", "thumbs_up", covariate="before_x", covariate_denominator="before_n"),
    mean("thumbs_up_per_user", "thumbs_up", clip=1.0),
    proportion("ever_thumbed_up", "thumbs_up"),
    exceedance("slow", "latency_s", 3.0, margin=0.05),
    quantile("latency_p90", "latency_s", 0.9),
)


def shares(control: tuple[int, int], treatment: tuple[int, int]) -> NumpyTable:
    """One row per user: (events, users) of each variant."""
    users = control[1] + treatment[1]
    x = np.zeros(users)
    x[: control[0]] = 1
    x[control[1] : control[1] + treatment[0]] = 1
    variant = np.array(["control"] * control[1] + ["treatment"] * treatment[1])
    return {"user_id": np.arange(users), "variant": variant, "x": x}


def test_all_tables_give_the_same_bytes() -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    table = interactions()
    columns = Columns(segment="country")
    expected = analyse(table, METRICS, columns=columns).to_json().encode()
    frame = pandas.DataFrame(table)
    assert analyse(frame, METRICS, columns=columns).to_json().encode() == expected
    assert analyse(arrow.table(table), METRICS, columns=columns).to_json().encode() == expected
    chunks = arrow.concat_tables([arrow.table(table).slice(0, 100), arrow.table(table).slice(100)])
    assert analyse(chunks, METRICS, columns=columns).to_json().encode() == expected


def test_two_threads_give_the_bytes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table, columns = interactions(), Columns(segment="country")
    on_one = analyse(table, METRICS, columns=columns).to_json()
    monkeypatch.setattr("ab_testing.analysis.table_analysis._ROWS_FOR_THREADS", 0)
    assert analyse(table, METRICS, columns=columns).to_json() == on_one
    with pytest.raises(InvalidTable, match="no column"):
        analyse(table, [*METRICS, mean("gone", "gone")])


def test_what_may_not_be_written_to_is_neither_copied_nor_changed() -> None:
    """`numpy.bincount` would copy it for every metric."""
    table = interactions()
    expected = analyse(table, METRICS).to_json()
    for column in table.values():
        column.flags.writeable = False
    read = read_numbers(table, "latency_s")
    assert read.flags.writeable
    assert np.shares_memory(read, table["latency_s"])
    assert analyse(table, METRICS).to_json() == expected
    assert not any(column.flags.writeable for column in table.values())


def test_polars_gives_the_same_bytes() -> None:
    polars = pytest.importorskip("polars")
    table = interactions()
    assert analyse(polars.DataFrame(table), METRICS).to_json() == analyse(table, METRICS).to_json()


def test_names_of_users_do_not_matter() -> None:
    table = interactions()
    expected = [effect.estimate for effect in analyse(table, METRICS)]
    sparse = table | {"user_id": table["user_id"].astype(np.int64) * 10**9 - 5}
    named = table | {"user_id": np.array([f"user-{number}" for number in table["user_id"].tolist()], dtype=object)}
    for renamed in (sparse, named):
        assert [effect.estimate for effect in analyse(renamed, METRICS)] == pytest.approx(expected, rel=1e-12)


def test_the_order_of_whole_numbers_does_not_matter() -> None:
    table = interactions()
    metrics = [METRICS[0], METRICS[1], METRICS[3], METRICS[4]]
    order = np.random.default_rng(1).permutation(len(table["user_id"]))
    shuffled = {name: column[order] for name, column in table.items()}
    assert analyse(shuffled, metrics).to_json() == analyse(table, metrics).to_json()


def test_rows_without_a_value_do_not_count_for_that_metric() -> None:
    table = interactions()
    is_known = table["user_id"].astype(np.int64) % 7 != 0
    holes = table | {"thumbs_up": np.where(is_known, table["thumbs_up"].astype(float), np.nan)}
    kept = {name: column[is_known] for name, column in table.items()}
    for metric in (METRICS[0], METRICS[2], METRICS[3]):
        assert analyse(holes, [metric]).to_json() == analyse(kept, [metric]).to_json()
    slow = table | {"latency_s": np.where(is_known, table["latency_s"].astype(float), np.nan)}
    for metric in METRICS[4:]:
        assert analyse(slow, [metric]).effects[0].estimate == analyse(kept, [metric]).effects[0].estimate


def test_young_rows_do_not_count() -> None:
    table = interactions()
    at = np.arange(len(table["user_id"])).astype(np.float64)
    columns = Columns(created_at="at")
    late = ratio("late", "thumbs_up", maturity_s=100.0)
    found = analyse(table | {"at": at}, [late], columns=columns, now=at[-1])
    kept = {name: column[at <= at[-1] - 100] for name, column in table.items()}
    assert found.to_json() == analyse(kept, [ratio("late", "thumbs_up")]).to_json()
    with pytest.raises(InvalidTable, match="created_at"):
        analyse(table, [late])


def test_segments_are_those_rows_and_all_p_values_are_corrected_together() -> None:
    table = interactions()
    found = analyse(table, METRICS[:1], columns=Columns(segment="country"), correction="bh")
    assert [effect.segment for effect in found] == [None, "de", "fr", "jp"]
    only = {name: column[table["country"] == "fr"] for name, column in table.items()}
    alone = analyse(only, METRICS[:1]).effects[0]
    assert found.effect("thumbs_up_rate", segment="fr").interval == alone.interval
    p_values = [effect.p_value or 0 for effect in found]
    assert max(effect.adjusted_p_value or 0 for effect in found) == pytest.approx(max(p_values))
    assert min(effect.adjusted_p_value or 0 for effect in found) > min(p_values)


def test_every_treatment_is_compared() -> None:
    table = interactions()
    names = np.array(["control", "second", "third"])[table["user_id"].astype(np.int64) % 3]
    found = analyse(table | {"variant": names}, METRICS[:1])
    assert [effect.treatment for effect in found] == ["second", "third"]
    pair = {name: column[names != "second"] for name, column in (table | {"variant": names}).items()}
    assert found.effect("thumbs_up_rate", "third").estimate == analyse(pair, METRICS[:1]).effects[0].estimate


@pytest.mark.parametrize("metric", [proportion("x", "x"), ratio("x", "x"), exceedance("x", "x", 0.5)])
def test_a_harm_that_the_control_never_had_is_found(metric: Metric) -> None:
    found = analyse(shares((0, 1000), (12, 1000)), [metric]).effects[0]
    assert found.p_value is not None
    assert found.p_value < 0.01
    assert found.interval is not None
    assert found.interval.lower > 0
    assert found.method == "newcombe"


def test_no_events_are_no_certainty() -> None:
    found = analyse(shares((0, 1000), (0, 1000)), [proportion("x", "x"), ratio("y", "x")])
    for effect in found:
        assert effect.p_value == 1.0
        assert effect.interval == pytest.approx((-0.0038, 0.0038), abs=5e-5)
        assert effect.verdict == "unclear"


@pytest.mark.parametrize(("control", "treatment"), [((0, 1), (1, 5)), ((1, 5), (0, 1)), ((0, 1), (0, 1))])
@pytest.mark.parametrize("metric", [ratio("x", "x"), mean("x", "x"), proportion("x", "x"), quantile("x", "x", 0.5)])
def test_too_few_users_are_too_few(metric: Metric, control: tuple[int, int], treatment: tuple[int, int]) -> None:
    found = analyse(shares(control, treatment), [metric]).effects[0]
    assert found.verdict == "insufficient_data"
    assert found.reason
    assert (found.estimate, found.interval, found.p_value, found.adjusted_p_value) == (None,) * 4


def test_users_who_do_not_differ_say_nothing_of_amounts() -> None:
    table = shares((0, 50), (0, 50)) | {"x": np.full(100, 7.5)}
    found = analyse(table, [mean("x", "x")]).effects[0]
    assert found.verdict == "insufficient_data"
    assert found.reason == "the users of control do not differ"


def test_rounding_is_not_taken_for_variation() -> None:
    table = {
        "user_id": np.arange(90).repeat(3),
        "variant": np.array(["control", "treatment"]).repeat(135),
        "x": np.tile([1.1, 2.2, 3.3, 3.3, 2.2, 1.1], 45),
    }
    assert analyse(table, [mean("x", "x")]).effects[0].verdict == "insufficient_data"


def test_a_covariate_that_explains_everything_is_no_certainty() -> None:
    table = interactions()
    leak = table | {"after": table["latency_s"]}
    found = analyse(leak, [mean("m", "latency_s", covariate="after")]).effects[0]
    assert found.verdict == "insufficient_data"
    assert "is it from before?" in (found.reason or "")


def test_users_who_are_all_in_both_variants_are_no_certainty() -> None:
    table = {
        "user_id": np.tile(np.arange(200), 2),
        "variant": np.array(["control", "treatment"]).repeat(200),
        "x": np.tile(np.random.default_rng(0).normal(size=200), 2),
    }
    found = analyse(table, [mean("x", "x")]).effects[0]
    assert found.verdict == "insufficient_data"
    assert "both variants" in (found.reason or "")


def test_no_row_with_a_value_is_no_data() -> None:
    table = shares((1, 50), (1, 50)) | {"x": np.full(100, np.nan)}
    for metric in (
        ratio("x", "x"),
        mean("x", "x"),
        proportion("x", "x"),
        exceedance("x", "x", 1),
        quantile("x", "x", 0.5),
    ):
        assert analyse(table, [metric]).effects[0].verdict == "insufficient_data"


def test_the_confidence_sequence_waits_for_events() -> None:
    few, many = shares((20, 1000), (25, 1000)), shares((200, 1000), (230, 1000))
    metric = ratio("x", "x", margin=0.05, direction="down_is_good")
    waiting = analyse(few, [metric]).effects[0]
    assert waiting.sequence is None
    assert any("30 events" in note for note in waiting.notes)
    shown = analyse(many, [metric]).effects[0]
    assert shown.sequence is not None
    assert shown.interval is not None
    assert shown.sequence.lower < shown.interval.lower


@pytest.mark.parametrize(
    ("treatment", "direction", "verdict"),
    [
        (400, "up_is_good", "better"),
        (400, "down_is_good", "worse"),
        (200, "up_is_good", "unclear"),
        (80, "up_is_good", "worse"),
        (80, "down_is_good", "better"),
    ],
)
def test_verdicts_follow_the_direction(treatment: int, direction: str, verdict: str) -> None:
    metric = Metric(name="x", kind="ratio", numerator="x", direction=direction, margin=0.05)  # type: ignore[arg-type]
    assert analyse(shares((200, 1000), (treatment, 1000)), [metric]).effects[0].verdict == verdict


def test_equal_variants_with_enough_users_are_not_worse() -> None:
    found = analyse(shares((2000, 10_000), (2000, 10_000)), [ratio("x", "x", margin=0.05)]).effects[0]
    assert found.verdict == "not_worse"


def test_reports_are_json_and_rows() -> None:
    report = analyse(interactions(), METRICS)
    assert len(json.loads(report.to_json())["effects"]) == len(report.rows()) == len(METRICS)
    assert report.rows()[0]["metric"] == "thumbs_up_rate"
    with pytest.raises(KeyError):
        report.effect("nothing")


def test_bad_tables_are_refused() -> None:
    table = shares((1, 10), (1, 10))
    with pytest.raises(InvalidTable, match="no column"):
        analyse(table, [ratio("y", "y")])
    with pytest.raises(InvalidTable, match="control"):
        analyse(table, [ratio("x", "x")], control="champion")
    with pytest.raises(InvalidTable, match="infinite"):
        analyse(table | {"x": np.full(20, np.inf)}, [ratio("x", "x")])
    with pytest.raises(InvalidTable, match="too large"):
        analyse(table | {"x": np.full(20, 1e200)}, [mean("x", "x")])
    with pytest.raises(AnalysisError, match="alpha"):
        analyse(table, [ratio("x", "x")], alpha=1.0)
    with pytest.raises(InvalidTable, match="differ in length"):
        analyse(table | {"variant": np.array(["control"])}, [ratio("x", "x")])
    with pytest.raises(InvalidTable, match="negative"):
        analyse(table | {"n": np.full(20, -1.0)}, [ratio("x", "x", "n")])
    with pytest.raises(InvalidTable, match="without a value"):
        analyse(table | {"user_id": np.array([None] * 20)}, [ratio("x", "x")])
    with pytest.raises(InvalidTable, match="no numbers"):
        analyse(table, [ratio("x", "variant")])


def test_bad_metrics_are_refused() -> None:
    with pytest.raises(InvalidMetric):
        quantile("p", "x", 1.0)
    with pytest.raises(InvalidMetric):
        ratio("r", "x", margin=0.0)
    with pytest.raises(InvalidMetric):
        ratio("r", "x", clip=float("nan"))
    with pytest.raises(InvalidMetric):
        analyse(shares((1, 10), (1, 10)), [ratio("x", "x"), mean("x", "x")])


def test_a_changed_metric_has_another_hash() -> None:
    first, second = ratio("r", "x", margin=0.01), ratio("r", "x", margin=0.02)
    assert first.metric_hash != second.metric_hash
    assert first.metric_hash == ratio("r", "x", margin=0.01).metric_hash
