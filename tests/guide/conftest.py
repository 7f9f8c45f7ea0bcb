from tests.adapters.conftest import _alone, installed, make_swapper, published, said  # noqa: F401  # fixtures
