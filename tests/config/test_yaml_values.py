"""Values as YAML 1.2 reads them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.loading import load
from vitds.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("5E4", 5e4),
        (".5", 0.5),
        ("-3", -3),
        ("off", "off"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
    ]
    + [
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'3'", "3"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: no}", {"a": "no"}),
    ],
)
def test_scalar_is_what_a_person_expects(text, value):
    assert parse_yaml(text, "--set") == value and type(parse_yaml(text, "--set")) is type(value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
)


@settings(deadline=None)
@given(
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3)
        ),
    )
)
def test_written_yaml_reads_back_to_the_same_values(value):
    assert parse_yaml(dump_yaml(value), "text") == value


def test_exponent_without_a_dot_is_a_number(recipe):
    assert load(recipe, "optimizer.lr_peak=1e-3").optimizer.lr_peak == 0.001


def test_off_is_a_word(recipe):
    assert load(recipe, "engine.compile=off").engine.compile == "off"
