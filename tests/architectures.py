"""The GPU architectures that tests compile and simulate kernels for: one, or all with `pytest --all-architectures`."""

ALL = (75, 80, 90, 100, 120)
chosen: tuple[int, ...] = (90,)


def choose_all() -> None:
    """Called by conftest.py before tests are collected."""
    global chosen
    chosen = ALL
