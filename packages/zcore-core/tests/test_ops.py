"""An op is served by the best implementation for device and dtype, and a refusal tells every reason."""

from collections.abc import Callable

import pytest
import torch

from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.core.extensions import BrokenExtensionError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_registry", {})
    monkeypatch.delenv("ZCORE_OPS", raising=False)
    ops._choose.cache_clear()
    ops.reference("scale")(lambda: "reference")
    ops.implementation("scale", source="cpp", priority=10, devices=("cpu",), dtypes=(torch.float32,))(lambda: "cpp")
    ops.implementation("scale", source="cuda", priority=20, devices=("cuda",))(lambda: "cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "source"),
    [
        ("cpu", torch.float32, "cpp"),
        ("cpu", torch.bfloat16, "reference"),
        ("cuda", torch.float32, "cuda"),
        ("meta", torch.float32, "reference"),
    ],
)
def test_the_fastest_that_serves_device_and_dtype_is_chosen(device: str, dtype: torch.dtype, source: str) -> None:
    assert ops.get("scale", device=torch.device(device), dtype=dtype)() == source


def test_what_is_unavailable_here_is_passed_over() -> None:
    ops.implementation("scale", source="avx512", priority=99, why_unavailable=lambda: "needs AVX-512")(lambda: "avx512")
    assert ops.get("scale", device=CPU, dtype=torch.float32)() == "cpp"


def test_a_later_registration_is_seen_after_a_first_look_up() -> None:
    assert ops.get("scale", device=CPU, dtype=torch.float32)() == "cpp"
    ops.implementation("scale", source="faster", priority=30)(lambda: "faster")
    assert ops.get("scale", device=CPU, dtype=torch.float32)() == "faster"


def test_a_source_can_be_forced_in_a_block_or_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def source() -> str:
        return str(ops.get("scale", device=CPU, dtype=torch.float32)())

    assert ops.forced() is None
    with ops.force("reference"):
        assert source() == ops.forced() == "reference"
    assert source() == "cpp"
    monkeypatch.setenv("ZCORE_OPS", "reference")
    assert source() == ops.forced() == "reference"
    with ops.force("cpp"):
        assert source() == ops.forced() == "cpp"


def test_forcing_what_does_not_serve_tells_why() -> None:
    with ops.force("cuda"), pytest.raises(NotInstalledError) as caught:
        ops.get("scale", device=CPU, dtype=torch.float32)
    message = str(caught.value)
    assert message.startswith("Nothing serves the op `scale` for torch.float32 on cpu.")
    assert "cuda (serves cuda only)" in message
    assert "reference (`cuda` is asked for, by ZCORE_OPS or force())" in message


def test_an_op_without_a_reference_tells_what_each_implementation_serves() -> None:
    ops.implementation("attend", source="triton", priority=10, dtypes=(torch.bfloat16,))(lambda: None)
    ops.implementation("attend", source="cuda", priority=20, why_unavailable=lambda: "needs compute capability 8")(
        lambda: None
    )
    with pytest.raises(NotInstalledError) as caught:
        ops.get("attend", device=CPU, dtype=torch.float32)
    assert "cuda (needs compute capability 8); triton (serves torch.bfloat16 only)" in str(caught.value)


def test_an_unknown_op_names_the_nearest() -> None:
    with pytest.raises(NotInstalledError, match="No op is called `scales`; did you mean `scale`"):
        ops.get("scales", device=CPU, dtype=torch.float32)


def test_a_wheels_ops_come_with_the_first_look_up(add_wheel: Callable[..., None]) -> None:
    source = "from zcore.core import ops\nops.implementation('scale', source='wheel', priority=50)(lambda: 'wheel')"
    add_wheel("zcore-fast", "1", {"zcore.ops": {"fast": "fast_ops"}}, fast_ops=source)
    assert ops.get("scale", device=CPU, dtype=torch.float32)() == "wheel"


def test_a_wheel_whose_ops_fail_to_load_is_not_passed_over_in_silence(add_wheel: Callable[..., None]) -> None:
    add_wheel("zcore-fast", "1", {"zcore.ops": {"fast": "torn_ops"}}, torn_ops="import nonesuch")
    with pytest.raises(BrokenExtensionError, match=r"zcore-fast 1 .* No module named 'nonesuch'"):
        ops.get("scale", device=CPU, dtype=torch.float32)


def test_implementations_are_listed_fastest_first() -> None:
    assert [item.source for item in ops.implementations()["scale"]] == ["cuda", "cpp", "reference"]
