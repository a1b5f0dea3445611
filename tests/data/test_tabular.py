"""Tables: scikit-learn's sets, CSV files, turning rows into numbers and back, and columns that are refused."""

import json

import numpy as np
import pytest
import torch

from fastdiff.data import TableSchema, TabularDataConfig, load_tabular_data

ROWS = ["1.5,red,10,yes,a", "2.5,blue,20,no,b", "0.5,red,30,yes,a", "4.25,red,45,no,b", "3.0,blue,5,no,a"]
ROWS = ROWS * 3 + ["9.75,green,50,no,b"]


def csv_file(folder, rows=ROWS, names="size,colour,count,big,kind"):
    path = folder / "table.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    return path


def load_csv(path, **fields):
    return load_tabular_data(TabularDataConfig(name="csv", path=str(path), **fields))


@pytest.mark.parametrize(
    ("name", "rows", "numbers", "categories", "classes"),
    [
        ("iris", 150, 4, 1, ("setosa", "versicolor", "virginica")),
        ("wine", 178, 13, 1, ("class_0", "class_1", "class_2")),
        ("breast_cancer", 569, 30, 1, ("benign", "malignant")),
        ("diabetes", 442, 9 + 1, 1, ()),  # sex is a category, the target a number
    ],
)
def test_bundled_sets(name, rows, numbers, categories, classes):
    data = load_tabular_data(TabularDataConfig(name=name))
    assert len(data.train) + len(data.held_out) == rows and data.class_names == classes
    assert abs(len(data.held_out) - rows / 4) <= 2
    batch = data.train.batch(range(len(data.train)))
    assert batch["numbers"].shape == (len(data.train), numbers) and batch["numbers"].dtype == torch.float32
    assert batch["categories"].shape == (len(data.train), categories) and batch["categories"].dtype == torch.int64
    assert (
        batch["numbers"].mean(0).abs().max() < 1e-5 and (batch["numbers"].std(0, unbiased=False) - 1).abs().max() < 1e-4
    )
    again = load_tabular_data(TabularDataConfig(name=name))
    assert again.fingerprint == data.fingerprint and again.schema == data.schema
    if classes:
        shares = [part.categories[:, 0].bincount() / len(part) for part in (data.train, data.held_out)]
        assert (shares[0] - shares[1]).abs().max() < 0.03


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes"])
def test_rows_are_turned_back_exactly(name):
    """What the source has, to its last decimal, through standardised float32."""
    from sklearn import datasets

    data = load_tabular_data(TabularDataConfig(name=name))
    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    found = [data.table(part) for part in (data.train, data.held_out)]
    assert list(found[0]) == [*map(str, bunch.feature_names), data.schema.target]
    for index, column in enumerate(bunch.feature_names):
        turned = np.concatenate([table[column] for table in found]).astype(float)
        assert np.allclose(np.sort(turned), np.sort(bunch.data[:, index]), rtol=0, atol=5e-7), column


def test_csv_columns(tmp_path):
    data = load_csv(csv_file(tmp_path))
    assert [(c.name, c.decimals) for c in data.schema.numbers] == [("size", 2), ("count", 0)]
    assert [(c.name, c.values) for c in data.schema.categories] == [
        ("colour", ("blue", "green", "red")),
        ("big", ("no", "yes")),
        ("kind", ("a", "b")),
    ]
    assert data.schema.target == "kind" and data.class_names == ("a", "b") and data.schema.target_category == 2
    tables = [data.table(part) for part in (data.train, data.held_out)]
    rows = [row for table in tables for row in zip(*(c.tolist() for c in table.values()), strict=True)]
    expected = [row.split(",") for row in ROWS]
    assert sorted(rows) == sorted((float(a), b, float(c), d, e) for a, b, c, d, e in expected)


def test_options_of_csv(tmp_path):
    data = load_csv(csv_file(tmp_path), target="size", categories=["count"], drop=["kind"])
    assert data.class_names == () and data.schema.target_category is None
    count = data.schema.categories[1]
    assert count.name == "count" and count.values == ("5", "10", "20", "30", "45", "50")  # by value, not by letters
    assert data.schema.names == ("size", "colour", "count", "big")


def test_large_whole_numbers_stay_different_categories(tmp_path):
    rows = [f"{i}.5,{1234567 + i % 2}" for i in range(8)]
    data = load_csv(csv_file(tmp_path, rows, "x,y"), categories=["y"])
    assert data.class_names == ("1234567", "1234568")


def test_true_and_false_are_categories(tmp_path):
    data = load_csv(csv_file(tmp_path, [f"{i},{i % 2 == 0}" for i in range(8)], "x,even"))
    assert data.class_names == ("False", "True")


def test_schema_survives_json(tmp_path):
    schema = load_csv(csv_file(tmp_path)).schema
    assert TableSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        (0, lambda v, i: "" if i in (2, 4) else v, r"column 'size' has 2 missing values, the first in row 3"),
        (0, lambda v, i: "NaN" if i == 5 else v, r"column 'size' has 1 missing values, the first in row 6"),
        (1, lambda v, i: "" if i == 0 else v, r"column 'colour' has 1 missing values, the first in row 1"),
        (3, lambda v, i: "NA" if i == 15 else v, r"column 'big' has 1 missing values, the first in row 16"),
        (2, lambda v, i: "7", r"column 'count' is constant.* name it in drop"),
        (1, lambda v, i: "red", r"column 'colour' is constant.* name it in drop"),
        (4, lambda v, i: "a", r"column 'kind' is constant"),
        (0, lambda v, i: "inf" if i == 1 else v, r"column 'size' has infinite values"),
        (4, lambda v, i: "c" if i == 1 else v, r"'c', a class of the target .*, has one row alone"),
    ],
)
def test_columns_that_are_refused(tmp_path, column, change, message):
    rows = [row.split(",") for row in ROWS]
    for index, row in enumerate(rows):
        row[column] = change(row[column], index)
    path = csv_file(tmp_path, [",".join(row) for row in rows])
    with pytest.raises(ValueError, match=message) as error:
        load_csv(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_refused_column_can_be_dropped(tmp_path):
    rows = [f"{row},7" for row in ROWS]
    path = csv_file(tmp_path, rows, "size,colour,count,big,kind,constant")
    with pytest.raises(ValueError, match="column 'constant' is constant"):
        load_csv(path, target="kind")
    assert load_csv(path, target="kind", drop=["constant"]).schema.names == ("size", "colour", "count", "big", "kind")


def test_a_column_that_varies_in_held_out_rows_alone(tmp_path):
    path = csv_file(tmp_path, [f"{i},{'ab'[i % 2]}" for i in range(16)], "x,kind")
    held_out = int(load_csv(path).table(load_csv(path).held_out)["x"][0])
    rows = [f"{i},{1.0 if i == held_out else 0.0},{'ab'[i % 2]}" for i in range(16)]
    with pytest.raises(ValueError, match="column 'y' is constant in the rows to train on"):
        load_csv(csv_file(tmp_path, rows, "x,y,kind"))


def test_texts_are_no_categories(tmp_path):
    rows = [f"name{i},{'ab'[i % 2]}" for i in range(300)]
    with pytest.raises(ValueError, match="column 'name' has 300 categories in 300 rows; expected at most 256"):
        load_csv(csv_file(tmp_path, rows, "name,kind"))


def test_other_separators_are_refused(tmp_path):
    path = tmp_path / "semicolons.csv"
    path.write_text("a;b\n1;2\n3;4\n")
    with pytest.raises(
        ValueError, match="has one column alone, 'a;b'; expected a target and others, separated by commas"
    ):
        load_csv(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(target="none"), "has no column 'none'; it has size, colour, count, big, kind"),
        (dict(drop=["none"]), "has no column 'none'"),
        (dict(categories=["none"]), "has no column 'none'"),
        (dict(drop=["kind"]), "drop: got 'kind', which is the target"),
    ],
)
def test_names_that_are_not_there(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_csv(csv_file(tmp_path), **fields)


def test_texts_of_categories_are_kept(tmp_path):
    path = csv_file(
        tmp_path, [f"{i}.5,{('01067', '1067')[i % 2]},{('a', 'a ', ' b')[i % 3]}" for i in range(12)], "x,zip,k"
    )
    data = load_csv(path, categories=["zip"])
    zips, kinds = data.schema.categories
    assert set(zips.values) == {"01067", "1067"} and kinds.values == ("a", "b")  # spaces around a value are none of it
    with pytest.raises(ValueError, match=r"'zip' has '01067' in row 1 of 12; expected a number .* name it in drop"):
        load_csv(path)
    assert load_csv(path, drop=["zip"]).schema.names == ("x", "k")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "?",
            r"column 'x' has '\?' in row 4 of 12; expected a number such as 1234.5: repair it, name the column in cat",
        ),
        ('"1,234"', "column 'x' has '1,234' in row 4 of 12; expected a number"),
        ("12 %", "column 'x' has '12 %' in row 4 of 12"),
        ("1_000", "column 'x' has '1_000' in row 4 of 12"),
        ("1e200", r"column 'x' has 1e\+200 in row 4 of 12; expected at most 3.4e\+38"),
        ("1e999", "column 'x' has infinite values"),
    ],
)
def test_texts_among_numbers_are_named(tmp_path, value, message):
    rows = [f"{i}.5,{'ab'[i % 2]}" for i in range(12)]
    rows[3] = f"{value},a"
    path = csv_file(tmp_path, rows, "x,k")
    with pytest.raises(ValueError, match=message) as error:
        load_csv(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_number_among_texts_is_named(tmp_path):
    path = csv_file(tmp_path, [f"{i}.5,{'7' if i in (2, 5) else 'ab'[i % 2]}" for i in range(12)], "x,k")
    with pytest.raises(ValueError, match="column 'k' has '7' in row 3 of 12; expected a text, as in its other rows"):
        load_csv(path)
    assert load_csv(path, categories=["k"]).class_names == ("7", "a", "b")


def test_a_table_without_a_line_of_names(tmp_path):
    for names, message in (("5.1,red", "first line has the number '5.1'; expected a line of names"),
                           ("red,red", "first line has 'red' twice"), ("x,", "column 2 has no name")):  # fmt: skip
        path = csv_file(tmp_path, [f"{i}.5,red" for i in range(6)], names)
        with pytest.raises(ValueError, match=f"table.csv cannot be read as CSV .*{message}"):
            load_csv(path)


def test_zero_has_no_sign(tmp_path):
    schema = load_csv(csv_file(tmp_path, [f"{i - 4},{'ab'[i % 2]}" for i in range(9)], "x,k")).schema
    column = schema.numbers[0]
    numbers = torch.tensor([[-column.mean / column.deviation - 1e-3]])
    assert str(schema.decode(numbers, torch.zeros(1, 1, dtype=torch.long))["x"][0]) == "0.0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as CSV"),
        (b"a,b\n", "has 0 rows"),
        (b"a,b\n1,2\n3,4,5\n", "cannot be read as CSV"),
        (b"a,b\n1,2,9\n3,4,5\n", "cannot be read as CSV .*line 2 has 3 values; the line of names has 2"),
        (b"a,b\n\xff\xfe,2\n", "cannot be read as CSV"),
    ],
)
def test_files_that_are_no_tables(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_csv(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="csv"), "path: got none; csv needs"),
        (dict(name="wine", path="x.csv"), "path: got 'x.csv' with wine; it is for csv: leave it out"),
        (dict(held_out_fraction=0.0), "held_out_fraction: got 0.0"),
    ],
)
def test_unusable_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        TabularDataConfig(**fields)


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        load_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="name: got 'titanic'; expected one of iris, wine"):
        load_tabular_data(TabularDataConfig(name="titanic"))


def test_decoding_refuses_what_does_not_fit(tmp_path):
    schema = load_csv(csv_file(tmp_path)).schema
    numbers, categories = torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.int64)
    assert schema.decode(numbers, categories)["colour"].tolist() == ["blue"] * 4
    with pytest.raises(ValueError, match=r"expected \[R, 2\] and \[R, 3\]"):
        schema.decode(numbers[:, :1], categories)
    with pytest.raises(ValueError, match="got 3 rows of numbers and 4 of categories"):
        schema.decode(numbers[:3], categories)
    with pytest.raises(ValueError, match="column 'colour' got ids 3 … 3; expected 0 … 2"):
        schema.decode(numbers, categories + 3)
    with pytest.raises(ValueError, match="numbers of column 'size' are not all finite"):
        schema.decode(numbers / 0, categories)
    with pytest.raises(ValueError, match="column 'colour' has the value 'pink'"):
        schema.encode(schema.decode(numbers, categories) | {"colour": np.array(["pink"] * 4, dtype=object)})
