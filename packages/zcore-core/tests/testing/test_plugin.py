"""The plugin in a suite of its own: pytest's `importlib` mode and a module that tests share."""

import zcore.core.testing

pytest_plugins = ["pytester"]


def test_bodies_and_shared_modules_are_found_in_importlib_mode(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\npythonpath = tests\naddopts = --import-mode=importlib -p zcore.core.testing.plugin\n")
    tests = pytester.mkdir("tests")
    (tests / "shared_parity.py").write_text("def double(x):\n    return 2 * x\n")
    (tests / "test_it.py").write_text(
        "import shared_parity\n"
        "def body(x):\n    return shared_parity.double(x)\n"
        "def test_here(ranks):\n    assert ranks(2, body, 3) == [6, 6]\n"
        "def test_shared(ranks):\n    assert ranks(2, shared_parity.double, 4) == [8, 8]\n"
        "def fail():\n    x = 1\n    assert shared_parity.double(x) == 3\n"
        "def test_fails(ranks):\n    ranks(2, fail)\n"
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*rank ? of 2 failed first: AssertionError: assert 2 == 3*", "*rank ?: the same"])
    assert zcore.core.testing.__file__ not in result.stdout.str()
