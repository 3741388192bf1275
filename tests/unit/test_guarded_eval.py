"""Text that a library evaluates is mathematics, or it is not run."""

import ast
import contextlib
import dataclasses
import sys
import threading

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.rewards.guarded_eval import Forbidden, only_mathematics

RAN = []


def trespass():
    RAN.append(1)
    return 1


@pytest.mark.parametrize(
    "text",
    [
        "trespass()",
        "[trespass() for x in (1,)]",
        "(lambda: trespass())()",
        "(lambda f=[lambda: trespass()]: f[0]())()",
        "f'{trespass()}'",
        "eval('trespass()')",
        "exec(chr(116))",
        "__import__('os').getpid()",
        "().__class__.__base__.__subclasses__()",
        "''.join([])",
        "print",
        "ｔrespass()",  # Python reads it as ASCII
    ],
)
def test_other_names_are_not_run(text):
    RAN.clear()
    with only_mathematics():
        with pytest.raises(Forbidden, match="in a text to evaluate"):
            eval(text)
        with contextlib.suppress(Exception):  # whatever the parser says of it
            sympy.parse_expr(text, local_dict={"trespass": trespass})
    assert not RAN


@pytest.mark.parametrize("text", ["[[1, 2], ['a', None]]", "3*(4 - 2)**2 / 7", "{'a': {1, 2}}", "-1e9", "'a' 'b'"])
def test_literals_and_arithmetic_are_evaluated(text):
    with only_mathematics():
        assert eval(text) == eval(text, {"__builtins__": {}})


@given(st.recursive(st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=8))
def test_any_literal_is_evaluated(value):
    with only_mathematics():
        assert eval(repr(value)) == ast.literal_eval(repr(value))


@pytest.mark.parametrize(
    "text", ["3*x**2/2 + C", "-cos(2*X) + exp(y)*log(y)", "sqrt(2)*pi*E", "5!", "x*atan(x)", "0.5*x", "x/(x**2 + y)"]
)
def test_sympy_works_as_ever(text):
    def work():
        derivative = sympy.diff(sympy.parse_expr(text), sympy.Symbol("x"))
        return sympy.simplify(derivative), sympy.factor(derivative), sympy.cancel(derivative)

    sympy.core.cache.clear_cache()  # which holds programs that sympy writes for itself
    with only_mathematics():
        guarded = work()
    sympy.core.cache.clear_cache()
    assert guarded == work()


def test_nothing_is_forbidden_outside_nor_in_other_threads_nor_to_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "module_of_names.py").write_text("import os\nhere = os.getcwd()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = []
    with only_mathematics():
        with only_mathematics():
            pass
        thread = threading.Thread(target=lambda: said.append(eval("len('abc')")))
        thread.start()
        thread.join()
        assert dataclasses.make_dataclass("Point", ["x"])(x=3).x == 3
        import module_of_names

        assert module_of_names.here
        with pytest.raises(Forbidden):
            eval("len('abc')")
    assert said == [3] and eval("len('abc')") == 3
    sys.modules.pop("module_of_names")
