"""Files are read strictly, and a refusal names the file and the line."""

import sys
from pathlib import Path

import pytest

from zcore.core.config_file import read_settings
from zcore.core.errors import ConfigError, NotInstalledError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n "a": 1,\n "b": {"a": 2},\n "b": 3}', 'line 4: "b" stands on line 3 already'),
        ("a.json", '{"a": [{"x": 1,\n "\\u0078": 2}]}', 'line 2: "x" stands on line 1 already'),
        ("a.json", '{\n "a": 1, // why\n "b": 2}', "line 2: JSON has no comments"),
        ("a.json", '{\n # why\n "a": 1}', "line 2: JSON has no comments"),
        ("a.json", '{"a": 1 /* why */}', "line 1: JSON has no comments"),
        ("a.json", '{\n "a": 1,\n}', "a comma after the last entry is not JSON"),
        ("a.json", '{"a": [1, 2,]}', "a comma after the last entry is not JSON"),
        ("a.json", '{"a": 1 "b": 2}', "line 1: Expecting ',' delimiter"),
        ("a.json", "[1]", "holds a list; expected settings by name"),
        ("a.json", "", "line 1: Expecting value"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", 'line 3: "a" stands on line 1 already'),
        ("a.yml", "a:\n- {b: 1, b: 2}\n", 'line 2: "b" stands on line 2 already'),
        ("a.yaml", "a: [1\nb: 2\n", "line 2: "),
    ],
)
def test_an_unsound_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


def test_strings_that_look_like_structure_are_only_strings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(r'{"{": "}", "a\"b": ["a\\", "a\"b", {"{": "\"x\": 1"}]}')
    assert read_settings(tmp_path / "a.json") == {"{": "}", 'a"b': ["a\\", 'a"b', {"{": '"x": 1'}]}


def test_yaml_reads_exponents_as_numbers_and_keeps_merges(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 1e-5}\nsize: 5e8\nit: {<<: *base, name: 1e5x}\n")
    settings = {"base": {"lr": 1e-5}, "size": 5e8, "it": {"lr": 1e-5, "name": "1e5x"}}
    assert read_settings(tmp_path / "a.yaml") == settings


def test_an_empty_yaml_file_has_no_settings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert read_settings(tmp_path / "a.yaml") == {}


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no configuration file"):
        read_settings(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match=r"Cannot read the configuration .* directory"):
        read_settings(tmp_path)


def test_yaml_without_a_reader_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)  # the import system's own way to say: not there
    (tmp_path / "a.yaml").write_text("a: 1\n")
    with pytest.raises(NotInstalledError, match=r"pip install 'zcore-core\[yaml\]'"):
        read_settings(tmp_path / "a.yaml")
