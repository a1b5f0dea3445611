"""Schemas of tables that were not read from files: what becomes of columns, what is refused, the schema's file."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from fastdiff.data import TableSchema

TABLE = {"age": [30, 41, 25, 60], "height": [1.7, 1.6, 1.85, 1.75], "city": ["Rome", "Oslo", "Rome", "Bonn"]}


def refused(match, call, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_tables_come_back_as_they_were(tmp_path):
    schema = TableSchema.fit(TABLE, target="city")
    batch = schema(TABLE)
    assert batch["numbers"].dtype == torch.float32 and batch["categories"].dtype == torch.int64
    torch.testing.assert_close(batch["numbers"].mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch["numbers"].std(0, correction=0), torch.ones(2))
    assert batch["categories"].tolist() == [[2], [1], [2], [0]] and schema.category_sizes == (3,)
    schema.save_pretrained(tmp_path / "new" / "folder")
    again = TableSchema.from_pretrained(tmp_path / "new" / "folder")
    assert again == schema and [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["table_schema.json"]
    assert {name: values.tolist() for name, values in again.decode(**batch).items()} == TABLE


def test_which_columns_are_categories():
    table = {"flag": [True, False, True], "code": [10, 2, 2.0], "mixed": [1, "b", 1.0], "x": np.array([1.5, 2, 3])}
    schema = TableSchema.fit(table, categories=["code"])
    assert [(c.name, c.values) for c in schema.categories] == [
        ("flag", ("False", "True")), ("code", ("2", "10")), ("mixed", ("1", "b")),
    ]  # fmt: skip
    assert [c.name for c in schema.numbers] == ["x"] and schema.target is None and schema.target_category is None
    assert schema(table)["categories"].tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    large = TableSchema.fit({"id": np.array([2**60, 2**60 + 1])}, categories=["id"])
    assert large.categories[0].values == (str(2**60), str(2**60 + 1))


def test_columns_of_every_kind_of_container_are_alike():
    expected = TableSchema.fit(TABLE)
    frame = pd.DataFrame(TABLE)
    arrays = {name: np.array(values) for name, values in TABLE.items()}
    tensors = {**TABLE, "age": torch.tensor(TABLE["age"]), "height": torch.tensor(TABLE["height"]).double()}
    nullable = frame.convert_dtypes()
    for table in (frame, arrays, nullable):
        assert TableSchema.fit(table) == expected and torch.equal(
            expected(table)["numbers"], expected(TABLE)["numbers"]
        )
    assert TableSchema.fit(tensors).numbers[0] == expected.numbers[0]
    nullable.loc[2, "city"] = pd.NA
    refused("column 'city' has 1 missing values, the first in row 3 of 4", lambda: TableSchema.fit(nullable))


def test_statistics_are_of_the_rows_to_train_on():
    table = {"x": [0.0, 2.0, 100.0], "kind": ["a", "b", "c"]}
    schema = TableSchema.fit(table, rows=[0, 1])
    assert (schema.numbers[0].mean, schema.numbers[0].deviation) == (1.0, 1.0)
    assert schema.category_sizes == (3,)  # of all rows: held-out ones must have ids, too
    refused("column 'x' is constant in the rows to train on; leave it out", lambda: TableSchema.fit(table, rows=[1]))
    refused("rows: got none", lambda: TableSchema.fit(table, rows=[]))


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_numbers_of_any_unit_come_back(unit):
    values = np.random.default_rng(0).normal(size=50) * unit
    schema = TableSchema.fit({"x": values})
    assert np.abs(schema.decode(**schema({"x": values}))["x"] - values).max() < 2e-6 * unit


def test_small_numbers_keep_their_decimals():
    table = {"x": [0.0008948, 0.002, 0.0031], "y": [1 / 3, 2 / 3, 4 / 3]}
    schema = TableSchema.fit(table)
    assert schema.numbers[0].decimals == 7 and schema.decode(**schema(table))["x"].tolist() == table["x"]
    assert schema.numbers[1].decimals == 7


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(age=[30, None, 25, 60]), "column 'age' has 1 missing values, the first in row 2 of 4; fill them in"),
        (dict(height=[1.7, math.nan, math.nan, 1.8]), "column 'height' has 2 missing values, the first in row 2"),
        (dict(city=["Rome", "", "Rome", "Bonn"]), "column 'city' has 1 missing values"),
        (dict(city=["Rome", "Oslo", math.nan, "Bonn"]), "column 'city' has 1 missing values, the first in row 3"),
        (dict(height=[1.7, math.inf, 1.6, 1.8]), "column 'height' has infinite values; remove these rows"),
        (dict(height=np.array([1.7, -np.inf, 1.6, 1.8])), "column 'height' has infinite values"),
        (dict(age=[30, 30, 30, 30]), "column 'age' is constant, so there is nothing to learn; leave it out"),
        (dict(city=["Rome"] * 4), "column 'city' is constant"),
        (dict(age=[30, 31]), "column 'age' has 2 rows; expected 4"),
        (dict(age=np.zeros((4, 2))), r"column 'age' has shape \[4, 2\]; expected a value per row"),
        (dict(age=[1j, 2, 3, 4]), "column 'age' has values of type complex, int; expected numbers or texts"),
    ],
)
def test_tables_that_are_refused(change, match):
    refused(match, lambda: TableSchema.fit({**TABLE, **change}))


def test_names_and_texts_that_are_refused():
    refused("the table has no columns", lambda: TableSchema.fit({}))
    refused("the table has no rows", lambda: TableSchema.fit({"x": []}))
    refused("has no column 'x', of categories; it has age, h", lambda: TableSchema.fit(TABLE, categories=["x"]))
    refused("has no column 'x', the target; it has age, height", lambda: TableSchema.fit(TABLE, target="x"))
    names = [f"name{index}" for index in range(257)]
    refused("'name' has 257 categories in 257 rows; expected at most 256", lambda: TableSchema.fit({"name": names}))
    numbers = {"id": range(257)}
    refused("'id' has 257 categories", lambda: TableSchema.fit(numbers, categories=["id"]))
    assert TableSchema.fit(numbers).category_sizes == ()


def test_other_tables_must_have_the_columns():
    schema = TableSchema.fit(TABLE)
    assert schema({**TABLE, "more": [None]})["numbers"].shape == (4, 2)
    assert schema({name: [] for name in TABLE})["categories"].shape == (0, 1)
    for change, match in (
        ({"city": ["Paris"] * 4}, "column 'city' has the value 'Paris'; expected one of"),
        ({"age": [1, 2, 3, ""]}, "column 'age' has 1 missing values"),
        ({"age": [1, 2, 3, math.inf]}, "column 'age' has infinite values"),
        ({"age": ["1", "2", "3", "4"]}, "column 'age' has texts, or true and false; expected numbers"),
        ({"age": [1, 2]}, "column 'age' has 2 rows; expected 4"),
    ):
        refused(match, lambda change=change: schema({**TABLE, **change}))
    refused("has no column 'city'; expected age, height, city", lambda: schema({"age": [1], "height": [1.0]}))


def test_one_kind_of_column_may_be_left_out_of_decoding():
    schema = TableSchema.fit({"city": TABLE["city"]})
    assert schema.decode(categories=torch.tensor([[1], [0]]))["city"].tolist() == ["Oslo", "Bonn"]
    refused(r"numbers: got shape \(2, 0\) .*expected \[R, 2\]", lambda: TableSchema.fit(TABLE).decode(
        categories=torch.zeros(2, 1, dtype=torch.long)))  # fmt: skip


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda text: text[:40], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace('"mean"', '"average"'), "'mean' is missing"),
        (lambda text: json.dumps(json.loads(text) | {"names": ["age"]}), "expected the columns"),
        (lambda text: json.dumps(json.loads(text) | {"target": "none"}), "target 'none'; expected the columns"),
    ],
)
def test_files_that_are_no_schemas(tmp_path, damage, match):
    refused("table_schema.json: no such file", lambda: TableSchema.from_pretrained(tmp_path), FileNotFoundError)
    TableSchema.fit(TABLE).save_pretrained(tmp_path)
    path = tmp_path / "table_schema.json"
    path.write_text(damage(path.read_text()))
    refused(f"{path}: .*{match}", lambda: TableSchema.from_pretrained(tmp_path))
