import cuda_host
import pytest
from gpu_context import pytest_runtest_logfinish, pytest_runtest_makereport  # noqa: F401


@pytest.fixture(scope="session")
def host(tmp_path_factory, request):
    """host(NAME): kernels/cuda/NAME.cuh as a library for the CPU."""
    folder = tmp_path_factory.getbasetemp()
    several = hasattr(request.config, "workerinput")  # a folder each, beside one another
    return cuda_host.Builds((folder.parent if several else folder) / "host")
