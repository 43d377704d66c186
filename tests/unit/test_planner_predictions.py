"""`holdfast predict`: whole files of measurements, good ones and those that are none."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from holdfast.core.errors import ConfigError
from holdfast.operate.predict import run
from holdfast.planner.config import PredictConfig, RowsConfig
from holdfast.planner.rows.predictions import ADDED, read_rows
from support.data import data

HEAD = "source,model,params,gpu,n_gpus,tp,pp,dtype,batch,input_len,output_len,metric,value,unit"
SERVING = "ours vLLM,Llama-3.1-8B,8e9,H100,1,1,1,bf16,8,1000,200,tpot,8,ms"
MIXED = f"""{HEAD},n_nodes,op,message_bytes,latency_us
{SERVING},,,,
ours vLLM,Qwen2.5-72B,72e9,L40S,4,4,1,fp16,1,1000,200,ttft,900,ms,,,,
nccl-tests,,,H100,8,,,half,,,,,,,1,all_reduce,1048576,40
ours vLLM,Llama-3.1-8B,8e9,H100,1,1,1,bf16,,sharegpt,sharegpt,ttft_p90,50,ms,,,,
"""


def predicted(tmp_path: Path, text: str | bytes, **options) -> str:
    """What `holdfast predict --rows FILE --output OUT` writes."""
    given, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    given.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(PredictConfig(rows=RowsConfig(rows=str(given), output=str(out), **options))) == 0
    return out.read_text()


def test_rows_come_back_in_order_with_predictions_behind(tmp_path, capsys) -> None:
    text = predicted(tmp_path, MIXED)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == f"{HEAD},n_nodes,op,message_bytes,latency_us,{','.join(ADDED)}"
    assert [row["model"] for row in rows] == ["Llama-3.1-8B", "Qwen2.5-72B", "", "Llama-3.1-8B"]
    for row in rows[:3]:
        low, value, high = (float(row[name]) for name in ("prediction_low", "prediction", "prediction_high"))
        assert low < value < high
        measured = float(row["value"] or row["latency_us"])
        assert float(row["prediction_error"]) == pytest.approx(value / measured - 1, abs=1e-3)
        assert row["prediction_note"] == ""
    assert [rows[3][name] for name in ADDED[:4]] == [""] * 4
    assert "no percentiles" in rows[3]["prediction_note"]
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split()[:3] for line in said.err.splitlines()[1:]] == [
        ["collective", "1", "1"],
        ["not", "predicted", "1"],
        ["tpot", "1", "1"],
        ["ttft", "1", "1"],
    ]


def test_predictions_of_an_earlier_run_give_way(tmp_path) -> None:
    once = predicted(tmp_path, MIXED)
    assert predicted(tmp_path, once) == once


def test_json_has_the_rows_and_the_summary(tmp_path) -> None:
    told = json.loads(predicted(tmp_path, MIXED, json=True))
    assert [row["kind"] for row in told["rows"]] == ["tpot", "ttft", "collective", ""]
    assert told["rows"][3]["prediction"] is None
    assert told["rows"][0]["gpu"] == "H100"
    assert {some["kind"]: some["rows"] for some in told["summary"]} == {
        "collective": 1,
        "not predicted": 1,
        "tpot": 1,
        "ttft": 1,
    }
    assert all(0 <= some["median"] <= some["p90"] for some in told["summary"] if some["with_value"])


def test_stdin_and_stdout(monkeypatch, capsys) -> None:
    class Stdin:
        buffer = io.BytesIO(MIXED.encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert run(PredictConfig(rows=RowsConfig(rows="-"))) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + MIXED,
        MIXED.replace("\n", "\r\n"),
        MIXED.replace("\n", "\n\n"),
        MIXED.replace("metric,", "Metric ,").replace("gpu,", " GPU,"),
        MIXED.rstrip("\n"),
    ],
    ids=["byte order mark", "carriage returns", "empty lines", "headings", "no last newline"],
)
def test_files_as_spreadsheets_write_them(tmp_path, text: str) -> None:
    rows = [line.rpartition(",H100,")[2] for line in predicted(tmp_path, text).splitlines()[1:]]
    assert rows == [line.rpartition(",H100,")[2] for line in predicted(tmp_path, MIXED).splitlines()[1:]]


def test_a_row_with_a_comma_too_many_is_not_guessed_at(tmp_path) -> None:
    text = f"{HEAD}\nours, vLLM{SERVING[9:]}\n{SERVING.rpartition(',')[0]}\n"
    rows = list(csv.DictReader(io.StringIO(predicted(tmp_path, text))))
    assert rows[0]["prediction_note"] == "the row has more cells than there are columns"
    assert rows[1]["prediction"]  # the unit is missing, and ms is what a time comes in


def test_a_heading_alone_is_no_rows(tmp_path) -> None:
    assert predicted(tmp_path, HEAD + "\n") == f"{HEAD},{','.join(ADDED)}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEAD.replace(",", ";").encode(), "its columns are parted by ';'; they must be by commas"),
        (HEAD.replace(",", "\t").encode(), r"its columns are parted by '\\t'"),
        (b"when,who\n1,2\n", "has neither a column metric nor a column op; its columns: when, who"),
        (b"metric,gpu,GPU\n", "has two columns 'gpu'"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no text in UTF-8"),
        (b'metric,gpu\n"tpot"x,H100\n', "after line 1"),
        (b"metric,gpu\n" + b"a" * 200_000, "field larger"),
        (MIXED.encode("utf-16"), "is no text in UTF-8"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_files_that_are_none_are_refused_in_one_sentence(tmp_path, text: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        predicted(tmp_path, text)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("--rows ")


@pytest.mark.parametrize("name", ["no such file.csv", "/", "\0", "x" * 300])
def test_names_that_are_no_file(name: str) -> None:
    with pytest.raises(ConfigError, match="--rows"):
        run(PredictConfig(rows=RowsConfig(rows=name)))


def test_a_place_that_cannot_be_written_is_refused(tmp_path) -> None:
    given = tmp_path / "rows.csv"
    given.write_text(MIXED)
    with pytest.raises(ConfigError, match="--output"):
        run(PredictConfig(rows=RowsConfig(rows=str(given), output=str(tmp_path))))


def test_rows_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--rows: which measurements"):
        PredictConfig().check()


@pytest.mark.parametrize("name", ["measured_serving.csv", "measured_collectives.csv"])
def test_files_of_the_data_folder_lose_no_row(name: str, tmp_path) -> None:
    path = data(name)
    columns, rows = read_rows("\n".join(path.read_text(encoding="utf-8").splitlines()[:300]), name)
    out = predicted(tmp_path, "\n".join(path.read_text(encoding="utf-8").splitlines()[:300]))
    written = list(csv.DictReader(io.StringIO(out)))
    assert [[row[column] for column in columns] for row in written] == [list(row.values()) for row in rows]
    assert all(row["prediction"] or row["prediction_note"] for row in written)
