import pytest

from ddpm_fast.nn import lazy_group_norm, optimized_modules


@pytest.fixture
def fused_in_training(monkeypatch):
    """Norms are fused in float32 training too, where rounding does not hide what it would in bfloat16."""
    for module in (lazy_group_norm, optimized_modules):
        monkeypatch.setattr(module, "trains_in_float32", lambda x: False)
