import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # cases, rivals, shapes


def pytest_addoption(parser):
    parser.addoption("--size", choices=["small", "default", "full"], default="small", help="which shapes to bench")
    parser.addoption("--device", default="cpu", help="where to bench")
