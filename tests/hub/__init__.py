"""A hub on loopback that the real `huggingface_hub` client talks to over HTTP.

with Hub() as hub:
    repo = hub.repo("org/name")
    repo.branch("v1", files={"build/torch-cpu/__init__.py": "..."})
    hub.fault("*/refs", "status", status=503, times=1)
    hub.requests()          # [("GET", "/api/kernels/org/name/refs"), ...]
"""

from .repos import Repo, kernel_files
from .server import Hub

__all__ = ["Hub", "Repo", "kernel_files"]
