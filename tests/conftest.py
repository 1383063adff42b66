"""Fixtures that any test may ask for."""

import os

# Two threads fighting for one core make small tensors slower, and tests slower still.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU the kernels run in Triton's interpreter; it must know before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

from tests.redis_fixture import redis as redis
from tests.redis_fixture import redis_server as redis_server
from tests.redis_fixture import redis_url as redis_url
from tests.redis_fixture import session_redis as session_redis
from tests.redis_fixture import store as store

# The same examples in every run, so that a commit passes or fails whoever runs it;
# `--hypothesis-profile=search` looks for new ones. How long one takes says more about the machine's other
# work than about the code.
settings.register_profile("attune", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("attune")
