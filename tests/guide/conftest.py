from tests.adapters.conftest import installed, make_swapper, one_thread, published, said  # noqa: F401  # fixtures
